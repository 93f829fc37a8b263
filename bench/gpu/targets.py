"""What was asked of one H200 in bf16 (operations, dense and reduced towers), beside what rows of measurements say.

Towers are compared by their speed-up over the host's own forward, paired within the rounds of their run, for every run
has that: so a variant of one run can be held against one of another. Where every run has it from a graph, too, that is
taken, because the time that Python takes to launch it differs between processes. η is against the fastest dense variant
that was measured; `Target.without` names the modes of the compiler in which the host was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from clipkernels.measure.timing import HOST

Row = dict[str, Any]
PEER = "towers-bf16-peer"
MODES = ("default", "max-autotune")


class Target(NamedTuple):
    """A target: what is measured, the bound, whether a figure meets it, the figures by tower or shape, and the dense
    variants that were not measured, by tower."""

    what: str
    asked: str
    met: Callable[[float], bool]
    came: dict[str, float]
    without: Mapping[str, str] = MappingProxyType({})


class Best(NamedTuple):
    """A method's fastest way on a tower and batch: its row, and how many times faster than the host's own forward,
    from Python or from a graph, it is."""

    row: Row
    speed: float


def targets(ops: Sequence[Row], towers: Sequence[Row]) -> list[Target]:
    """Every target, in order."""

    def times(op: str, batch: int, *variants: str) -> dict[str, float]:
        """The fastest of some variants, in µs, by tower."""
        found: dict[str, float] = {}
        for row in ops:
            if (row["op"], row["batch"]) == (op, batch) and row["variant"] in variants:
                found[row["tower"]] = min(row["microseconds"], found.get(row["tower"], math.inf))
        return found

    def over(op: str, batch: int, ours: Sequence[str], others: Sequence[str]) -> dict[str, float]:
        """How many times faster ours is than the fastest of others, by tower."""
        mine, theirs = times(op, batch, *ours), times(op, batch, *others)
        return {f"{tower} b{batch}": theirs[tower] / mine[tower] for tower in mine if tower in theirs}

    def beside_sdpa(op: str) -> dict[str, float]:
        """How many times longer the faster of our forms takes than SDPA, by tower."""
        return {name: 1 / value for name, value in over(op, 256, ("auto", "triton"), ("sdpa",)).items()}

    def copied(op: str) -> dict[str, float]:
        """The share of a copy's bandwidth that our kernel reaches at large batches."""
        ours = [row for row in ops if (row["op"], row["variant"]) == (op, "triton") and row["batch"] in (64, 256)]
        return {f"{row['tower']} b{row['batch']:.0f}": row["of_copy"] for row in ours}

    triton, plain, literal = ("triton",), ("reference",), ("literal", "literal_compiled")
    found = [
        most("attention and the CLS row, beside SDPA without it", 1.03, beside_sdpa("attention_cls")),
        most("the same with sizes, beside SDPA with them", 1.03, beside_sdpa("attention_cls_sized")),
        most("attention and what patches receive, beside SDPA", 1.15, beside_sdpa("attention_received")),
        least("prune: share of copy bandwidth", 0.85, copied("prune_tokens")),
        least("prune, fuse and norm: share of copy bandwidth", 0.85, copied("prune_tokens_heads_fuse_norm")),
        most("prune at batch 1 in a graph, µs", 6, times("prune_tokens", 1, "triton")),
        least("match at batch 256, beside the reference in a graph", 5, over("match_tokens", 256, triton, plain)),
        least("match at batch 1, beside the reference in a graph", 10, over("match_tokens", 1, triton, plain)),
        least("merge: share of copy bandwidth", 0.8, copied("merge_tokens")),
        least("CALIP beside the compiled formula", 3, over("calip_logits", 256, triton, ("literal_compiled",))),
        least("affinity to 16,000 rows, beside two products", 2, over("affinity", 256, triton, literal)),
        least("Dense() beside the host, batch 64 and 256", 1.15, dense(towers, HOST)),
        least("Dense() beside the host under max-autotune", 1.0, dense(towers, f"{HOST}, compiled max-autotune")),
    ]
    for batch, asked in ((256, 0.95), (32, 0.9)):
        efficient = least(f"η of reduced towers, batch {batch}", asked, efficiencies(towers, batch))
        found.append(efficient._replace(without=unmeasured(towers, (batch,))))
    beside = least("reduced towers beside the best dense, batch 1, 32 and 256", 1.0, speedups(towers))
    found += [
        least("reduced beside dense at batch 1, each from its graph", 1.15, beside_graph(towers)),
        least("reduced towers beside the host's own forward, batch 1", 1.5, beside_host(towers)),
        beside._replace(without=unmeasured(towers, (1, 32, 256))),
        least("beside the same in plain PyTorch, batch 256", 1.25, beside_plain(towers, (256,))),
        least("beside the same in plain PyTorch, batch 1 and 8", 2.0, beside_plain(towers, (1, 8))),
    ]
    return found


def most(what: str, asked: float, came: dict[str, float]) -> Target:
    """A target that larger figures miss."""
    return Target(what, f"≤ {asked:g}", lambda value: value <= asked, came)


def least(what: str, asked: float, came: dict[str, float]) -> Target:
    """A target that smaller figures miss."""
    return Target(what, f"≥ {asked:g}", lambda value: value >= asked, came)


def reduced(row: Row) -> bool:
    """Whether a row is of a method that lets tokens go."""
    return row["tokens"][-1] < row["tokens"][0]


def method_of(row: Row) -> str:
    """A variant's method, without how it runs."""
    return row["variant"].partition(", ")[0]


def way_of(row: Row) -> str:
    """How a variant runs: eager, plain, from a graph or compiled in a mode."""
    return row["variant"].partition(", ")[2] or "eager"


def grouped(rows: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows by model and batch, in order."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["batch"]), []).append(row)
    return found


def speeds(rows: Sequence[Row]) -> list[Best]:
    """Every row of one model and batch, with its speed-up over the host's own forward in its run, from a graph where
    every run has that; no peer's."""
    rows = [row for row in rows if row["run"] != PEER]
    by_name = {(row["run"], row["variant"]): row["speedup"] for row in rows}
    graph, found = f"{HOST}, graph", []
    unit = graph if all((row["run"], graph) in by_name for row in rows) else HOST
    for row in rows:
        if (row["run"], unit) in by_name and not row["variant"].endswith(" again"):
            found.append(Best(row, row["speedup"] / by_name[row["run"], unit]))
    return found


def fastest(rows: Sequence[Row]) -> dict[str, Best]:
    """Each method's fastest way, of one model and batch; its plain PyTorch form is none of ours."""
    found: dict[str, Best] = {}
    for best in speeds(rows):
        name = method_of(best.row)
        if not way_of(best.row).startswith("plain") and (name not in found or best.speed > found[name].speed):
            found[name] = best
    return found


def base(rows: Sequence[Row]) -> Best | None:
    """The fastest dense variant of one model and batch that was measured, ours or the host's; None without any."""
    return max((best for best in speeds(rows) if not reduced(best.row)), key=lambda best: best.speed, default=None)


def unmeasured(towers: Sequence[Row], batches: Sequence[int]) -> dict[str, str]:
    """The dense variants that the best one was not compared with, by tower and batch: the host under the compiler."""
    found = {}
    for (model, batch), rows in grouped(towers).items():
        measured = {best.row["variant"] for best in speeds(rows)}
        missing = [mode for mode in MODES if f"{HOST}, compiled {mode}" not in measured]
        if batch in batches and missing and any(map(reduced, rows)):
            found[f"{model} b{batch}"] = " and ".join(missing)
    return found


def beside_dense(towers: Sequence[Row]) -> Iterator[tuple[str, int, str, Best, Best]]:
    """Model, batch and name of every method that reduces, its fastest way and the fastest dense variant there."""
    for (model, batch), rows in grouped(towers).items():
        full = base(rows)
        for name, best in fastest(rows).items():
            if full is not None and reduced(best.row):
                yield model, batch, name, best, full


def beside_graph(towers: Sequence[Row]) -> dict[str, float]:
    """Speed-up of each method at batch 1 over the faster of the host and `Dense()`, all from CUDA graphs."""
    found = {}
    for (model, batch), rows in grouped(towers).items():
        graphs = [best for best in speeds(rows) if way_of(best.row) == "graph"]
        dense = max((best.speed for best in graphs if not reduced(best.row)), default=0.0)
        if batch == 1 and dense:
            for best in graphs:
                if reduced(best.row):
                    name = f"{model} {method_of(best.row)}"
                    found[name] = max(best.speed / dense, found.get(name, 0.0))
    return found


def beside_host(towers: Sequence[Row]) -> dict[str, float]:
    """Speed-up of each method's fastest way at batch 1 over the host's own forward from Python."""
    found = {}
    for (model, batch), rows in grouped(towers).items():
        own = {best.row["variant"]: best.speed for best in speeds(rows)}
        for name, best in fastest(rows).items():
            if batch == 1 and HOST in own and reduced(best.row):
                found[f"{model} {name}"] = best.speed / own[HOST]
    return found


def efficiencies(towers: Sequence[Row], batch: int) -> dict[str, float]:
    """η of each method's fastest way against the fastest dense variant, by model and method."""
    return {
        f"{model} {name}": best.speed / full.speed * best.row["gmacs_run"] / full.row["gmacs_run"]
        for model, here, name, best, full in beside_dense(towers)
        if here == batch
    }


def speedups(towers: Sequence[Row]) -> dict[str, float]:
    """How many times faster each method's fastest way is than the fastest dense variant."""
    return {
        f"{model} {name} b{batch}": best.speed / full.speed
        for model, batch, name, best, full in beside_dense(towers)
        if batch in (1, 32, 256)
    }


def dense(towers: Sequence[Row], other: str) -> dict[str, float]:
    """How many times faster Dense() is than another dense variant at batch 64 and 256, in any way but plain PyTorch."""
    found = {}
    for (model, batch), rows in grouped(towers).items():
        ours = fastest(rows).get("Dense()")
        theirs = [best.speed for best in speeds(rows) if best.row["variant"] == other]
        if batch in (64, 256) and ours is not None and theirs:
            found[f"{model} b{batch}"] = ours.speed / max(theirs)
    return found


def beside_plain(towers: Sequence[Row], batches: Sequence[int]) -> dict[str, float]:
    """How many times faster a method is than its plan in plain PyTorch, both from Python and in one run."""
    found = {}
    for (model, batch), rows in grouped(towers).items():
        by_name = {(row["run"], row["variant"]): row["speedup"] for row in rows if reduced(row)}
        for (run, variant), speed in by_name.items():
            if batch in batches and (run, f"{variant}, plain") in by_name:
                found[f"{model} {variant} b{batch}"] = speed / by_name[run, f"{variant}, plain"]
    return found
