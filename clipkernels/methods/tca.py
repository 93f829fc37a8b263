"""`TCA`: keep some patches, merge the next ones around centres, and fuse the others."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

from clipkernels.arguments import check_choice, check_int, check_range
from clipkernels.messages import quantity
from clipkernels.methods.blocks import normalize_blocks, resolve_blocks
from clipkernels.methods.counts import check_sequence, round_up, shortfall_message
from clipkernels.plan import Condense, Plan, Step


@dataclass(frozen=True)
class TCA:
    """Keep the patches that CLS attends to most, merge the next ones around a few centres, fuse the others.

    With m = P + 1 - ⌈(1-rate)·P⌉, a block of P patches keeps P + 1 - 3m, merges 2m into `centers` tokens and fuses
    m - 1 into one token, Σ aᵢxᵢ, a the head-mean CLS attention. `ck.Reservoir` is the method's test-time-adaptation
    head.

    Args:
        rate: r in [0, 1). The paper's "R=0.9" is 0.035, its "R=0.7" is 0.1; 0 keeps everything.
        blocks: zero-based blocks that condense; None as in `EViT`.
        centers: number of tokens that the merging patches become; the paper has 2, its released code 4.
        score: "rank", the mean over heads of a patch's rank in each head, as the paper describes, or "attention", the
            mean over heads of the CLS attention, as its released code computes. Towers with another pool than CLS
            rank by the attention received. That is already a mean over heads, so both scores give the same order.
        seed: seed of the first centre, which is one of the merging patches. Its place differs between blocks and is
            the same for all images. None starts at the highest score.
        multiple: as in `EViT`; the additional kept patches are taken from the fused ones.
    Raises:
        ValueError: an argument out of range; or, from `plan`, a block that the tower does not have, or a rate that
            leaves a block nothing to keep, merge or fuse. The message names the block and the valid rates.
    Guarantees: prefix tokens are never touched; the kept patches follow them by descending score, then the merged
        tokens and the fused one; ties go to the lower index.
    Source: TCA, arXiv 2410.14729, section 3; the division of the patches is that of its released code. That code draws
        the first centre at random, computes ranks but scores by the attention, makes 4 centres where the paper has 2,
        and gives zeros for a centre that no patch joins, where this gives the centre itself.
    """

    rate: float
    blocks: tuple[int, ...] | None = None
    centers: int = 2
    score: Literal["rank", "attention"] = "rank"
    seed: int | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        check_range("rate", self.rate, 0, 1, "[)")
        check_int("centers", self.centers, 1)
        check_choice("score", self.score, "rank", "attention")
        if self.seed is not None:
            check_int("seed", self.seed, 0)
        check_int("multiple", self.multiple, 1)
        object.__setattr__(self, "blocks", normalize_blocks(self.blocks))

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> Plan:
        """The plan for a tower of `blocks` blocks that `tokens` tokens enter."""
        check_sequence(tokens, blocks, prefix)
        entry = tokens
        steps: list[Step | None] = [None] * blocks
        for block in resolve_blocks(self.blocks, blocks):
            if not self.rate:
                break
            patches = tokens - prefix
            split = self._split(patches, self.rate)
            if split is None:
                problem = (
                    f"block {block} cannot condense {quantity(patches, 'patch')} at rate {self.rate} into "
                    f"{quantity(self.centers, 'center')}"
                )
                raise ValueError(f"{problem}: {self._valid_rates(entry, blocks, prefix)}")
            keep, merge = split
            keep = round_up(keep, prefix + self.centers + 1, patches - merge - 1, self.multiple)
            first = 0 if self.seed is None else random.Random(self.seed * blocks + block).randrange(merge)
            step = Condense(keep, merge, self.centers, "rank" if self.score == "rank" else "mean", first)
            steps[block], tokens = step, step.leaves(tokens, prefix)
        return Plan(tuple(steps), entry, prefix)

    def shortfall(self, plan: Plan) -> str | None:
        """The warning for a plan that removes fewer tokens than the method asks for; None if it removes all."""
        return shortfall_message(f"TCA(rate={self.rate})", plan, self.rate > 0, self.multiple)

    def _split(self, patches: int, rate: float) -> tuple[int, int] | None:
        """The numbers of patches to keep and to merge; None if either is too small or nothing would be removed."""
        n = math.ceil((1 - rate) * patches)
        m = patches + 1 - n
        fits = n - 2 * m >= 1 and 2 * m >= self.centers and m >= 2 and 3 * m > self.centers + 2
        return (n - 2 * m, 2 * m) if fits else None

    def _valid_rates(self, tokens: int, blocks: int, prefix: int) -> str:
        """The rates, in thousandths, that every condensing block can take, as a sentence."""
        valid = []
        for rate in (thousandth / 1000 for thousandth in range(1, 1000)):
            patches: int | None = tokens - prefix
            for _ in resolve_blocks(self.blocks, blocks):
                split = patches and self._split(patches, rate)
                patches = split[0] + self.centers + 1 if split else None
            if patches:
                valid.append(rate)
        return f"valid rates are {valid[0]:g} to {valid[-1]:g}" if valid else "no rate is valid"
