"""`ToMe`: merge the most similar tokens in every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clipkernels.arguments import check_flags, check_int, check_range, is_list
from clipkernels.messages import quantity
from clipkernels.methods.counts import check_sequence
from clipkernels.plan import Merge, Plan, Step


@dataclass(frozen=True)
class ToMe:
    """Merge r tokens per block, each into its most similar neighbour.

    Tokens alternate between sources and targets. A source's neighbour is the target with the most similar key (cosine
    similarity, mean over heads), wherever it lies in the image. The r sources closest to their neighbours merge.

    Args:
        r: one int for all blocks, or at most one int per block, the rest 0. Clamped per block to half of the tokens
            after the prefix.
        inflect: slope of the schedule, from -1 (most merges in the first block, none in the last) over 0 (constant) to
            1 (none in the first block, most in the last). Must be 0 if r is given per block.
        proportional: in the attention of later blocks, weight each key by the size of its token.
    Raises:
        ValueError: a negative r, an r that is not an int, an inflect outside [-1, 1] or with an r per block, or,
            from `plan`, more entries than the tower has blocks.
    Guarantees: prefix tokens are never touched; ties go to the lower index; a merged token is the mean of its tokens,
        weighted by their sizes.
    Source: ToMe, arXiv 2210.09461, section 3; the inflected schedule is that of its released code. On towers without
        CLS that code leaves the tokens that did not merge in order of similarity, which changes the pairs of the next
        block; here they stay in order of position. Its patch of timm averages tokens without their sizes; here an
        average weights each token by its size.
    """

    r: int | Sequence[int]
    inflect: float = 0.0
    proportional: bool = True

    def __post_init__(self) -> None:
        check_range("inflect", self.inflect, -1, 1)
        check_flags(proportional=self.proportional)
        if not is_list(self.r):
            check_int("r", self.r, 0)
            return
        for block, count in enumerate(self.r):
            check_int(f"r[{block}]", count, 0)
        if self.inflect:
            raise ValueError(f"inflect must be 0 if r is given per block, got {self.inflect!r}")
        object.__setattr__(self, "r", tuple(self.r))

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> Plan:
        """The plan for a tower of `blocks` blocks that `tokens` tokens enter."""
        check_sequence(tokens, blocks, prefix)
        entry = tokens
        steps: list[Step | None] = []
        for r in self._schedule(blocks):
            r = min(r, (tokens - prefix) // 2)
            steps.append(Merge(r, self.proportional) if r else None)
            tokens -= r
        return Plan(tuple(steps), entry, prefix)

    def shortfall(self, plan: Plan) -> str | None:
        """The warning for a plan that removes fewer tokens than the method asks for; None if it removes all."""
        asked = sum(self._schedule(len(plan.steps)))
        merged = sum(step.r for step in plan.steps if isinstance(step, Merge))
        if merged == asked:
            return None
        most = (plan.entry - plan.prefix) // (len(plan.steps) + 1)
        depth = quantity(len(plan.steps), "block")
        return (
            f"ToMe(r={self.r}) asks to merge {quantity(asked, 'token')} in {depth} and merges {merged} of "
            f"{plan.entry}, at most half of the patches in a block: {most} is the most that every block can merge"
        )

    def _schedule(self, blocks: int) -> list[int]:
        if isinstance(self.r, int):
            low = int(self.r * (1 - self.inflect))
            high = 2 * self.r - low
            return [int(low + block * (high - low) / max(1, blocks - 1)) for block in range(blocks)]
        if len(self.r) > blocks:
            raise ValueError(f"r must have at most one entry per block, {blocks} here, got {len(self.r)}")
        return [*self.r, *[0] * (blocks - len(self.r))]
