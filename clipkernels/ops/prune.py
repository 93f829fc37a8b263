"""The best patches in their old order: `prune_tokens`."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import reference
from clipkernels.arguments import check_norm, check_prefix, check_scores, check_tokens
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
    """The prefix and the `keep` best patches in their old order, optionally with the rest fused into one token.

    Args:
        x: (B,N,C) tokens.
        scores: (B,P), or per head (B,H,P), then reduced by `heads`; any float dtype.
        keep: patches kept, 0 to P.
        fuse: append Σ scoreᵢ·xᵢ over the patches not kept, not renormalised, accumulated in fp32; a patch whose score
            is NaN or -inf weighs nothing. With keep = P this is a row of zeros.
        heads: "mean" or "rank", as in `rank_tokens`.
        prefix: leading tokens always kept.
        norm: (weight (C,), bias (C,), eps): also return the LayerNorm of the result.
        backend: "auto", "triton" or "reference".
    Returns:
        Pruned(tokens (B,prefix+keep[+1],C), index (B,keep) int64 into the patches, ascending, normed).
    Raises:
        ValueError: shapes, dtypes, devices or counts that do not fit.
    Guarantees: kept rows are bit-equal copies; exactly `keep` rows whatever the scores; deterministic; differentiable
        in x and, where they weigh the fused token, in scores (B,P).
    Source: EViT, arXiv 2202.07800, section 3.2.
    """
    check_prune(x, scores, keep, heads, prefix, norm)
    dtype = torch.promote_types(x.dtype, scores.dtype)
    chosen = _backend.choose(backend, x.device, dtype, "prune_tokens")
    run = reference.prune_tokens if chosen == "reference" else _prune.prune_tokens
    return run(x, scores, keep, fuse, heads, prefix, norm)


def check_prune(x: Tensor, scores: Tensor, keep: int, heads: str, prefix: int, norm: Norm | None) -> None:
    check_tokens(x)
    check_prefix(prefix, x.shape[1])
    patches = x.shape[1] - prefix
    check_scores(scores, x, patches, "scores")
    if isinstance(keep, bool) or not isinstance(keep, int) or not 0 <= keep <= patches:
        raise ValueError(f"keep must be an int from 0 to P = {patches}, got {keep!r}")
    if heads not in ("mean", "rank"):
        raise ValueError(f'heads must be "mean" or "rank", got {heads!r}')
    check_norm(norm, x)
