"""Pruning: keep the best patches in their original order: `prune_tokens`."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import reference
from clipkernels.arguments import (
    check_choice,
    check_flags,
    check_int,
    check_norm,
    check_prefix,
    check_scores,
    check_tokens,
)
from clipkernels.backend import Backend
from clipkernels.custom_ops import prune as _prune
from clipkernels.reference import Heads, Norm, Pruned


def prune_tokens(
    x: Tensor,
    scores: Tensor,
    keep: int,
    fuse: bool = False,
    heads: Heads = "mean",
    prefix: int = 1,
    norm: Norm | None = None,
    *,
    backend: Backend = "auto",
) -> Pruned:
    """The prefix and the `keep` best patches in their original order, optionally with the rest fused into one token.

    Args:
        x: (B,N,C) tokens.
        scores: (B,P), or per head (B,H,P) and then reduced by `heads`; any float dtype.
        keep: number of patches to keep, 0 to P.
        fuse: append Σ scoreᵢ·xᵢ over the dropped patches, not renormalised, accumulated in fp32. A score of NaN or -inf
            counts as 0 in this sum. A patch that counts as 0 adds nothing, whatever it holds. With keep = P the sum is
            a row of zeros.
        heads: "mean" or "rank", as in `rank_tokens`.
        prefix: leading tokens that are always kept.
        norm: (weight (C,), bias (C,), eps): also return the LayerNorm of the result.
        backend: "auto", "triton" or "reference".
    Returns:
        Pruned(tokens (B,prefix+keep[+1],C), index (B,keep) int64, the kept patches in ascending order, normed).
    Raises:
        TypeError: an argument is no tensor, or norm no tuple.
        ValueError: shapes, dtypes or devices do not match, or a count is out of range.
    Guarantees: kept rows are bit-equal copies; exactly `keep` patches are kept, for any scores; deterministic;
        differentiable in x and, with `fuse`, in the scores, unless ranks reduce them over heads.
    Source: EViT, arXiv 2202.07800, section 3.2.
    """
    check_prune(x, scores, keep, heads, prefix, norm)
    check_flags(fuse=fuse)
    dtype = torch.promote_types(x.dtype, scores.dtype)
    patches, width = x.shape[1] - prefix, x.shape[2]
    chosen = _backend.choose(backend, x.device, dtype, "prune_tokens", scores=patches, width=width)
    run = reference.prune_tokens if chosen == "reference" else _prune.prune_tokens
    return run(x, scores, keep, fuse, heads, prefix, norm)


def check_prune(x: Tensor, scores: Tensor, keep: int, heads: str, prefix: int, norm: Norm | None) -> None:
    """Raise unless the arguments of `prune_tokens` match each other."""
    check_tokens(x)
    check_prefix(prefix, x.shape[1])
    patches = x.shape[1] - prefix
    check_scores(scores, x, patches, "scores")
    check_int("keep", keep, 0, patches, "P")
    check_choice("heads", heads, "mean", "rank")
    check_norm(norm, x)
