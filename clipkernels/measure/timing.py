"""Paired timing: every variant runs once per round, in random order, and ratios are computed within rounds.

A slowdown of the machine then affects all variants of a round and cancels in their ratios. The main figure is the
reduction efficiency η = (t_dense / t_reduced) ÷ (GMACs_dense / GMACs_reduced); it is 1 if time falls in proportion to
the operations.
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
"""The name of the variant that is the host library's own forward."""


class Band(NamedTuple):
    """A median, and a lower and an upper quantile."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Times:
    """Seconds of every variant in every round, by the variant's name."""

    seconds: Mapping[str, Sequence[float]]

    def of(self, name: str) -> Band:
        """Return the median seconds with the 20 % and 80 % quantiles."""
        return _band(self.seconds[name], 0.2)

    def ratio(self, name: str, against: str) -> Band:
        """Return the speed-up of `name` over `against`: the median over rounds, with the 10 % and 90 % quantiles."""
        pairs = zip(self.seconds[against], self.seconds[name], strict=True)
        return _band([slow / fast for slow, fast in pairs], 0.1)

    def fastest(self, names: Iterable[str]) -> str:
        """Return the name with the smallest median; of equal ones the first."""
        return min(names, key=lambda name: self.of(name).median)


class Speed(NamedTuple):
    """One variant of a tower: computed cost and measured speed.

    `gmacs` and `ideal` count the published schedule. `gmacs_run` counts the operations that ran: if only the CLS row is
    output, the last block runs only for that row. Seconds are per batch; `speedup` and `efficiency` are relative to
    `baseline`, the fastest dense variant. `images_per_second` is that of the baseline, from its median seconds, times
    `speedup`.
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
        """Return the row as plain numbers, by column."""
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
    """Measure seconds per variant and round, with all variants interleaved in a new random order every round.

    Args:
        variants: functions to time, by name. A GPU is synchronised before and after every call.
        rounds: number of timed runs of every variant.
        warmup: number of untimed rounds before them.
        seed: seed of the random orders.
        clock: "wall", or "process": CPU time of one thread, which other processes of a shared machine do not affect.
        progress: called after every run, (warmup + rounds) · variants times.
    Raises:
        ValueError: there is no variant, `rounds` is less than one, the clock is unknown, or the process clock runs with
            several threads, whose CPU times add up.
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
    for number in range(warmup + rounds):
        order.shuffle(names)
        for name in names:
            _synchronize()
            start = now()
            variants[name]()
            _synchronize()
            if number >= warmup:
                seconds[name].append(now() - start)
            if progress is not None:
                progress()
    return Times(seconds)


def efficiency(speedup: float, gmacs_dense: float, gmacs_reduced: float) -> float:
    """Return η of a speed-up; the GMACs are those that each side ran."""
    return speedup * gmacs_reduced / gmacs_dense


class Variant(NamedTuple):
    """One way to encode images.

    encode: encodes a batch (B,3,S,S).
    method: the method whose plan it follows.
    exact: true if the last block runs only for the CLS row.
    """

    encode: Callable[[Tensor], object]
    method: Method
    exact: bool


def vary(
    model: nn.Module,
    methods: Mapping[str, Method | None],
    prepare: Callable[[nn.Module], object] | None = None,
) -> dict[str, Variant]:
    """Return one copy of the model per method, patched, or unpatched for None; all copies share its weights.

    Each is given to `prepare` once it is patched.
    """
    variants = {}
    for name, method in methods.items():
        memo = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        clone: Any = copy.deepcopy(model, memo)
        if method is not None:
            patch(clone, method)
        if prepare is not None:
            prepare(clone)
        tower = tower_of(clone)
        exact = method is not None and outputs_only_cls(tower)
        variants[name] = Variant(tower.encode, method or Dense(), exact)
    return variants


def time_variants(
    variants: Mapping[str, Variant],
    batches: Sequence[Tensor],
    rounds: int,
    warmup: int = 1,
    seed: int = 0,
    clock: Clock = "wall",
    progress: Callable[[], object] | None = None,
) -> Times:
    """Measure the seconds per batch of each variant, paired.

    Args:
        variants: variants of one tower, by name.
        batches: images (B,3,S,S) of one size, used in turn so that they do not stay in cache.
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
    """Return one row per variant, in order.

    Args:
        times: times of every variant.
        variants: variants by name; without a baseline at least one has the method Dense().
        tower: the tower whose geometry they share, from `tower_of`.
        batch: images per batch.
        baseline: name of the variant that speed-ups are relative to; None is the fastest whose method is Dense().
    Raises:
        ValueError: there is neither a baseline nor a dense variant.
    """
    dense = [name for name, variant in variants.items() if isinstance(variant.method, Dense)]
    if baseline is None and not dense:
        raise ValueError(f"expected a dense variant among {', '.join(variants)}, got none")
    baseline = baseline or times.fastest(dense)
    plans = {name: plan_for(tower, variant.method) for name, variant in variants.items()}
    ran = {name: gmacs_for(tower, plan, variants[name].exact) for name, plan in plans.items()}
    full = gmacs_for(tower, plan_for(tower, Dense()))
    # From the paired ratio, because a rate from each row's own median need not agree with the speed-up.
    dense_rate = batch / times.of(baseline).median
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
                images_per_second=dense_rate * ratio.median,
                speedup=ratio,
                efficiency=Band(*gains),
                baseline=baseline,
            )
        )
    return table


def plan_for(tower: Tower, method: Method) -> Plan:
    """Return the method's plan for a tower."""
    return method.plan(tokens=tower.num_tokens, blocks=len(tower.blocks), prefix=tower.prefix)


def gmacs_for(tower: Tower, plan: Plan, exact: bool = False) -> float:
    """Return the plan's GMACs per image on a tower; with `exact` the last block runs only for the CLS row."""
    return plan.gmacs(tower.width, tower.patch, tower.out, exact, tower.mlp_ratio)


def _band(values: Sequence[float], tail: float) -> Band:
    """Return the median with the `tail` and 1 - `tail` quantiles, interpolated linearly."""
    ordered = sorted(values)

    def quantile(share: float) -> float:
        position = share * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])

    return Band(statistics.median(ordered), quantile(tail), quantile(1 - tail))


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
