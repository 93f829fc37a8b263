"""Effects of single blocks, and their sum as a model of the damage of a plan.

    f_b(M)        damage if block b alone reduces all N tokens to M, measured at a few M and interpolated between them
    damage(plan)  Σ_b f_b(M_b) - f_b(N_b),  N_b tokens before and M_b after the step of block b

The differences express that the first tokens that go are those that cost least: a block that finds N_b tokens left has
to take costlier ones, wherever the cheap ones went.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from clipkernels.plan import Condense, Merge, Plan, Prune, Step

SHARES = (0.03, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Shares of the patches that a block removes when its effect is measured."""
CENTERS = 2
MIN_PATCHES_TO_CONDENSE = 8


class Family(NamedTuple):
    """A kind of step.

    name: its name.
    step: the step that leaves `after` of `before` tokens, with `prefix` of them prefix; None if there is none.
    """

    name: str
    step: Callable[[int, int, int], Step | None]


def _merge(before: int, after: int, prefix: int, proportional: bool) -> Step | None:
    r = before - after
    return Merge(r, proportional) if 0 < r <= (before - prefix) // 2 else None


def _prune(before: int, after: int, prefix: int, fuse: bool) -> Step | None:
    keep = after - prefix - fuse
    return Prune(keep, fuse) if keep >= 1 and keep + fuse < before - prefix else None


def _condense(before: int, after: int, prefix: int) -> Step | None:
    """A `Condense` step that divides the patches as `ck.TCA` does, as nearly as the numbers allow."""
    patches, removed = before - prefix, before - after
    merge = max(CENTERS + 1, round(2 * (removed + CENTERS + 1) / 3))
    keep = after - prefix - CENTERS - 1
    fits = patches >= MIN_PATCHES_TO_CONDENSE and removed > 0 and keep >= 1 and keep + merge < patches
    return Condense(keep, merge, CENTERS) if fits else None


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("merge", lambda before, after, prefix: _merge(before, after, prefix, True)),
        Family("merge-plain", lambda before, after, prefix: _merge(before, after, prefix, False)),
        Family("prune", lambda before, after, prefix: _prune(before, after, prefix, True)),
        Family("prune-drop", lambda before, after, prefix: _prune(before, after, prefix, False)),
        Family("condense", _condense),
    )
}
"""The families of steps by name: merges with and without proportional attention, prunes with and without a fused
token, and condensations."""


class Curve(NamedTuple):
    """The damage f(M) of one block, for ascending numbers M of tokens that it leaves; the last is that of all tokens.

    Between two numbers it is linear. Below the least one it grows as it does between the two least.
    """

    tokens: Sequence[int]
    damages: Sequence[float]

    def __call__(self, tokens: int) -> float:
        place = bisect_left(self.tokens, tokens)
        if place < len(self.tokens) and self.tokens[place] == tokens:
            return self.damages[place]
        if place == 0:
            return self._below(tokens)
        low, high = self.tokens[place - 1], self.tokens[place]
        share = (tokens - low) / (high - low)
        return self.damages[place - 1] + share * (self.damages[place] - self.damages[place - 1])

    def _below(self, tokens: int) -> float:
        if len(self.tokens) < 3 or self.damages[0] <= self.damages[1] or self.damages[1] <= 0:
            return self.damages[0] * (self.tokens[-1] - tokens) / max(1, self.tokens[-1] - self.tokens[0])
        slope = math.log(self.damages[0] / self.damages[1]) / (self.tokens[1] - self.tokens[0])
        return self.damages[0] * math.exp(min(50.0, slope * (self.tokens[0] - tokens)))


def single_steps(family: Family, entry: int, prefix: int, block: int, blocks: int) -> list[Plan]:
    """The plans in which one block alone has a step of a family, one for each of SHARES that it can remove."""
    plans = []
    for share in SHARES:
        after = entry - max(1, round(share * (entry - prefix)))
        step = family.step(entry, after, prefix)
        if step is not None:
            steps = [None] * block + [step] + [None] * (blocks - block - 1)
            plans.append(Plan(tuple(steps), entry, prefix))
    return list(dict.fromkeys(plans))


def curve_of(plans: Sequence[Plan], damages: Sequence[float]) -> Curve | None:
    """The curve of a block from the damages of its `single_steps`, made monotone; None without any plan."""
    if not plans:
        return None
    points = sorted({(plan.passes[-1][1], damage) for plan, damage in zip(plans, damages, strict=True)}, reverse=True)
    tokens, values, most = [plans[0].entry], [0.0], 0.0
    for left, damage in points:
        most = max(most, damage)
        tokens.append(left)
        values.append(most)
    return Curve(tokens[::-1], values[::-1])
