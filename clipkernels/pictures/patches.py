"""The state of every patch after a block: kept, merged, fused or dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from clipkernels.messages import quantity
from clipkernels.plan import Condense, Plan, Prune

MAX_COLUMNS = 4
"""Blocks that are shown of a method, unless all are."""


class Patches(NamedTuple):
    """The patches of an image after one block.

    rows (P,): the token that holds each patch, -1 for a dropped one.
    fused (P,): true for a patch that lives on in a fused token.
    tokens: number of tokens left, the prefix included.
    """

    rows: np.ndarray
    fused: np.ndarray
    tokens: int

    @property
    def sizes(self) -> np.ndarray:
        """The number (P,) of patches in the token of each patch, 0 for a dropped one."""
        counts = np.bincount(np.maximum(self.rows, 0))
        counts[0] -= (self.rows < 0).sum()
        return np.where(self.rows < 0, 0, counts[np.maximum(self.rows, 0)])

    @property
    def dropped(self) -> np.ndarray:
        """True (P,) for a patch that no token holds."""
        return self.rows < 0

    @property
    def merged(self) -> np.ndarray:
        """True (P,) for a patch whose token holds others too and is not a fused one."""
        return (self.sizes > 1) & ~self.fused

    @property
    def kept(self) -> np.ndarray:
        """True (P,) for a patch that has a token to itself."""
        return (self.sizes == 1) & ~self.fused

    def describe(self) -> str:
        """The number of patches in each state that occurs."""
        counts = {name: int(getattr(self, name).sum()) for name in ("kept", "merged", "fused", "dropped")}
        parts = [f"{count} {name}" for name, count in counts.items() if count]
        if counts["merged"]:
            groups = len(np.unique(self.rows[self.merged]))
            place = next(place for place, part in enumerate(parts) if part.endswith("merged"))
            parts[place] += f" into {groups}"
        return ", ".join(parts)


def untouched(plan: Plan) -> Patches:
    """The patches that enter a tower."""
    patches = plan.entry - plan.prefix
    return Patches(plan.prefix + np.arange(patches), np.zeros(patches, bool), plan.entry)


def patches_by_block(source: np.ndarray, plan: Plan) -> list[Patches]:
    """The patches of one image after every block.

    Args:
        source: (S,P) the row that holds each patch after each of the S steps, as `Encoded.source` has it.
        plan: the plan of the forward.
    """
    patches, steps, states = untouched(plan), iter(source), []
    for step in plan.steps:
        if step is not None:
            rows, tokens = next(steps), step.leaves(patches.tokens, plan.prefix)
            fuses = isinstance(step, Condense) or (isinstance(step, Prune) and step.fuse)
            fused = patches.fused | (rows == tokens - 1) if fuses else patches.fused
            patches = Patches(rows, fused & (rows >= 0), tokens)
        states.append(patches)
    return states


def choose_blocks(plans: Sequence[Plan], all_steps: bool) -> list[int]:
    """The zero-based blocks after which patches are shown, the last one with a step included.

    Without `all_steps` at most MAX_COLUMNS: first those of the plans that have few steps, then evenly spaced ones.
    """
    steps = [[block for block, step in enumerate(plan.steps) if step is not None] for plan in plans]
    every = sorted({block for blocks in steps for block in blocks})
    if all_steps or len(every) <= MAX_COLUMNS:
        return every
    few = {block for blocks in steps if len(blocks) < MAX_COLUMNS for block in blocks} | {every[-1]}
    if 1 < len(few) <= MAX_COLUMNS:
        return sorted(few)
    return [every[-(-place * len(every) // MAX_COLUMNS) - 1] for place in range(1, MAX_COLUMNS + 1)]


def describe_blocks(plan: Plan) -> str:
    """The blocks of a plan that have a step, in words."""
    blocks = [block for block, step in enumerate(plan.steps) if step is not None]
    if not blocks:
        return "no step in any block"
    if len(blocks) > 1 and blocks == list(range(blocks[0], blocks[-1] + 1)):
        return f"a step in each of blocks {blocks[0]} to {blocks[-1]}"
    return f"{quantity(len(blocks), 'step')}, in {'blocks' if len(blocks) > 1 else 'block'} " + ", ".join(
        map(str, blocks)
    )
