"""The plan: what happens to the tokens of every block, in integers only.

A method turns (tokens, blocks) into a plan, one `Step | None` per block; execution, FLOPs and the ideal speed-up all
read the same plan. Steps act between a block's attention and its MLP, `Predict` before its attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Signal = Literal["cls", "received", "keys"]


@dataclass(frozen=True)
class Prune:
    """Keep the `keep` best patches; the others become one fused token, or go.

    Args:
        keep: patches kept.
        fuse: append Σ score·patch over the patches not kept.
        signal: what ranks the patches, the CLS row of attention or what they receive of all rows; None ranks them at
            random, the same way for all images. A tower that does not pool CLS alone takes "received" for "cls".
        seed: of the random ranking.
    """

    keep: int
    fuse: bool = True
    signal: Literal["cls", "received"] | None = "cls"
    seed: int = 0

    def leaves(self, tokens: int, prefix: int) -> int:
        return prefix + self.keep + self.fuse


@dataclass(frozen=True)
class Merge:
    """Merge r tokens into their most similar neighbours; `proportional` attention weighs keys by size afterwards."""

    r: int
    proportional: bool = True
    signal: Literal["keys"] = "keys"

    def leaves(self, tokens: int, prefix: int) -> int:
        return tokens - self.r


@dataclass(frozen=True)
class Condense:
    """Keep the `keep` best patches, merge the next `merge` into `centers` tokens, fuse the others into one.

    Args:
        keep: patches kept, by descending score.
        merge: patches that merge, those that come next.
        centers: tokens they become: K-centre greedy chooses them, each other one joins the nearest.
        heads: how scores of several heads become one: their mean, or the mean of each head's ranks.
        first: the place among the merging patches, in descending score, of the first centre.
        signal: as in `Prune`.
    """

    keep: int
    merge: int
    centers: int = 2
    heads: Literal["mean", "rank"] = "rank"
    first: int = 0
    signal: Literal["cls", "received"] = "cls"

    def leaves(self, tokens: int, prefix: int) -> int:
        return prefix + self.keep + self.centers + 1


@dataclass(frozen=True)
class Predict:
    """Keep the `keep` best of the patches that enter the block, as the method's predictor ranks them.

    Args:
        keep: patches kept.
        macs: multiply-accumulates of the predictor for one image.
    """

    keep: int
    macs: int = 0

    def leaves(self, tokens: int, prefix: int) -> int:
        return prefix + self.keep


Step = Prune | Merge | Condense | Predict


@dataclass(frozen=True)
class Plan:
    """One step or None per block of a tower.

    Args:
        steps: one entry per block.
        entry: tokens entering the tower's first block, the prefix included.
        prefix: leading tokens (CLS, registers) that no step touches.
        learnt: tokens of the method's own beside them, in every block, gone after the last.
    Raises:
        ValueError: a step that keeps or merges more than its block has.
    """

    steps: tuple[Step | None, ...]
    entry: int
    prefix: int = 1
    learnt: int = 0

    def __post_init__(self) -> None:
        tokens = self.entry
        for block, step in enumerate(self.steps):
            patches = tokens - self.prefix
            tokens = step.leaves(tokens, self.prefix) if step else tokens
            if isinstance(step, (Prune, Predict)) and not 0 <= step.keep <= patches:
                raise ValueError(f"block {block} must keep 0 to {patches} patches, got {step.keep}")
            if isinstance(step, Merge) and not 0 <= step.r <= patches // 2:
                raise ValueError(f"block {block} must merge 0 to {patches // 2} tokens, got {step.r}")
            if isinstance(step, Condense) and not (
                0 <= step.keep <= patches - step.merge and 1 <= step.centers <= step.merge > step.first >= 0
            ):
                raise ValueError(
                    f"block {block} must keep and merge {patches} patches at most, into as many centers or fewer, "
                    f"got keep={step.keep}, merge={step.merge}, centers={step.centers}, first={step.first}"
                )

    @property
    def passes(self) -> tuple[tuple[int, int], ...]:
        """L pairs: the tokens that each block attends with, and those that pass its MLP."""
        pairs, tokens = [], self.entry
        for step in self.steps:
            left = step.leaves(tokens, self.prefix) if step else tokens
            attended = left if isinstance(step, Predict) else tokens
            pairs.append((attended + self.learnt, left + self.learnt))
            tokens = left
        return tuple(pairs)

    @property
    def tokens(self) -> tuple[int, ...]:
        """L+1 counts: the tokens that each block attends with, and those leaving the last."""
        passes = self.passes
        return (*(attended for attended, _ in passes), passes[-1][1] - self.learnt if passes else self.entry)

    @property
    def merges(self) -> bool:
        """Whether a step merges tokens, so that a row may stand for several places."""
        return any(isinstance(step, (Merge, Condense)) for step in self.steps)

    @property
    def proportional(self) -> bool:
        """Whether attention weighs keys by the size of their token."""
        return any(isinstance(step, Merge) and step.proportional for step in self.steps)

    @property
    def prunes(self) -> bool:
        """Whether a step prunes tokens."""
        return any(isinstance(step, (Prune, Predict)) for step in self.steps)

    @property
    def drops(self) -> bool:
        """Whether a step lets patches go without a token that holds them."""
        return any(isinstance(step, Predict) or (isinstance(step, Prune) and not step.fuse) for step in self.steps)

    def ranked_by(self, signal: Literal["cls", "received"]) -> Plan:
        """The same plan with every step that ranks by attention reading this signal of it."""
        return replace(
            self,
            steps=tuple(
                replace(step, signal=signal) if isinstance(step, (Prune, Condense)) and step.signal else step
                for step in self.steps
            ),
        )

    def gmacs(self, width: int, patch: int = 16, out: int = 512, exact: bool = False, mlp_ratio: float = 4.0) -> float:
        """Multiply-accumulates of one image in 10⁹, counted as fvcore does (the "GFLOPs" of the papers).

        Args:
            width: C.
            patch: side of a patch in pixels.
            out: width E of the joint embedding.
            exact: count the last block as it runs where only CLS is pooled: keys and values for every token, the
                query, projection and MLP for the CLS row alone.
            mlp_ratio: hidden width of the MLP over C.
        Source: TCA, arXiv 2410.14729, whose tables this reproduces.
        """
        total = 3 * patch**2 * width * (self.entry - self.prefix) + 5 * self.entry * width + 5 * width + width * out
        total += sum(step.macs for step in self.steps if isinstance(step, Predict))
        for block, (attended, passed) in enumerate(self.passes):
            last = exact and block == len(self.steps) - 1
            queries, passed = (1, 1) if last else (attended, passed)
            total += (2 * attended + 2 * queries) * width**2 + 2 * queries * attended * width
            total += round(2 * mlp_ratio * width) * passed * width + 5 * (attended + passed) * width
        return total / 1e9

    def ideal_speedup(
        self, width: int, patch: int = 16, out: int = 512, exact: bool = False, mlp_ratio: float = 4.0
    ) -> float:
        """GMACs of the dense tower over this plan's: the speed-up if every saved operation were saved time."""
        dense = Plan((None,) * len(self.steps), self.entry, self.prefix)
        return dense.gmacs(width, patch, out, exact, mlp_ratio) / self.gmacs(width, patch, out, exact, mlp_ratio)
