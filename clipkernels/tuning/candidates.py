"""Plans to try: the published schedules, the frontier of the additive model, and the neighbours of a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from clipkernels.adapters import Tower, outputs_only_cls
from clipkernels.method_names import short_name
from clipkernels.methods import TCA, Dense, EViT, Method, ToMe
from clipkernels.plan import Condense, Merge, Plan, Prune, Step
from clipkernels.tuning.effects import Curve, Family

KEEPS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4)
RATES = (0.035, 0.05, 0.07, 0.1, 0.15)
MOST_MERGES = 16
"""Published schedules of ToMe of each kind, evenly spaced up to the largest r."""


class Geometry(NamedTuple):
    """The numbers of a tower that plans depend on.

    last: index after the last block that may have a step: the tower's last block runs for CLS alone if only that is
        read, and ignores a step.
    """

    entry: int
    prefix: int
    blocks: int
    last: int
    by_cls: bool

    @classmethod
    def of(cls, tower: Tower) -> Geometry:
        """The geometry of a tower."""
        blocks = len(tower.blocks)
        last = blocks - outputs_only_cls(tower)
        return cls(tower.num_tokens, tower.prefix, blocks, last, tower.pools_cls)

    def plan(self, steps: Sequence[Step | None]) -> Plan:
        """The plan of steps, without those that do nothing, ranked by the signal that the tower has."""
        tokens, kept = self.entry, []
        for block, step in enumerate(steps):
            after = tokens if step is None or block >= self.last else step.leaves(tokens, self.prefix)
            kept.append(step if after < tokens else None)
            tokens = after
        plan = Plan(tuple(kept), self.entry, self.prefix)
        return plan if self.by_cls else plan.ranked_by("received")


def published(geometry: Geometry, count: int | None = None) -> dict[Plan, str]:
    """The names of the published schedules, by plan: Dense, ToMe constant and decreasing, EViT and TCA.

    Args:
        geometry: the tower.
        count: the most schedules; then every kind is thinned out evenly. None for all.
    """
    patches = geometry.entry - geometry.prefix
    most = max(1, patches // geometry.blocks)
    rs = list(dict.fromkeys(max(1, round(most * (at + 1) / MOST_MERGES)) for at in range(MOST_MERGES)))
    kinds: list[list[Method]] = [
        [ToMe(r) for r in rs],
        [ToMe(r, inflect=-1) for r in rs],
        [EViT(keep) for keep in KEEPS],
        [TCA(rate) for rate in RATES],
    ]
    stride = 1 if count is None else max(1, math.ceil(sum(map(len, kinds)) / max(1, count - 1)))
    plans: dict[Plan, str] = {}
    for method in [Dense(), *(method for kind in kinds for method in kind[::-1][::stride])]:
        try:
            plan = method.plan(geometry.entry, geometry.blocks, geometry.prefix)
        except ValueError:  # a rate that leaves a block nothing to condense
            continue
        plans.setdefault(geometry.plan(plan.steps), short_name(method))
    return plans


def model_frontier(
    geometry: Geometry,
    family: Family,
    curves: Mapping[int, Curve],
    block_cost: Callable[[int, int, int], float],
    slopes: Sequence[float],
) -> list[Plan]:
    """The plans of one family that minimise modelled damage + slope · cost, one for each slope, without repetitions.

    Args:
        geometry: the tower.
        family: the kind of all steps.
        curves: the effects, by block.
        block_cost: of a block, by its index and the numbers of tokens before and after its step.
        slopes: damage per unit of cost.
    """
    options = {block: _options(geometry, family, block, curves) for block in range(geometry.blocks)}
    plans = []
    for slope in slopes:
        best: dict[int, tuple[float, tuple[int, ...]]] = {geometry.entry: (0.0, ())}
        for block in range(geometry.blocks):
            following: dict[int, tuple[float, tuple[int, ...]]] = {}
            for before, (total, path) in best.items():
                for after in options[block](before):
                    damage = curves[block](after) - curves[block](before) if after < before else 0.0
                    value = total + damage + slope * block_cost(block, before, after)
                    if after not in following or value < following[after][0]:
                        following[after] = value, (*path, after)
            best = following
        _, path = min(best.values())
        plans.append(plan_of_counts(geometry, family, path))
    return list(dict.fromkeys(plans))


def _options(
    geometry: Geometry, family: Family, block: int, curves: Mapping[int, Curve]
) -> Callable[[int], Iterator[int]]:
    """The numbers of tokens that a block may leave, as a function of those that enter it."""
    stride = max(1, geometry.entry // 100)

    def after(before: int) -> Iterator[int]:
        yield before
        if block < geometry.last and block in curves:
            for left in range(before - stride, geometry.prefix + 1, -stride):
                if family.step(before, left, geometry.prefix) is not None:
                    yield left

    return after


def plan_of_counts(geometry: Geometry, family: Family, counts: Sequence[int]) -> Plan:
    """The plan whose blocks leave these numbers of tokens, by steps of one family."""
    steps, before = [], geometry.entry
    for after in counts:
        steps.append(family.step(before, after, geometry.prefix) if after < before else None)
        before = after
    return geometry.plan(steps)


def neighbours(geometry: Geometry, plan: Plan, size: int) -> list[Plan]:
    """The plans that differ from one in `size` tokens of one block, or that move `size` tokens between two blocks.

    A block without a step gets one of the kind of the nearest block that has one.
    """
    removed = [before - after for before, after in pairwise(plan.tokens)]
    moves: list[dict[int, int]] = []
    for block in range(geometry.last):
        moves += [{block: size}, {block: -size}]
        moves += [{block: size, other: -size} for other in range(geometry.last) if other != block]
    plans = []
    for move in moves:
        counts = [count + move.get(block, 0) for block, count in enumerate(removed)]
        changed = _with_removed(geometry, plan, counts) if min(counts) >= 0 else None
        if changed is not None and changed != plan:
            plans.append(changed)
    return list(dict.fromkeys(plans))


def with_proportional(plan: Plan, proportional: bool) -> Plan:
    """The plan with all its merges proportional, or none."""
    steps = tuple(Merge(step.r, proportional) if isinstance(step, Merge) else step for step in plan.steps)
    return Plan(steps, plan.entry, plan.prefix)


def with_step_of(geometry: Geometry, plan: Plan, block: int, family: Family) -> Plan | None:
    """The plan with the step of one block replaced by one of another family that leaves as many tokens, or None."""
    before, after = plan.tokens[block], plan.tokens[block + 1]
    step = family.step(before, after, plan.prefix) if after < before else None
    if step is None or step == plan.steps[block]:
        return None
    if isinstance(step, Merge) and any(isinstance(other, Merge) for other in plan.steps):
        step = Merge(step.r, plan.proportional)
    return geometry.plan([*plan.steps[:block], step, *plan.steps[block + 1 :]])


def _with_removed(geometry: Geometry, plan: Plan, counts: Sequence[int]) -> Plan | None:
    """A plan with the kinds of steps of another, whose blocks remove these numbers of tokens; None if they cannot."""
    kinds = [(block, step) for block, step in enumerate(plan.steps) if step is not None]
    steps: list[Step | None] = []
    before = geometry.entry
    for block, count in enumerate(counts):
        if not count or block >= geometry.last:
            steps.append(None)
            continue
        nearest = min(kinds, key=lambda kind: abs(kind[0] - block))[1] if kinds else Merge(1)
        step = _resized(nearest, before, before - count, geometry.prefix)
        if step is None:
            return None
        steps.append(step)
        before -= count
    try:
        return geometry.plan(steps)
    except ValueError:
        return None


def _resized(like: Step, before: int, after: int, prefix: int) -> Step | None:
    """A step of the kind of another that leaves `after` of `before` tokens; None if there is none."""
    if isinstance(like, Merge):
        return Merge(before - after, like.proportional) if before - after <= (before - prefix) // 2 else None
    if isinstance(like, Prune):
        keep = after - prefix - like.fuse
        return Prune(keep, like.fuse, like.signal, like.seed) if keep >= 1 else None
    if isinstance(like, Condense):
        keep = after - prefix - like.centers - 1
        merge = max(like.centers + 1, round(2 * (before - after + like.centers + 1) / 3))
        fits = keep >= 1 and keep + merge < before - prefix and merge > like.first
        return Condense(keep, merge, like.centers, like.heads, like.first, like.signal) if fits else None
    return None


def slopes_for(damage: float, cost: float, count: int = 24) -> list[float]:
    """Slopes of damage over cost, from a small to a large one, for a frontier that ends near this damage and cost."""
    middle = damage / cost
    return [middle * math.exp(-4 + 8 * at / (count - 1)) for at in range(count)]
