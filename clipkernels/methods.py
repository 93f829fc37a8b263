"""The methods: frozen configurations that turn (tokens, blocks) into a plan and do nothing else.

Methods convert ratios into counts, with the expressions of the published code. The ops take counts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from clipkernels.arguments import check_choice, check_flags, check_int, check_range, describe, is_list
from clipkernels.messages import quantity
from clipkernels.plan import Condense, Merge, Plan, Predict, Prune, Step

if TYPE_CHECKING:
    from torch import nn

    from clipkernels.adapters import Tower


class Predictor(Protocol):
    """A trained ranking of the patches that enter one block, such as `learn.patch_ranking.RankPredictor`.

    block: zero-based index of the block; the ranking runs before its attention.
    tokens, prefix: the number of tokens, and of leading tokens that are not patches, that it is trained for.
    macs: multiply-accumulates for one image.
    """

    block: int
    tokens: int
    prefix: int

    @property
    def macs(self) -> int: ...

    def check_tower(self, tower: Tower) -> None:
        """Raise ValueError unless the predictor is for this tower."""


class LearntTokens(Protocol):
    """Tokens trained to join the patches, such as `learn.patch_ranking.VisualTokens`.

    count: number of learnt tokens per block.
    """

    count: int

    def check_tower(self, tower: Tower) -> None:
        """Raise ValueError unless the tokens are for this tower."""


class Method(Protocol):
    """Anything hashable with a `plan`; a new method needs nothing else.

    A method with weights also has `weights()`, which returns the modules that `tower.run` takes by name, `predictor`
    and `learnt`, and `check_tower(tower)`, which raises ValueError if they were made for another tower.

    A method may have `shortfall(plan)`, which returns a sentence if a plan of its own does less than was asked for, or
    None. `ck.patch` warns with it.
    """

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> Plan:
        """The plan for a tower of `blocks` blocks that `tokens` tokens enter.

        No step may touch the first `prefix` tokens.
        """


@dataclass(frozen=True)
class Dense:
    """No reduction: the output of the host tower, computed faster.

    Query, key and value come from one packed projection. If only CLS is pooled, the last block computes its query,
    projection and MLP for the CLS row only.

    Guarantees: the host's output and gradients up to rounding; no token is dropped, merged or reordered.
    """

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> Plan:
        """The plan for a tower of `blocks` blocks that `tokens` tokens enter."""
        _check_sequence(tokens, blocks, prefix)
        return Plan((None,) * blocks, tokens, prefix)


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
        object.__setattr__(self, "blocks", _normalize_blocks(self.blocks))

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> Plan:
        """The plan for a tower of `blocks` blocks that `tokens` tokens enter."""
        _check_sequence(tokens, blocks, prefix)
        entry = tokens
        steps: list[Step | None] = [None] * blocks
        for block in resolve_blocks(self.blocks, blocks):
            patches = tokens - prefix
            keep = _round_up(math.ceil(self.keep * patches), prefix + self.fuse, patches - 1, self.multiple)
            if keep == patches:
                continue
            by_cls = self.score == "cls"
            step = Prune(keep, self.fuse) if by_cls else Prune(keep, self.fuse, None, self.seed * blocks + block)
            steps[block], tokens = step, step.leaves(tokens, prefix)
        return Plan(tuple(steps), entry, prefix)

    def shortfall(self, plan: Plan) -> str | None:
        """The warning for a plan that removes fewer tokens than the method asks for; None if it removes all."""
        return _shortfall(f"EViT(keep={self.keep})", plan, self.keep < 1, self.multiple)


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
        object.__setattr__(self, "blocks", _normalize_blocks(self.blocks))

    def plan(self, tokens: int, blocks: int, prefix: int = 1) -> Plan:
        """The plan for a tower of `blocks` blocks that `tokens` tokens enter."""
        _check_sequence(tokens, blocks, prefix)
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
            keep = _round_up(keep, prefix + self.centers + 1, patches - merge - 1, self.multiple)
            first = 0 if self.seed is None else random.Random(self.seed * blocks + block).randrange(merge)
            step = Condense(keep, merge, self.centers, "rank" if self.score == "rank" else "mean", first)
            steps[block], tokens = step, step.leaves(tokens, prefix)
        return Plan(tuple(steps), entry, prefix)

    def shortfall(self, plan: Plan) -> str | None:
        """The warning for a plan that removes fewer tokens than the method asks for; None if it removes all."""
        return _shortfall(f"TCA(rate={self.rate})", plan, self.rate > 0, self.multiple)

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
        _check_sequence(tokens, blocks, prefix)
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
        _check_sequence(tokens, blocks, prefix)
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
        keep = _round_up(math.ceil(self.keep * (tokens - prefix)), prefix + learnt, tokens - prefix, self.multiple)
        if keep < tokens - prefix:
            steps[block] = Predict(keep, self.predictor.macs)
        return Plan(tuple(steps), tokens, prefix, learnt)

    def shortfall(self, plan: Plan) -> str | None:
        """The warning for a plan that removes fewer tokens than the method asks for; None if it removes all."""
        return _shortfall(f"PatchRanking(keep={self.keep})", plan, self.keep < 1, self.multiple)

    def weights(self) -> dict[str, nn.Module]:
        """The modules of the method by name: `predictor` and, if there are learnt tokens, `learnt`."""
        modules: dict[str, Any] = {"predictor": self.predictor}
        return modules | ({} if self.tokens is None else {"learnt": self.tokens})

    def check_tower(self, tower: Tower) -> None:
        """Raise ValueError unless predictor and learnt tokens are for this tower."""
        self.predictor.check_tower(tower)
        if self.tokens is not None:
            self.tokens.check_tower(tower)


def resolve_blocks(blocks: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    """The zero-based blocks of a schedule on a tower of `depth` blocks, ascending; None is the default schedule.

    Raises:
        ValueError: a block that the tower does not have.
    """
    if blocks is None:
        return (3, 6, 9) if depth >= 10 else tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))
    for block in blocks:
        if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < depth:
            raise ValueError(
                f"blocks must be ints in [0, {depth - 1}] on a tower of {quantity(depth, 'block')}, got {block!r}"
            )
    return tuple(sorted(set(blocks)))


def _shortfall(method: str, plan: Plan, reduces: bool, multiple: int) -> str | None:
    """A sentence if a plan removes no token although its method reduces, or misses a multiple; else None."""
    if reduces and not any(plan.steps):
        return f"{method} removes none of {quantity(plan.entry, 'token')}: there are too few patches for this share"
    counts = [after for step, (_, after) in zip(plan.steps, plan.passes, strict=True) if step]
    missed = [count for count in counts if count % multiple]
    if not missed:
        return None
    remaining = quantity(missed[0], "token")
    return f"{method} leaves {remaining}, no multiple of {multiple}: there are too few patches to keep more"


def _round_up(keep: int, others: int, most: int, multiple: int) -> int:
    """The least count ≥ keep for which count + others is a multiple; `keep` if that exceeds `most`."""
    count = keep + -(keep + others) % multiple
    return count if count <= most else keep


def _normalize_blocks(blocks: Sequence[int] | None) -> tuple[int, ...] | None:
    """Blocks as a tuple, or None; raise ValueError unless they are a sequence of ints of at least 0."""
    if blocks is None:
        return None
    if not is_list(blocks):
        raise ValueError(f"blocks must be a tuple of ints such as (3, 6, 9), got {describe(blocks)}")
    for place, block in enumerate(blocks):
        check_int(f"blocks[{place}]", block, 0)
    return tuple(blocks)


def _check_sequence(tokens: int, blocks: int, prefix: int) -> None:
    """Raise ValueError unless a plan can be made for these numbers of tokens, blocks and prefix tokens."""
    check_int("blocks", blocks, 0, 2**16, "2¹⁶")
    check_int("prefix", prefix, 0, 2**31, "2³¹")
    check_int("tokens", tokens, prefix, 2**31, "2³¹")
