"""Paired timing: every variant runs once per round, in random order, and ratios are taken inside rounds.

Whatever slows a machine down for a second then slows all variants of that round, and cancels. The one figure is the
reduction efficiency η = (t_dense / t_reduced) ÷ (GMACs_dense / GMACs_reduced): 1 when every saved operation became
saved time.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from clipkernels.adapters import Tower, outputs_only_cls
from clipkernels.methods import Dense, Method
from clipkernels.patching import patch, tower_of
from clipkernels.plan import Plan

Clock = Literal["wall", "process"]
HOST = "dense (host)"
"""The host library's own forward among variants."""


class Band(NamedTuple):
    """A median and the quantiles around it."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Times:
    """Seconds of every variant in every round."""

    seconds: Mapping[str, Sequence[float]]

    def of(self, name: str) -> Band:
        """Median seconds with the 20 % and 80 % quantiles."""
        return _band(self.seconds[name], 0.2)

    def ratio(self, name: str, against: str) -> Band:
        """How many times faster `name` was than `against`: the median over rounds, with its 10-90 % band."""
        pairs = zip(self.seconds[against], self.seconds[name], strict=True)
        return _band([slow / fast for slow, fast in pairs], 0.1)

    def fastest(self, names: Iterable[str]) -> str:
        """The name with the smallest median, the first of equals."""
        return min(names, key=lambda name: self.of(name).median)


class Speed(NamedTuple):
    """One variant of a tower: what it costs on paper and what it took.

    `gmacs` and `ideal` count the published schedule, `gmacs_run` what ran (the last block for the CLS row alone, where
    that was enough); seconds are per batch; `speedup` and `efficiency` are against `baseline`, the fastest dense.
    """

    name: str
    tokens: tuple[int, ...]
    gmacs: float
    gmacs_run: float
    ideal: float
    seconds: Band
    images_per_second: float
    speedup: Band
    efficiency: Band
    baseline: str

    def record(self) -> dict[str, Any]:
        """The row as plain numbers."""
        bands = (
            ("milliseconds", [1e3 * value for value in self.seconds], ("", "_p20", "_p80")),
            ("speedup", self.speedup, ("", "_p10", "_p90")),
            ("efficiency", self.efficiency, ("", "_p10", "_p90")),
        )
        return {
            "variant": self.name,
            "tokens": self.tokens,
            "gmacs": round(self.gmacs, 5),
            "gmacs_run": round(self.gmacs_run, 5),
            "ideal_speedup": round(self.ideal, 4),
            "images_per_second": round(self.images_per_second, 3),
            "baseline": self.baseline,
            **{
                name + part: round(value, 4)
                for name, band, parts in bands
                for part, value in zip(parts, band, strict=True)
            },
        }


def measure(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    seed: int = 0,
    clock: Clock = "wall",
    progress: Callable[[], object] | None = None,
) -> Times:
    """Seconds per variant and round, all variants interleaved in a random order that changes every round.

    Args:
        variants: what to time, by name; work left on a GPU is waited for.
        rounds: timed runs of every variant.
        warmup: untimed rounds before them.
        seed: of the orders.
        clock: "wall", or "process": CPU time, which stays honest on shared machines, of one thread.
        progress: called after every run, (warmup + rounds) · variants times.
    Raises:
        ValueError: no variants, fewer than one round, an unknown clock, or the process clock with several threads,
            whose CPU times add up.
    """
    if not variants or rounds < 1:
        raise ValueError(f"expected at least one variant and one round, got {len(variants)} and {rounds}")
    if clock not in ("wall", "process"):
        raise ValueError(f'clock must be "wall" or "process", got {clock!r}')
    if clock == "process" and torch.get_num_threads() != 1:
        raise ValueError(f'clock="process" needs torch.set_num_threads(1), got {torch.get_num_threads()} threads')
    now = time.perf_counter if clock == "wall" else time.process_time
    order, names = random.Random(seed), list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for done in range(warmup + rounds):
        order.shuffle(names)
        for name in names:
            _synchronize()
            start = now()
            variants[name]()
            _synchronize()
            if done >= warmup:
                seconds[name].append(now() - start)
            if progress is not None:
                progress()
    return Times(seconds)


def efficiency(speedup: float, gmacs_dense: float, gmacs_reduced: float) -> float:
    """η of a speed-up, the GMACs being those that each side ran."""
    return speedup * gmacs_reduced / gmacs_dense


class Variant(NamedTuple):
    """One way to encode images: what to call, the method whose plan it follows, and whether its last block runs for
    the CLS row alone."""

    encode: Callable[[Tensor], object]
    method: Method
    exact: bool


def vary(model: nn.Module, methods: Mapping[str, Method | None]) -> dict[str, Variant]:
    """One copy of the model per method, patched, or left as the host library has it for None; all share its weights."""
    made = {}
    for name, method in methods.items():
        memo = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        twin: Any = copy.deepcopy(model, memo)
        if method is not None:
            patch(twin, method)
        tower = tower_of(twin)
        exact = method is not None and outputs_only_cls(tower)
        made[name] = Variant(tower.encode, method or Dense(), exact)
    return made


def time_variants(
    variants: Mapping[str, Variant],
    batches: Sequence[Tensor],
    rounds: int,
    warmup: int = 1,
    seed: int = 0,
    clock: Clock = "wall",
    progress: Callable[[], object] | None = None,
) -> Times:
    """Seconds that each variant takes for a batch, paired.

    Args:
        variants: what encodes, by name.
        batches: images (B,3,S,S) of one size, used in turn so that they do not sit in cache.
        rounds, warmup, seed, clock, progress: as in `measure`.
    """

    def runner(encode: Callable[[Tensor], object]) -> Callable[[], object]:
        turn = cycle(batches)
        return lambda: encode(next(turn))

    with torch.inference_mode():
        calls = {name: runner(variant.encode) for name, variant in variants.items()}
        return measure(calls, rounds, warmup, seed, clock, progress)


def tabulate(
    times: Times, variants: Mapping[str, Variant], tower: Tower, batch: int, baseline: str | None = None
) -> list[Speed]:
    """One row per variant, in order.

    Args:
        times: of every variant.
        variants: at least one with the method Dense(), or a baseline.
        tower: the geometry they share, from `tower_of`.
        batch: images per batch.
        baseline: what speed-ups are against; None is the fastest of the variants whose method is Dense().
    Raises:
        ValueError: no dense variant to choose.
    """
    dense = [name for name, variant in variants.items() if isinstance(variant.method, Dense)]
    if baseline is None and not dense:
        raise ValueError(f"expected a dense variant among {', '.join(variants)}, got none")
    baseline = baseline or times.fastest(dense)
    plans = {name: plan_for(tower, variant.method) for name, variant in variants.items()}
    ran = {name: gmacs_for(tower, plan, variants[name].exact) for name, plan in plans.items()}
    full = gmacs_for(tower, plan_for(tower, Dense()))
    table = []
    for name, plan in plans.items():
        seconds, ratio = times.of(name), times.ratio(name, baseline)
        gains = (efficiency(value, ran[baseline], ran[name]) for value in ratio)
        table.append(
            Speed(
                name=name,
                tokens=plan.tokens,
                gmacs=gmacs_for(tower, plan),
                gmacs_run=ran[name],
                ideal=full / gmacs_for(tower, plan),
                seconds=seconds,
                images_per_second=batch / seconds.median,
                speedup=ratio,
                efficiency=Band(*gains),
                baseline=baseline,
            )
        )
    return table


def plan_for(tower: Tower, method: Method) -> Plan:
    """The method's plan for a tower."""
    return method.plan(tokens=tower.num_tokens, blocks=len(tower.blocks), prefix=tower.prefix)


def gmacs_for(tower: Tower, plan: Plan, exact: bool = False) -> float:
    """The plan's GMACs on a tower."""
    return plan.gmacs(tower.width, tower.patch, tower.out, exact, tower.mlp_ratio)


def _band(values: Sequence[float], tail: float) -> Band:
    """The median with the `tail` and 1 - `tail` quantiles, interpolated linearly."""
    ordered = sorted(values)

    def quantile(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    return Band(statistics.median(ordered), quantile(tail), quantile(1 - tail))


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
