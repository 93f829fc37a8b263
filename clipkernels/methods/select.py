"""`Select`: choose image tokens at the end of a tower that stays whole, for the prompt of a language model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from clipkernels.arguments import check_choice, check_flags, check_int, check_range
from clipkernels.messages import quantity
from clipkernels.methods.counts import check_sequence
from clipkernels.plan import Plan, Rank, Step

CONTEXTUAL = (5, 32)
"""Share of the image tokens that are means of groups: 30 of 192, 20 of 128, 10 of 64, as in VisionZip's release."""


@dataclass(frozen=True)
class Select:
    """Keep the image tokens that CLS attends to most, and the means of groups of the others.

    The tower stays whole: one block ranks the patches with the attention that it computes anyway. Of n image tokens,
    k = ⌈keep·n⌉ go into the prompt, with `merge_rest` ⌊5k/32⌋ of them as means of groups. Where a token of the prompt
    stands for a square of patches, its score and its key are the means over the square.

    Args:
        keep: share of the image tokens that go into the prompt, in (0, 1].
        score: "cls", the attention of CLS to each patch, or "received", the attention that a patch receives from all
            tokens; both are means over heads. A tower without CLS uses "received" in place of "cls".
        layer: block whose attention ranks, counted from the end if negative. -2 is the one before the last.
        merge_rest: of the tokens that are not the best, take some that are spread evenly, and give each the mean of
            those whose keys are most similar to its own. False drops them.
    Raises:
        ValueError: an argument out of range; or, from `plan`, a block that the tower does not have.
        TypeError: an argument of another type.
    Source: VisionZip, arXiv 2412.04467. Its release adds the mean of a group to the token that leads it; here the
        leader is one of the tokens that are averaged. It counts CLS among the tokens kept; here CLS is none of them.
    """

    keep: float = 0.25
    score: Literal["cls", "received"] = "cls"
    layer: int = -2
    merge_rest: bool = True

    def __post_init__(self) -> None:
        check_range("keep", self.keep, 0, 1, "(]")
        check_choice("score", self.score, "cls", "received")
        check_int("layer", self.layer, -(2**16))
        check_flags(merge_rest=self.merge_rest)

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> Plan:
        """The plan for a tower of `blocks` blocks that `tokens` tokens enter.

        Raises:
            ValueError: the tower does not have the block that ranks.
        """
        check_sequence(tokens, blocks, prefix)
        if not -blocks <= self.layer < blocks:
            raise ValueError(f"layer must be one of {quantity(blocks, 'block')}, -{blocks} to {blocks - 1}, got {self}")
        steps: list[Step | None] = [None] * blocks
        steps[self.layer] = Rank(self.score)
        return Plan(tuple(steps), tokens, prefix)

    def counts(self, tokens: int) -> tuple[int, int]:
        """The numbers of image tokens, of `tokens`, that go on as they are, and as means of groups."""
        kept = math.ceil(self.keep * tokens)
        contextual = kept * CONTEXTUAL[0] // CONTEXTUAL[1] if self.merge_rest and kept < tokens else 0
        return kept - contextual, contextual
