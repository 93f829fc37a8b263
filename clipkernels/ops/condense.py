"""Condensing: keep the best patches, merge the next best around centres, fuse the rest: `condense_tokens`."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import reference
from clipkernels.arguments import check_int, check_scores
from clipkernels.backend import Backend
from clipkernels.custom_ops import condense as _condense
from clipkernels.ops.prune import check_prune
from clipkernels.reference import Condensed, Heads, Norm

# A program holds a tile of all merging patches in registers; of more than these it would spill most.
MAX_MERGE = 512


def condense_tokens(
    x: Tensor,
    scores: Tensor,
    keep: int,
    merge: int,
    centers: int,
    weights: Tensor | None = None,
    heads: Heads = "mean",
    prefix: int = 1,
    first: int = 0,
    norm: Norm | None = None,
    *,
    backend: Backend = "auto",
) -> Condensed:
    """Prefix, `keep` best patches by descending score, the next `merge` merged into `centers` tokens, the rest fused.

    K-centre greedy chooses the centres: each next centre is the patch farthest (Euclidean) from its nearest centre so
    far. Every merging patch joins its nearest centre. A centre's token is Σ wᵢxᵢ / Σ wᵢ over the patches that joined
    it, with wᵢ = 1/‖xᵢ-c‖, or 1 at distance 0. Of equally far patches the one with the higher score becomes the centre;
    of equally near centres a patch joins the earlier one. A patch at a distance that is not finite is farthest and adds
    nothing to a centre's token. A centre that no patch joins, or that is not finite, yields its own token.

    Args:
        x: (B,N,C) tokens.
        scores: (B,P), or per head (B,H,P) and then reduced by `heads`; any float dtype.
        keep: number of patches to keep, 0 to P - merge.
        merge: number of patches to merge, 1 to P - keep.
        centers: number of tokens that they merge into, 1 to merge.
        weights: (B,P), or per head (B,H,P) and then averaged: weight of each patch in the fused token Σ weightᵢ·xᵢ,
            not renormalised. None is the reduced scores. A weight of NaN or -inf counts as 0, and a patch that counts
            as 0 adds nothing, whatever it holds.
        heads: "mean" or "rank", as in `rank_tokens`.
        prefix: leading tokens that are always kept.
        first: rank of the first centre among the merging patches in descending score; 0 is the highest score.
        norm: (weight (C,), bias (C,), eps): also return the LayerNorm of the result.
        backend: "auto", "triton" or "reference".
    Returns:
        Condensed(tokens (B,prefix+keep+centers+1,C), source (B,P) int64, the row of tokens that contains each patch,
        index (B,keep+centers) int64, the patch of each kept row and each centre, normed).
    Raises:
        TypeError: an argument is no tensor, or norm no tuple.
        ValueError: shapes, dtypes or devices do not match, or a count is out of range.
    Guarantees: kept rows are bit-equal copies; distances and sums in fp32, and distances from differences, so that a
        centre is at distance 0 from itself; deterministic; differentiable in x, through the weights wᵢ too, and in the
        weights of the fused token. A weight at distance 0 is a constant. Choices have no gradient.
    Source: TCA, arXiv 2410.14729, section 3.2. The released code draws the first centre at random, and gives zeros for
        a centre that no patch joins.
    """
    _check_condense(x, scores, keep, merge, centers, weights, heads, prefix, first, norm)
    dtypes = (tensor.dtype for tensor in (x, scores, weights) if tensor is not None)
    dtype = reduce(torch.promote_types, dtypes)
    patches, width = x.shape[1] - prefix, x.shape[2]
    refusal = None if merge <= MAX_MERGE else f"merges at most {MAX_MERGE} patches, got {merge}"
    chosen = _backend.choose(backend, x.device, dtype, "condense_tokens", refusal, scores=patches, width=width)
    run = reference.condense_tokens if chosen == "reference" else _condense.condense_tokens
    return run(x, scores, keep, merge, centers, weights, heads, prefix, first, norm)


def _check_condense(
    x: Tensor,
    scores: Tensor,
    keep: int,
    merge: int,
    centers: int,
    weights: Tensor | None,
    heads: str,
    prefix: int,
    first: int,
    norm: Norm | None,
) -> None:
    check_prune(x, scores, keep, heads, prefix, norm)
    patches = x.shape[1] - prefix
    check_int("merge", merge, 1, patches - keep, "P - keep")
    check_int("centers", centers, 1, merge, "merge")
    check_int("first", first, 0, merge - 1, "merge - 1")
    if weights is not None:
        check_scores(weights, x, patches, "weights")
