"""One pre-norm transformer block with a step between its attention and its MLP, for the blocks of every library.

x = x + attention(norm1(x));  x = step(x, signal);  x = x + mlp(norm2(x))

A `Predict` step runs before attention, so that this block's attention gets cheaper too.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkernels import ops
from clipkernels.ops import unchecked
from clipkernels.ops.merge import merge_matched
from clipkernels.plan import Condense, Merge, Predict, Prune, Rank, Step
from clipkernels.reference import Norm
from clipkernels.row_places import (
    append_identity,
    gather_rope,
    origin_of,
    patches_after_merging,
    rows_after_merging,
    rows_after_pruning,
)


class Branch(NamedTuple):
    """The term scale·(y + bias) that is added to the residual stream.

    y is (B,M,C). bias and scale are (C,), or None if y already includes them.
    """

    y: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


class Parts(Protocol):
    """An adapter's view of a host's block, with the weights that it had when it was read: see `adapters.blocks`.

    With `fused`, a branch leaves its bias and its layer scale to the sum that follows, as far as the host allows.
    """

    @property
    def norm1(self) -> Norm | None:
        """(weight, bias, eps) of the norm before attention; None if its module must be called."""

    @property
    def norm2(self) -> Norm | None:
        """(weight, bias, eps) of the norm before the MLP; None if its module must be called."""

    def qkv(
        self, x: Tensor, normed: Tensor | None, rows: int | None, rope: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (B,H,rows or N,D), k and v (B,H,N,D) of the tokens x (B,N,C).

        Args:
            x: the tokens.
            normed: norm1 of x, or None to compute it.
            rows: compute q only for these leading rows; None for all.
            rope: rotary table (…,P,2·D) of the patches' positions, applied to q and k, or None.
        """

    def project(self, out: Tensor, fused: bool) -> Branch:
        """The attention branch: output projection and layer scale of attention's output (B,H,M,D)."""

    def mlp(self, x: Tensor, normed: Tensor | None, fused: bool) -> Branch:
        """The MLP branch of x (B,M,C): norm2, MLP and layer scale. `normed` is norm2 of x, or None to compute it."""


class Predictor(Protocol):
    """A ranking of the patches that reads the tokens entering a block."""

    def __call__(self, x: Tensor, prefix: int) -> Tensor:
        """Scores (B,P) of the patches of x (B,prefix+P,C)."""


class TokenState(NamedTuple):
    """The tokens between two blocks, and the tensors that travel with them.

    x (B,N,C): the tokens.
    normed (B,N,C): norm1 of x if the previous block has computed it, or None.
    size (B,N): the number of patches that each token stands for; None before any merge.
    rope (…,P,2·D): the host's rotary table of the patches, sines then cosines, or None.
    """

    x: Tensor
    normed: Tensor | None = None
    size: Tensor | None = None
    rope: Tensor | None = None


class Ranking(NamedTuple):
    """The scores (B,P) of the patches, a mean over heads, and their keys (B,P,D), a mean over heads."""

    scores: Tensor
    keys: Tensor


class BlockOutput(NamedTuple):
    """The tokens that leave a block.

    state: the tokens.
    destination: the row (B,N) of each entering row, -1 for a dropped one; None if rows are not tracked.
    origin: the entering patch (B,P') whose position each leaving patch has; a fused token has that of the first
        patch in it. None if it is not requested, or if no step moves a patch.
    ranking: the scores and keys of a `Rank` step, else None.
    """

    state: TokenState
    destination: Tensor | None
    origin: Tensor | None = None
    ranking: Ranking | None = None


def forward(
    parts: Parts,
    state: TokenState,
    step: Step | None,
    prefix: int,
    *,
    proportional: bool = False,
    rows: int | None = None,
    track: bool = False,
    place: bool = False,
    next_norm: Norm | None = None,
    fused: bool = False,
    anchors: Tensor | None = None,
    predictor: Predictor | None = None,
) -> BlockOutput:
    """Run one block.

    Args:
        parts: the host's block.
        state: the tokens that enter.
        step: the operation on the tokens, or None.
        prefix: number of leading tokens that no step touches.
        proportional: weigh keys by the size of their token.
        rows: compute only these leading rows; None for all. With `rows`, a step after attention is ignored,
            because it moves no prefix token.
        track: also return the destination of every row.
        place: also return the origin of every patch.
        next_norm: norm1 of the next block, computed together with the last sum.
        fused: run sums, norms and activations as kernels, and every operation unchecked.
        anchors: (A,C) CLS tokens; rows of zeros do not count. The anchor most similar to an image's CLS token joins
            attention as one more token, and is dropped after it. None for no anchor.
        predictor: ranks the patches for a `Predict`.
    """
    (x, normed, size, rope), destination, origin, ranking = state, None, None, None
    run: Any = unchecked if fused else ops
    add_norm = unchecked.add_norm if fused else partial(ops.add_norm, backend="reference")
    if isinstance(step, Predict):
        assert predictor is not None
        norm1 = parts.norm1 if fused else None
        prune = Prune(step.keep, fuse=False)
        pruned = _prune(ops, state, predictor(x, prefix), prune, prefix, norm1, track, place)
        (x, normed, size, rope), destination, origin, _ = pruned
        step = None
    step = step if rows is None else None
    # Merging compares the keys themselves: their mean over heads is part of matching.
    signal = step.signal if isinstance(step, (Prune, Condense, Rank)) else None
    weights = size if proportional else None
    if anchors is None:
        q, k, v = parts.qkv(x, normed, rows, rope)
        out, scores = run.attention(q, k, v, weights, signal, prefix)
    else:
        anchored = torch.cat([x, _nearest_anchor(anchors, x[:, 0])[:, None].to(x.dtype)], 1)
        q, k, v = parts.qkv(anchored, None, rows, None if rope is None else append_identity(rope))
        weights = None if weights is None else torch.cat([weights, torch.ones_like(weights[:, :1])], 1)
        out, scores = run.attention(q, k, v, weights, signal, prefix)
        out, scores = out[:, :, : x.shape[1]], None if scores is None else scores[..., :-1]
    if isinstance(step, Rank):
        assert scores is not None
        scores = scores.mean(1) if scores.ndim == 3 else scores
        ranking, step = Ranking(scores, k[:, :, prefix : x.shape[1]].mean(1).detach()), None
    norm2 = parts.norm2 if fused else None
    branch = parts.project(out, fused)
    residual = x if rows is None else x[:, :rows]
    x, normed = add_norm(residual, branch.y, branch.bias, branch.scale, None if step else norm2)
    if isinstance(step, Prune):
        if scores is None:
            scores = _random_scores(x.shape[1] - prefix, step.seed, x.device).expand(x.shape[0], -1)
        state = TokenState(x, None, size, rope)
        (x, normed, size, rope), destination, origin, _ = _prune(run, state, scores, step, prefix, norm2, track, place)
    elif isinstance(step, Condense):
        assert scores is not None
        condensed = run.condense_tokens(
            x, scores, step.keep, step.merge, step.centers, scores, step.heads, prefix, step.first, norm2
        )
        leading = torch.arange(prefix, device=x.device).expand(x.shape[0], -1)
        destination = torch.cat([leading, condensed.source], 1) if track else None
        origin = origin_of(condensed.index, condensed.source, prefix + step.keep + step.centers) if place else None
        rope = None if rope is None else gather_rope(rope, condensed.index, fused=True)
        size = None if size is None else _sizes_after_condensing(size, condensed, prefix)
        x, normed = condensed.tokens, condensed.normed
    elif isinstance(step, Merge):
        # Sources and targets alternate. Only CLS may be among them: registers would end up between patches.
        lead = max(prefix - 1, 0)
        match = run.match_tokens(k[:, :, lead:], step.r, prefix - lead)
        destination = rows_after_merging(match, x.shape[1], lead) if track else None
        if place or rope is not None:
            origin = patches_after_merging(match, x.shape[1] - lead, prefix - lead)
            rope = None if rope is None else gather_rope(rope, origin)
        sizes = None if size is None else size[:, lead:]
        merge = unchecked.merge_tokens if fused else merge_matched
        merged = merge(x[:, lead:], match, sizes, None if lead else norm2)
        x, size, normed = merged if not lead else _prepend(x[:, :lead], merged)
    branch = parts.mlp(x, normed, fused)
    x, normed = add_norm(x, branch.y, branch.bias, branch.scale, next_norm)
    return BlockOutput(TokenState(x, normed, size, rope), destination, origin if place else None, ranking)


def _prune(
    run: Any, state: TokenState, scores: Tensor, step: Prune, prefix: int, norm: Norm | None, track: bool, place: bool
) -> BlockOutput:
    """The tokens after pruning by `run`, checked or unchecked, with `normed` computed by `norm`."""
    x, _, size, rope = state
    keep, fuse = step.keep, step.fuse
    pruned = run.prune_tokens(x, scores, keep, fuse, "mean", prefix, norm)
    destination = rows_after_pruning(pruned.index, keep, fuse, x.shape[1], prefix) if track else None
    rope = None if rope is None else gather_rope(rope, pruned.index, fuse)
    if size is not None:
        # A fused token counts as one patch from here on.
        size = torch.cat([size[:, :prefix], size.gather(1, pruned.index + prefix), size.new_ones(x.shape[0], fuse)], 1)
    origin = pruned.index
    if place and fuse:
        rows = rows_after_pruning(pruned.index, keep, fuse, state.x.shape[1], prefix)
        origin = origin_of(pruned.index, rows[:, prefix:], prefix + keep)
    return BlockOutput(TokenState(pruned.tokens, pruned.normed, size, rope), destination, origin)


def _prepend(leading: Tensor, merged: ops.Merged) -> tuple[Tensor, Tensor, None]:
    """Tokens and sizes of a merge, with leading tokens (B,n,C) of size 1 put back in front."""
    ones = merged.size.new_ones(leading.shape[:2])
    return torch.cat([leading, merged.tokens], 1), torch.cat([ones, merged.size], 1), None


def _nearest_anchor(anchors: Tensor, cls: Tensor) -> Tensor:
    """The anchor (B,C) with the largest cosine to each CLS token (B,C)."""
    with torch.autocast(cls.device.type, enabled=False):
        table = anchors.to(torch.promote_types(cls.dtype, torch.float32))
        cosine = normalize(cls.to(table.dtype), dim=-1) @ normalize(table, dim=-1).T
    return table[cosine.masked_fill((table == 0).all(-1), float("-inf")).argmax(1)]


def _sizes_after_condensing(size: Tensor, condensed: ops.Condensed, prefix: int) -> Tensor:
    """Sizes (B,M) after condensing: a centre has the total size of its cluster, the fused token has 1."""
    members = torch.arange(condensed.tokens.shape[1] - 1, device=size.device)[:, None] == condensed.source[:, None]
    patches = (members * size[:, None, prefix:]).sum(2)[:, prefix:]
    return torch.cat([size[:, :prefix], patches, torch.ones_like(size[:, :1])], 1)


def _random_scores(patches: int, seed: int, device: torch.device) -> Tensor:
    """Scores (1,P) fp32 in a random order that depends only on P and the seed. They sum to one, as attention does."""
    mask, odd = 0xFFFFFFFF, 0x45D9F3B
    # An integer hash, computed on the device: a generator of torch needs state, and a table a copy in every forward.
    bits = (torch.arange(patches, device=device) + ((seed * 0x9E3779B9 + odd) & mask)) & mask
    for _ in range(3):
        bits = ((bits ^ (bits >> 16)) * odd) & mask
    scores = ((bits ^ (bits >> 16)) >> 8).float() + 1
    return (scores / scores.sum())[None]
