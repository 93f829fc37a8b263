"""`EViT`: keep the patches that CLS attends to most, and fuse the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from clipkernels.arguments import check_choice, check_flags, check_int, check_range
from clipkernels.methods.blocks import normalize_blocks, resolve_blocks
from clipkernels.methods.counts import check_sequence, round_up, shortfall_message
from clipkernels.plan import Plan, Prune, Step


@dataclass(frozen=True)
class EViT:
    """Keep the patches that CLS attends to most; fuse the others into one token, weighted by that attention.

    Args:
        keep: share of the patches to keep in each pruning block, in (0, 1].
        blocks: zero-based blocks that prune; None is (3, 6, 9) on towers of ten blocks or more, and a quarter, half
            and three quarters of the depth on shallower ones.
        fuse: append the token Σ aᵢxᵢ over the patches not kept, a the head-mean CLS attention, not renormalised.
        score: "cls", or "random": one fixed subset per block and seed for all images, for comparison. Its fused
            token weights the patches by the random scores, which sum to one over all patches.
        seed: seed of the random subsets.
        multiple: round the number of kept patches up so that the remaining token count is a multiple of this, if
            enough patches exist. Multiples such as 8 or 16 suit some matrix units. 1 is the published schedule.
    Raises:
        ValueError: keep outside (0, 1], an unknown score, a multiple below 1, or, from `plan`, a block that the tower
            does not have.
    Guarantees: prefix tokens are never touched; kept patches stay in order, and the fused token comes last; ties go to
        the lower index.
    Source: EViT, arXiv 2202.07800, section 3.2.
    """

    keep: float
    blocks: tuple[int, ...] | None = None
    fuse: bool = True
    score: Literal["cls", "random"] = "cls"
    seed: int = 0
    multiple: int = 1

    def __post_init__(self) -> None:
        check_range("keep", self.keep, 0, 1, "(]")
        check_int("multiple", self.multiple, 1)
        check_flags(fuse=self.fuse)
        check_choice("score", self.score, "cls", "random")
        check_int("seed", self.seed, 0)
        object.__setattr__(self, "blocks", normalize_blocks(self.blocks))

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> Plan:
        """The plan for a tower of `blocks` blocks that `tokens` tokens enter."""
        check_sequence(tokens, blocks, prefix)
        entry = tokens
        steps: list[Step | None] = [None] * blocks
        for block in resolve_blocks(self.blocks, blocks):
            patches = tokens - prefix
            keep = round_up(math.ceil(self.keep * patches), prefix + self.fuse, patches - 1, self.multiple)
            if keep == patches:
                continue
            by_cls = self.score == "cls"
            step = Prune(keep, self.fuse) if by_cls else Prune(keep, self.fuse, None, self.seed * blocks + block)
            steps[block], tokens = step, step.leaves(tokens, prefix)
        return Plan(tuple(steps), entry, prefix)

    def shortfall(self, plan: Plan) -> str | None:
        """The warning for a plan that removes fewer tokens than the method asks for; None if it removes all."""
        return shortfall_message(f"EViT(keep={self.keep})", plan, self.keep < 1, self.multiple)
