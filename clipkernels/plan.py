"""The plan: one step or none per block, in integers only.

A method turns (tokens, blocks) into a plan, one `Step | None` per block. Execution, FLOPs and the ideal speed-up all
read the same plan. Steps run between a block's attention and its MLP, `Predict` before its attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from clipkernels.arguments import check_choice, check_flags, check_int, check_positive, describe
from clipkernels.messages import quantity

Signal = Literal["cls", "received", "keys"]


@dataclass(frozen=True)
class Prune:
    """Keep the `keep` best patches; fuse the others into one token, or drop them.

    Args:
        keep: number of patches to keep.
        fuse: append Σ score·patch over the patches not kept.
        signal: the scores that rank the patches: "cls", the CLS row of attention; "received", the attention that they
            receive from all rows; or None, a random order that is the same for all images. A tower with another pool
            than CLS uses "received" in place of "cls".
        seed: seed of the random order.
    """

    keep: int
    fuse: bool = True
    signal: Literal["cls", "received"] | None = "cls"
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("keep", self.keep, 0)
        check_flags(fuse=self.fuse)
        check_choice("signal", self.signal, "cls", "received", None)
        check_int("seed", self.seed, 0)

    def leaves(self, tokens: int, prefix: int) -> int:
        """The number of tokens after the step, of `tokens` before it."""
        return prefix + self.keep + self.fuse


@dataclass(frozen=True)
class Merge:
    """Merge r tokens into their most similar neighbours.

    With `proportional`, later attention weights each key by the size of its token.
    """

    r: int
    proportional: bool = True
    signal: Literal["keys"] = "keys"

    def __post_init__(self) -> None:
        check_int("r", self.r, 0)
        check_flags(proportional=self.proportional)
        check_choice("signal", self.signal, "keys")

    def leaves(self, tokens: int, prefix: int) -> int:
        """The number of tokens after the step, of `tokens` before it."""
        return tokens - self.r


@dataclass(frozen=True)
class Condense:
    """Keep the `keep` best patches, merge the next `merge` into `centers` tokens, fuse the others into one token.

    Args:
        keep: number of patches to keep, by descending score.
        merge: number of patches to merge, those with the next highest scores.
        centers: number of tokens that they become. K-centre greedy chooses the centres; each other patch joins the
            nearest one.
        heads: reduction of the scores over heads: their mean, or the mean of each head's ranks.
        first: index of the first centre among the merging patches, in descending score.
        signal: as in `Prune`.
    """

    keep: int
    merge: int
    centers: int = 2
    heads: Literal["mean", "rank"] = "rank"
    first: int = 0
    signal: Literal["cls", "received"] = "cls"

    def __post_init__(self) -> None:
        for name in ("keep", "merge", "centers", "first"):
            check_int(name, getattr(self, name), 0)
        check_choice("heads", self.heads, "mean", "rank")
        check_choice("signal", self.signal, "cls", "received")

    def leaves(self, tokens: int, prefix: int) -> int:
        """The number of tokens after the step, of `tokens` before it."""
        return prefix + self.keep + self.centers + 1


@dataclass(frozen=True)
class Predict:
    """Keep the `keep` patches that the method's predictor ranks highest among those entering the block.

    Args:
        keep: number of patches to keep.
        macs: multiply-accumulates of the predictor for one image.
    """

    keep: int
    macs: int = 0

    def __post_init__(self) -> None:
        check_int("keep", self.keep, 0)
        check_int("macs", self.macs, 0)

    def leaves(self, tokens: int, prefix: int) -> int:
        """The number of tokens after the step, of `tokens` before it."""
        return prefix + self.keep


@dataclass(frozen=True)
class Rank:
    """Rank the patches by this block's attention, and leave the tokens as they are: what follows the tower chooses.

    Args:
        signal: as in `Prune`.
    """

    signal: Literal["cls", "received"] = "cls"

    def __post_init__(self) -> None:
        check_choice("signal", self.signal, "cls", "received")

    def leaves(self, tokens: int, prefix: int) -> int:
        """The number of tokens after the step, of `tokens` before it."""
        return tokens


Step = Prune | Merge | Condense | Predict | Rank
STEPS = (Prune, Merge, Condense, Predict, Rank)
"""The classes of `Step`, because torch.compile of torch 2.6 does not take a union."""


@dataclass(frozen=True)
class Plan:
    """One step or None per block of a tower.

    Args:
        steps: one entry per block.
        entry: number of tokens entering the tower's first block, the prefix included.
        prefix: number of leading tokens (CLS, registers) that no step touches.
        learnt: number of the method's learnt tokens, which join the others in every block and are removed after the
            last one.
    Raises:
        ValueError: a step keeps or merges more patches than its block has, or a number is no int of at least 0.
        TypeError: steps are not a tuple of steps.
    """

    steps: tuple[Step | None, ...]
    entry: int
    prefix: int = 1
    learnt: int = 0

    def __post_init__(self) -> None:
        check_int("prefix", self.prefix, 0)
        check_int("entry", self.entry, self.prefix)
        check_int("learnt", self.learnt, 0)
        if not isinstance(self.steps, (tuple, list)):
            raise TypeError(f"steps must be a tuple of one step or None per block, got {describe(self.steps)}")
        tokens = self.entry
        for block, step in enumerate(self.steps):
            if step is not None and not isinstance(step, STEPS):
                raise TypeError(f"steps[{block}] must be a step such as ck.Prune(9) or None, got {describe(step)}")
            patches = tokens - self.prefix
            tokens = step.leaves(tokens, self.prefix) if step else tokens
            if isinstance(step, (Prune, Predict)) and not 0 <= step.keep <= patches:
                raise ValueError(f"block {block} must keep 0 to {quantity(patches, 'patch')}, got {step.keep}")
            if isinstance(step, Merge) and not 0 <= step.r <= patches // 2:
                raise ValueError(f"block {block} must merge 0 to {quantity(patches // 2, 'token')}, got {step.r}")
            if isinstance(step, Condense) and not (
                0 <= step.keep <= patches - step.merge and 1 <= step.centers <= step.merge > step.first >= 0
            ):
                raise ValueError(
                    f"block {block} must keep and merge {quantity(patches, 'patch')} at most, and have no more centers "
                    f"than merged patches, got keep={step.keep}, merge={step.merge}, centers={step.centers}, "
                    f"first={step.first}"
                )

    @property
    def passes(self) -> tuple[tuple[int, int], ...]:
        """L pairs: the numbers of tokens in each block's attention and in its MLP."""
        pairs, tokens = [], self.entry
        for step in self.steps:
            remaining = step.leaves(tokens, self.prefix) if step else tokens
            in_attention = remaining if isinstance(step, Predict) else tokens
            pairs.append((in_attention + self.learnt, remaining + self.learnt))
            tokens = remaining
        return tuple(pairs)

    @property
    def tokens(self) -> tuple[int, ...]:
        """L+1 counts: the number of tokens in each block's attention, and after the last block."""
        passes = self.passes
        return (*(in_attention for in_attention, _ in passes), passes[-1][1] - self.learnt if passes else self.entry)

    @property
    def ranks(self) -> bool:
        """True if a step ranks the patches and leaves them."""
        return any(isinstance(step, Rank) for step in self.steps)

    @property
    def merges(self) -> bool:
        """True if a step merges tokens, so that a row may stand for several patches."""
        return any(isinstance(step, (Merge, Condense)) for step in self.steps)

    @property
    def proportional(self) -> bool:
        """True if attention weights each key by the size of its token."""
        return any(isinstance(step, Merge) and step.proportional for step in self.steps)

    @property
    def prunes(self) -> bool:
        """True if a step prunes tokens."""
        return any(isinstance(step, (Prune, Predict)) for step in self.steps)

    @property
    def drops(self) -> bool:
        """True if a step drops patches without fusing them into a token."""
        return any(isinstance(step, Predict) or (isinstance(step, Prune) and not step.fuse) for step in self.steps)

    def ranked_by(self, signal: Literal["cls", "received"]) -> Plan:
        """The same plan with this signal in every step that ranks by attention."""
        return replace(
            self,
            steps=tuple(
                replace(step, signal=signal) if isinstance(step, (Prune, Condense, Rank)) and step.signal else step
                for step in self.steps
            ),
        )

    def gmacs(self, width: int, patch: int = 16, out: int = 512, exact: bool = False, mlp_ratio: float = 4.0) -> float:
        """Multiply-accumulates for one image, in 10⁹, counted as fvcore does (the "GFLOPs" of the papers).

        Args:
            width: C.
            patch: side of a patch in pixels.
            out: width E of the joint embedding.
            exact: count the last block as it runs if only CLS is pooled: keys and values for every token, and query,
                projection and MLP for the CLS row only.
            mlp_ratio: hidden width of the MLP over C.
        Raises:
            ValueError: a number that is not a positive int, or a ratio that is not positive.
        Source: TCA, arXiv 2410.14729, whose tables this reproduces.
        """
        for name, value in (("width", width), ("patch", patch), ("out", out)):
            check_int(name, value, 1)
        check_flags(exact=exact)
        check_positive(mlp_ratio=mlp_ratio)
        total = 3 * patch**2 * width * (self.entry - self.prefix) + 5 * self.entry * width + 5 * width + width * out
        total += sum(step.macs for step in self.steps if isinstance(step, Predict))
        for block, (keys, rows) in enumerate(self.passes):
            cls_alone = exact and block == len(self.steps) - 1
            queries, rows = (1, 1) if cls_alone else (keys, rows)
            total += (2 * keys + 2 * queries) * width**2 + 2 * queries * keys * width
            total += round(2 * mlp_ratio * width) * rows * width + 5 * (keys + rows) * width
        return total / 1e9

    def ideal_speedup(
        self, width: int, patch: int = 16, out: int = 512, exact: bool = False, mlp_ratio: float = 4.0
    ) -> float:
        """GMACs of the dense tower divided by this plan's: the speed-up if time were proportional to operations."""
        dense = Plan((None,) * len(self.steps), self.entry, self.prefix)
        return dense.gmacs(width, patch, out, exact, mlp_ratio) / self.gmacs(width, patch, out, exact, mlp_ratio)
