"""Targets for one H200 in bf16 (operations, dense and reduced towers), compared with rows of measurements.

Towers are compared by their speed-up over the host's own forward, paired within the rounds of their run. Every run
measures that forward, so variants of different runs are comparable. If every run also timed it from a CUDA graph, that
time is the baseline, because Python's launch time differs between processes. η is relative to the fastest measured
dense variant; `Target.unmeasured` names the compiler modes in which the host was not measured.
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
    """A target and its measurements.

    name: the measured quantity.
    bound: the required value, as text.
    is_met: returns true for a figure that meets the bound.
    figures: the measured figures by tower or shape.
    unmeasured: compiler modes in which the host was not measured, by tower and batch.
    """

    name: str
    bound: str
    is_met: Callable[[float], bool]
    figures: dict[str, float]
    unmeasured: Mapping[str, str] = MappingProxyType({})


class Measurement(NamedTuple):
    """A row of a tower, and its speed-up over the host's own forward, called from Python or replayed from a graph."""

    row: Row
    speed: float


def targets(ops: Sequence[Row], towers: Sequence[Row]) -> list[Target]:
    """Return every target, in order."""

    def times(op: str, batch: int, *variants: str) -> dict[str, float]:
        """Return the µs of the fastest of some variants, by tower."""
        fastest: dict[str, float] = {}
        for row in ops:
            if (row["op"], row["batch"]) == (op, batch) and row["variant"] in variants:
                fastest[row["tower"]] = min(row["microseconds"], fastest.get(row["tower"], math.inf))
        return fastest

    def over(op: str, batch: int, ours: Sequence[str], others: Sequence[str]) -> dict[str, float]:
        """Return the speed-up of our fastest variant over the fastest of the others, by tower."""
        mine, theirs = times(op, batch, *ours), times(op, batch, *others)
        return {f"{tower} b{batch}": theirs[tower] / mine[tower] for tower in mine if tower in theirs}

    def beside_sdpa(op: str) -> dict[str, float]:
        """Return the time of the faster of our forms over the time of SDPA, by tower."""
        return {name: 1 / value for name, value in over(op, 256, ("auto", "triton"), ("sdpa",)).items()}

    def copied(op: str) -> dict[str, float]:
        """Return the share of a copy's bandwidth that our kernel reaches at batch 64 and 256."""
        ours = [row for row in ops if (row["op"], row["variant"]) == (op, "triton") and row["batch"] in (64, 256)]
        return {f"{row['tower']} b{row['batch']:.0f}": row["of_copy"] for row in ours}

    triton, plain, literal = ("triton",), ("reference",), ("literal", "literal_compiled")
    result = [
        at_most("attention and CLS row: time over SDPA without the row", 1.03, beside_sdpa("attention_cls")),
        at_most(
            "attention and CLS row with sizes: time over SDPA with sizes", 1.03, beside_sdpa("attention_cls_sized")
        ),
        at_most("attention and received attention: time over SDPA", 1.15, beside_sdpa("attention_received")),
        at_least("prune: share of copy bandwidth", 0.85, copied("prune_tokens")),
        at_least("prune, fuse and norm: share of copy bandwidth", 0.85, copied("prune_tokens_heads_fuse_norm")),
        at_most("prune at batch 1 in a graph: µs", 6, times("prune_tokens", 1, "triton")),
        at_least(
            "match at batch 256: speed-up over the reference in a graph", 5, over("match_tokens", 256, triton, plain)
        ),
        at_least(
            "match at batch 1: speed-up over the reference in a graph", 10, over("match_tokens", 1, triton, plain)
        ),
        at_least("merge: share of copy bandwidth", 0.8, copied("merge_tokens")),
        at_least(
            "CALIP: speed-up over the compiled formula", 3, over("calip_logits", 256, triton, ("literal_compiled",))
        ),
        at_least("affinity to 16,000 rows: speed-up over two products", 2, over("affinity", 256, triton, literal)),
        at_least("Dense() at batch 64 and 256: speed-up over the host", 1.15, dense(towers, HOST)),
        at_least(
            "Dense() at batch 64 and 256: speed-up over the host under max-autotune",
            1.0,
            dense(towers, f"{HOST}, compiled max-autotune"),
        ),
    ]
    for batch, bound in ((256, 0.95), (32, 0.9)):
        efficient = at_least(f"η of reduced towers, batch {batch}", bound, efficiencies(towers, batch))
        result.append(efficient._replace(unmeasured=unmeasured(towers, (batch,))))
    speedup = at_least("reduced towers at batch 1, 32 and 256: speed-up over the best dense", 1.0, speedups(towers))
    result += [
        at_least("reduced towers at batch 1: speed-up over dense, both from graphs", 1.15, beside_graph(towers)),
        at_least("reduced towers at batch 1: speed-up over the host's own forward", 1.5, beside_host(towers)),
        speedup._replace(unmeasured=unmeasured(towers, (1, 32, 256))),
        at_least(
            "reduced towers at batch 256: speed-up over the same plan in plain PyTorch",
            1.25,
            beside_plain(towers, (256,)),
        ),
        at_least(
            "reduced towers at batch 1 and 8: speed-up over the same plan in plain PyTorch",
            2.0,
            beside_plain(towers, (1, 8)),
        ),
    ]
    return result


def at_most(name: str, bound: float, figures: dict[str, float]) -> Target:
    """Return a target that larger figures miss."""
    return Target(name, f"≤ {bound:g}", lambda value: value <= bound, figures)


def at_least(name: str, bound: float, figures: dict[str, float]) -> Target:
    """Return a target that smaller figures miss."""
    return Target(name, f"≥ {bound:g}", lambda value: value >= bound, figures)


def is_reduced(row: Row) -> bool:
    """Return true if the row is of a method that reduces tokens."""
    return row["tokens"][-1] < row["tokens"][0]


def method_of(row: Row) -> str:
    """Return a variant's method, without its way of running."""
    return row["variant"].partition(", ")[0]


def way_of(row: Row) -> str:
    """Return a variant's way of running: eager, plain, graph, or compiled with its mode."""
    return row["variant"].partition(", ")[2] or "eager"


def grouped(rows: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    """Return rows by model and batch, in order."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["batch"]), []).append(row)
    return groups


def speeds(rows: Sequence[Row]) -> list[Measurement]:
    """Return the rows of one model and batch, without peers, each with its speed-up over the host's forward of its run.

    The host's forward is the one from a graph if every run has it, else the one called from Python.
    """
    rows = [row for row in rows if row["run"] != PEER]
    by_name = {(row["run"], row["variant"]): row["speedup"] for row in rows}
    graph, measurements = f"{HOST}, graph", []
    unit = graph if all((row["run"], graph) in by_name for row in rows) else HOST
    for row in rows:
        if (row["run"], unit) in by_name and not row["variant"].endswith(" again"):
            measurements.append(Measurement(row, row["speedup"] / by_name[row["run"], unit]))
    return measurements


def fastest(rows: Sequence[Row]) -> dict[str, Measurement]:
    """Return the fastest measurement of each method, of one model and batch, leaving out its plain PyTorch form."""
    by_method: dict[str, Measurement] = {}
    for measurement in speeds(rows):
        name = method_of(measurement.row)
        if not way_of(measurement.row).startswith("plain") and (
            name not in by_method or measurement.speed > by_method[name].speed
        ):
            by_method[name] = measurement
    return by_method


def base(rows: Sequence[Row]) -> Measurement | None:
    """Return the fastest measured dense variant of one model and batch, ours or the host's; None without any."""
    dense_ones = (measurement for measurement in speeds(rows) if not is_reduced(measurement.row))
    return max(dense_ones, key=lambda measurement: measurement.speed, default=None)


def unmeasured(towers: Sequence[Row], batches: Sequence[int]) -> dict[str, str]:
    """Return the compiler modes in which the host was not measured, by tower and batch.

    The host compiled in such a mode may be faster than the best measured dense variant.
    """
    result = {}
    for (model, batch), rows in grouped(towers).items():
        measured = {best.row["variant"] for best in speeds(rows)}
        missing = [mode for mode in MODES if f"{HOST}, compiled {mode}" not in measured]
        if batch in batches and missing and any(map(is_reduced, rows)):
            result[f"{model} b{batch}"] = " and ".join(missing)
    return result


def beside_dense(towers: Sequence[Row]) -> Iterator[tuple[str, int, str, Measurement, Measurement]]:
    """Yield model, batch and name of every reducing method, its fastest measurement and the fastest dense one there."""
    for (model, batch), rows in grouped(towers).items():
        dense_best = base(rows)
        for name, best in fastest(rows).items():
            if dense_best is not None and is_reduced(best.row):
                yield model, batch, name, best, dense_best


def beside_graph(towers: Sequence[Row]) -> dict[str, float]:
    """Return the speed-up of each method at batch 1 over the faster of the host and `Dense()`, all from CUDA graphs."""
    result = {}
    for (model, batch), rows in grouped(towers).items():
        graphs = [best for best in speeds(rows) if way_of(best.row) == "graph"]
        dense_speed = max((best.speed for best in graphs if not is_reduced(best.row)), default=0.0)
        if batch == 1 and dense_speed:
            for best in graphs:
                if is_reduced(best.row):
                    name = f"{model} {method_of(best.row)}"
                    result[name] = max(best.speed / dense_speed, result.get(name, 0.0))
    return result


def beside_host(towers: Sequence[Row]) -> dict[str, float]:
    """Return the speed-up of each method's fastest variant at batch 1 over the host's forward called from Python."""
    result = {}
    for (model, batch), rows in grouped(towers).items():
        by_variant = {best.row["variant"]: best.speed for best in speeds(rows)}
        for name, best in fastest(rows).items():
            if batch == 1 and HOST in by_variant and is_reduced(best.row):
                result[f"{model} {name}"] = best.speed / by_variant[HOST]
    return result


def efficiencies(towers: Sequence[Row], batch: int) -> dict[str, float]:
    """Return η of each method's fastest way against the fastest dense variant, by model and method."""
    return {
        f"{model} {name}": best.speed / full.speed * best.row["gmacs_run"] / full.row["gmacs_run"]
        for model, row_batch, name, best, full in beside_dense(towers)
        if row_batch == batch
    }


def speedups(towers: Sequence[Row]) -> dict[str, float]:
    """Return the speed-up of each method's fastest variant over the fastest dense variant, at batch 1, 32 and 256."""
    return {
        f"{model} {name} b{batch}": best.speed / full.speed
        for model, batch, name, best, full in beside_dense(towers)
        if batch in (1, 32, 256)
    }


def dense(towers: Sequence[Row], other: str) -> dict[str, float]:
    """Return the speed-up of `Dense()`, except in plain PyTorch, over another dense variant at batch 64 and 256."""
    result = {}
    for (model, batch), rows in grouped(towers).items():
        ours = fastest(rows).get("Dense()")
        theirs = [best.speed for best in speeds(rows) if best.row["variant"] == other]
        if batch in (64, 256) and ours is not None and theirs:
            result[f"{model} b{batch}"] = ours.speed / max(theirs)
    return result


def beside_plain(towers: Sequence[Row], batches: Sequence[int]) -> dict[str, float]:
    """Return the speed-up of a method over the same plan in plain PyTorch, both eager and in the same run."""
    result = {}
    for (model, batch), rows in grouped(towers).items():
        by_name = {(row["run"], row["variant"]): row["speedup"] for row in rows if is_reduced(row)}
        for (run, variant), speed in by_name.items():
            if batch in batches and (run, f"{variant}, plain") in by_name:
                result[f"{model} {variant} b{batch}"] = speed / by_name[run, f"{variant}, plain"]
    return result
