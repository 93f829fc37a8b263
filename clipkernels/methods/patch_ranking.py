"""`PatchRanking`: keep the patches that a trained predictor ranks highest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clipkernels.arguments import check_int, check_range, describe
from clipkernels.messages import quantity
from clipkernels.methods.counts import check_sequence, round_up, shortfall_message
from clipkernels.methods.protocols import LearntTokens, Predictor
from clipkernels.plan import Plan, Predict, Step

if TYPE_CHECKING:
    from torch import nn

    from clipkernels.adapters import Tower


@dataclass(frozen=True)
class PatchRanking:
    """Keep the patches ranked highest by a trained predictor.

    The predictor has learnt which patches CLIP's embedding depends on least.

    Args:
        predictor: a predictor for the tower, from `clipkernels.learn.patch_ranking.fit_predictor`.
        keep: share of the patches to keep, in (0, 1]; with 1 the predictor does not run.
        block: zero-based block before which the other patches are dropped; None is the predictor's block.
        tokens: learnt tokens that join the patches in every block, from
            `clipkernels.learn.patch_ranking.fit_tokens`, or None.
        multiple: as in `EViT`.
    Raises:
        ValueError: keep outside (0, 1], a block that is not the predictor's, or, from `plan`, a tower whose tokens or
            blocks differ from those that the predictor is for.
        TypeError: predictor or tokens of a wrong type.
    Source: Patch Ranking, arXiv 2409.14607. Its released code trains the predictor on the features of the last block,
        which do not exist where it prunes; here both are the input of `block`. Its LayerNorms have an eps of 1e-6,
        which `RankPredictor(eps=1e-6)` has too.
    """

    predictor: Predictor
    keep: float = 0.6
    block: int | None = None
    tokens: LearntTokens | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        check_int("multiple", self.multiple, 1)
        if not isinstance(getattr(self.predictor, "macs", None), int):
            raise TypeError(f"predictor must be a RankPredictor, got {describe(self.predictor)}")
        if self.tokens is not None and not isinstance(getattr(self.tokens, "count", None), int):
            raise TypeError(f"tokens must be VisualTokens or None, got {describe(self.tokens)}")
        check_range("keep", self.keep, 0, 1, "(]")
        if self.block is not None:
            check_int("block", self.block, 0)
        if self.block not in (None, self.predictor.block):
            raise ValueError(f"block must be that of the predictor, {self.predictor.block}, got {self.block!r}")
        object.__setattr__(self, "block", self.predictor.block)

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> Plan:
        """The plan for a tower of `blocks` blocks that `tokens` tokens enter."""
        check_sequence(tokens, blocks, prefix)
        block, sequence = self.predictor.block, (self.predictor.tokens, self.predictor.prefix)
        if (tokens, prefix) != sequence:
            raise ValueError(
                f"the predictor is for {quantity(sequence[0], 'token')}, {sequence[1]} of them prefix, got {tokens} "
                f"and {prefix}"
            )
        if block >= blocks:
            raise ValueError(f"the predictor is for block {block}, got a tower of {quantity(blocks, 'block')}")
        steps: list[Step | None] = [None] * blocks
        learnt = 0 if self.tokens is None else self.tokens.count
        keep = round_up(math.ceil(self.keep * (tokens - prefix)), prefix + learnt, tokens - prefix, self.multiple)
        if keep < tokens - prefix:
            steps[block] = Predict(keep, self.predictor.macs)
        return Plan(tuple(steps), tokens, prefix, learnt)

    def shortfall(self, plan: Plan) -> str | None:
        """The warning for a plan that removes fewer tokens than the method asks for; None if it removes all."""
        return shortfall_message(f"PatchRanking(keep={self.keep})", plan, self.keep < 1, self.multiple)

    def weights(self) -> dict[str, nn.Module]:
        """The modules of the method by name: `predictor` and, if there are learnt tokens, `learnt`."""
        modules: dict[str, Any] = {"predictor": self.predictor}
        return modules | ({} if self.tokens is None else {"learnt": self.tokens})

    def check_tower(self, tower: Tower) -> None:
        """Raise ValueError unless predictor and learnt tokens are for this tower."""
        self.predictor.check_tower(tower)
        if self.tokens is not None:
            self.tokens.check_tower(tower)
