"""The methods: frozen configurations whose only act is to turn (tokens, blocks) into a plan.

Ratios become counts here, with the expressions of the published code; the ops take counts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from clipkernels.plan import Condense, Merge, Plan, Predict, Prune, Step

if TYPE_CHECKING:
    from torch import nn

    from clipkernels.adapters import Tower


class Predictor(Protocol):
    """A trained ranking of the patches that enter one block, such as `learn.patch_ranking.RankPredictor`.

    block: zero-based block before whose attention it ranks.
    tokens, prefix: the sequence it is trained for.
    macs: multiply-accumulates for one image.
    """

    block: int
    tokens: int
    prefix: int

    @property
    def macs(self) -> int: ...

    def check_tower(self, tower: Tower) -> None: ...


class LearntTokens(Protocol):
    """Tokens trained to stand beside the patches, such as `learn.patch_ranking.VisualTokens`; `count` per block."""

    count: int

    def check_tower(self, tower: Tower) -> None: ...


class Method(Protocol):
    """Anything hashable with a `plan`: a new method needs nothing else.

    One that brings weights also has `weights()`, the modules that `tower.run` takes by name, `predictor` and `learnt`,
    and `check_tower(tower)`, which raises ValueError where they were made for another tower.
    """

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> Plan:
        """The plan for `blocks` blocks that `tokens` tokens enter, the first `prefix` of which no step may touch."""


@dataclass(frozen=True)
class Dense:
    """Every token kept: the tower's own result, computed without its waste.

    Exact up to rounding: packed query, key and value projection, and the last block's query, projection and MLP for
    the CLS row alone where only CLS is pooled.
    """

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> Plan:
        return Plan((None,) * blocks, tokens, prefix)


@dataclass(frozen=True)
class EViT:
    """Keep the patches CLS attends to most; the others become one token, weighted by that attention.

    Args:
        keep: share of the patches kept in each named block, in (0, 1].
        blocks: zero-based blocks that prune; None is (3, 6, 9) on towers of ten blocks or more, and a quarter, half
            and three quarters of the depth on shallower ones.
        fuse: add the token Σ aᵢxᵢ of the patches not kept, a the head-mean CLS attention, not renormalised.
        score: "cls", or "random": one fixed subset per block and seed for all images, for comparison. Its fused
            token weighs the patches by the random scores, which add up to one over all patches.
        seed: of the random subsets.
        multiple: keep as many more patches as make the tokens left a multiple of this, where there are as many: counts
            such as 8 or 16 suit some matrix units. 1 is the published schedule.
    Raises:
        ValueError: keep outside (0, 1], an unknown score, a multiple below 1, or, from `plan`, a block the tower does
            not have.
    Source: EViT, arXiv 2202.07800, section 3.2.
    """

    keep: float
    blocks: tuple[int, ...] | None = None
    fuse: bool = True
    score: Literal["cls", "random"] = "cls"
    seed: int = 0
    multiple: int = 1

    def __post_init__(self) -> None:
        _check_keep(self.keep)
        _check_multiple(self.multiple)
        if self.score not in ("cls", "random"):
            raise ValueError(f'score must be "cls" or "random", got {self.score!r}')
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be a non-negative int, got {self.seed!r}")
        object.__setattr__(self, "blocks", _checked_blocks(self.blocks))

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> Plan:
        entry = tokens
        steps: list[Step | None] = [None] * blocks
        for block in resolve_blocks(self.blocks, blocks):
            patches = tokens - prefix
            keep = _rounded(math.ceil(self.keep * patches), prefix + self.fuse, patches - 1, self.multiple)
            if keep == patches:
                continue
            ranked = self.score == "cls"
            step = Prune(keep, self.fuse) if ranked else Prune(keep, self.fuse, None, self.seed * blocks + block)
            steps[block], tokens = step, step.leaves(tokens, prefix)
        return Plan(tuple(steps), entry, prefix)


@dataclass(frozen=True)
class TCA:
    """Keep the patches CLS attends to most, merge the next ones around a few centres, fuse the others into one token.

    Of P patches a block drops m = P + 1 - ⌈(1-rate)·P⌉ twice: P + 1 - 3m are kept, 2m merge into `centers` tokens,
    m - 1 become the token Σ aᵢxᵢ, a the head-mean CLS attention. `ck.Reservoir` is the method's other half.

    Args:
        rate: r in [0, 1). The paper's "R=0.9" is 0.035, its "R=0.7" is 0.1; 0 keeps everything.
        blocks: zero-based blocks that condense; None as in `EViT`.
        centers: tokens that the merging patches become; the paper has 2, its released code 4.
        score: "rank", the mean over heads of the place a patch has in each, as the paper describes, or "attention",
            the mean of the heads' CLS attention, as its released code computes. Towers that do not pool CLS alone
            rank by the attention received, which is a mean already: there the two are one.
        seed: of the first centre, another place among the merging patches for each block but the same for all images;
            None is the highest score.
        multiple: as in `EViT`; the patches that are kept more are not fused.
    Raises:
        ValueError: arguments out of range, or, from `plan`, a block the tower does not have, or a rate that leaves a
            block nothing to keep, merge or fuse, naming the block and the rates that would do.
    Source: TCA, arXiv 2410.14729, section 3; how the patches are divided is that of its released code.
    """

    rate: float
    blocks: tuple[int, ...] | None = None
    centers: int = 2
    score: Literal["rank", "attention"] = "rank"
    seed: int | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        _check_multiple(self.multiple)
        if isinstance(self.rate, bool) or not isinstance(self.rate, (int, float)) or not 0 <= self.rate < 1:
            raise ValueError(f"rate must be a number in [0, 1), got {self.rate!r}")
        if isinstance(self.centers, bool) or not isinstance(self.centers, int) or self.centers < 1:
            raise ValueError(f"centers must be a positive int, got {self.centers!r}")
        if self.score not in ("rank", "attention"):
            raise ValueError(f'score must be "rank" or "attention", got {self.score!r}')
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0):
            raise ValueError(f"seed must be a non-negative int or None, got {self.seed!r}")
        object.__setattr__(self, "blocks", _checked_blocks(self.blocks))

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> Plan:
        entry = tokens
        steps: list[Step | None] = [None] * blocks
        for block in resolve_blocks(self.blocks, blocks):
            if not self.rate:
                break
            patches = tokens - prefix
            split = self._split(patches, self.rate)
            if split is None:
                wrong = (
                    f"block {block} cannot condense {patches} patches at rate {self.rate} into {self.centers} centers"
                )
                raise ValueError(f"{wrong}: {self._valid(entry, blocks, prefix)}")
            keep, merge = split
            keep = _rounded(keep, prefix + self.centers + 1, patches - merge - 1, self.multiple)
            first = 0 if self.seed is None else random.Random(self.seed * blocks + block).randrange(merge)
            step = Condense(keep, merge, self.centers, "rank" if self.score == "rank" else "mean", first)
            steps[block], tokens = step, step.leaves(tokens, prefix)
        return Plan(tuple(steps), entry, prefix)

    def _split(self, patches: int, rate: float) -> tuple[int, int] | None:
        """How many patches are kept and merged, None where too few would be left of either or none would go."""
        n = math.ceil((1 - rate) * patches)
        m = patches + 1 - n
        fits = n - 2 * m >= 1 and 2 * m >= self.centers and m >= 2 and 3 * m > self.centers + 2
        return (n - 2 * m, 2 * m) if fits else None

    def _valid(self, tokens: int, blocks: int, prefix: int) -> str:
        """The rates, in thousandths, that every named block can take."""
        valid = []
        for rate in (thousandth / 1000 for thousandth in range(1, 1000)):
            patches: int | None = tokens - prefix
            for _ in resolve_blocks(self.blocks, blocks):
                split = patches and self._split(patches, rate)
                patches = split[0] + self.centers + 1 if split else None
            if patches:
                valid.append(rate)
        return f"valid rates are {valid[0]:g} to {valid[-1]:g}" if valid else "no rate is valid"


@dataclass(frozen=True)
class ToMe:
    """Merge r tokens per block, each into its most similar neighbour.

    Args:
        r: an int for every block, or one int per block, padded with 0. Clamped per block to half of the tokens after
            the prefix.
        inflect: from -1 (many merges in the first blocks, none in the last) over 0 (constant) to 1; 0 where r is given
            per block.
        proportional: weigh keys by the size of their token in the attention of later blocks.
    Raises:
        ValueError: a negative r, an r that is no int, an inflect outside [-1, 1] or beside an r per block, or, from
            `plan`, more entries than the tower has blocks.
    Source: ToMe, arXiv 2210.09461, section 3; the inflected schedule is that of its released code.
    """

    r: int | Sequence[int]
    inflect: float = 0.0
    proportional: bool = True

    def __post_init__(self) -> None:
        counts = tuple(self.r) if isinstance(self.r, Sequence) else None
        for count in (self.r,) if counts is None else counts:
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f"r must be a non-negative int, or one per block, got {self.r!r}")
        inflect = self.inflect
        if isinstance(inflect, bool) or not isinstance(inflect, (int, float)) or not -1 <= inflect <= 1:
            raise ValueError(f"inflect must be a number in [-1, 1], got {inflect!r}")
        if counts is not None:
            if inflect:
                raise ValueError(f"inflect must be 0 beside an r per block, got {inflect!r}")
            object.__setattr__(self, "r", counts)

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> Plan:
        entry = tokens
        steps: list[Step | None] = []
        for r in self._schedule(blocks):
            r = min(r, (tokens - prefix) // 2)
            steps.append(Merge(r, self.proportional) if r else None)
            tokens -= r
        return Plan(tuple(steps), entry, prefix)

    def _schedule(self, blocks: int) -> list[int]:
        if isinstance(self.r, int):
            low = int(self.r * (1 - self.inflect))
            high = 2 * self.r - low
            return [int(low + block * (high - low) / max(1, blocks - 1)) for block in range(blocks)]
        if len(self.r) > blocks:
            raise ValueError(f"r must have at most one entry per block, {blocks} here, got {len(self.r)}")
        return [*self.r, *[0] * (blocks - len(self.r))]


@dataclass(frozen=True)
class PatchRanking:
    """Keep the patches that a predictor ranks highest, which has learnt what CLIP's answer can do without.

    Args:
        predictor: of the tower, from `clipkernels.learn.patch_ranking.fit_predictor`.
        keep: share of the patches kept, in (0, 1]; with 1 the predictor is not asked.
        block: zero-based block before which the others go; None is the one that the predictor is for.
        tokens: learnt ones that stand beside the patches in every block, from
            `clipkernels.learn.patch_ranking.fit_tokens`, or None.
        multiple: as in `EViT`.
    Raises:
        ValueError: keep outside (0, 1], a block that is not the predictor's, or, from `plan`, tokens or blocks of
            another tower than the predictor's.
        TypeError: a predictor or tokens that are something else.
    Source: Patch Ranking, arXiv 2409.14607.
    """

    predictor: Predictor
    keep: float = 0.6
    block: int | None = None
    tokens: LearntTokens | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        _check_multiple(self.multiple)
        if not hasattr(self.predictor, "macs"):
            raise TypeError(f"predictor must be a RankPredictor, got {type(self.predictor).__name__}")
        if self.tokens is not None and not hasattr(self.tokens, "count"):
            raise TypeError(f"tokens must be VisualTokens or None, got {type(self.tokens).__name__}")
        _check_keep(self.keep)
        if self.block not in (None, self.predictor.block):
            raise ValueError(f"block must be that of the predictor, {self.predictor.block}, got {self.block!r}")
        object.__setattr__(self, "block", self.predictor.block)

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> Plan:
        block, trained = self.predictor.block, (self.predictor.tokens, self.predictor.prefix)
        if (tokens, prefix) != trained:
            raise ValueError(
                f"the predictor is for {trained[0]} tokens, {trained[1]} of them prefix, got {tokens} and {prefix}"
            )
        if block >= blocks:
            raise ValueError(f"the predictor is for block {block}, got a tower of {blocks} blocks")
        steps: list[Step | None] = [None] * blocks
        learnt = 0 if self.tokens is None else self.tokens.count
        keep = _rounded(math.ceil(self.keep * (tokens - prefix)), prefix + learnt, tokens - prefix, self.multiple)
        if keep < tokens - prefix:
            steps[block] = Predict(keep, self.predictor.macs)
        return Plan(tuple(steps), tokens, prefix, learnt)

    def weights(self) -> dict[str, nn.Module]:
        """Predictor and learnt tokens."""
        found: dict[str, Any] = {"predictor": self.predictor}
        return found | ({} if self.tokens is None else {"learnt": self.tokens})

    def check_tower(self, tower: Tower) -> None:
        """Raises ValueError unless predictor and learnt tokens are for this tower."""
        self.predictor.check_tower(tower)
        if self.tokens is not None:
            self.tokens.check_tower(tower)


def resolve_blocks(blocks: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    """The zero-based blocks meant by `blocks` on a tower of `depth` blocks, ascending; None is the default schedule.

    Raises:
        ValueError: a block the tower does not have.
    """
    if blocks is None:
        return (3, 6, 9) if depth >= 10 else tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))
    for block in blocks:
        if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < depth:
            raise ValueError(f"blocks must be ints in [0, {depth - 1}] on a tower of {depth} blocks, got {block!r}")
    return tuple(sorted(set(blocks)))


def _check_keep(keep: float) -> None:
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise ValueError(f"keep must be a number in (0, 1], got {keep!r}")


def _check_multiple(multiple: int) -> None:
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"multiple must be a positive int, got {multiple!r}")


def _rounded(keep: int, others: int, most: int, multiple: int) -> int:
    """The least count of `keep` or more that makes a multiple with the others; `keep` itself where that is above
    `most`."""
    more = keep + -(keep + others) % multiple
    return more if more <= most else keep


def _checked_blocks(blocks: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if isinstance(blocks, int):
        raise ValueError(f"blocks must be a tuple of ints such as (3, 6, 9), got {blocks!r}")
    return None if blocks is None else tuple(blocks)
