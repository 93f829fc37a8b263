"""Bipartite soft matching of tokens, and the merge: `match_tokens`, `merge_tokens`."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import reference
from clipkernels.arguments import check_floating, check_norm, check_prefix, check_size, check_tokens, shape_of
from clipkernels.backend import Backend
from clipkernels.custom_ops import merge as _merge
from clipkernels.reference import Match, Merged, Norm


def match_tokens(metric: Tensor, r: int, prefix: int = 1, *, backend: Backend = "auto") -> Match:
    """The r most similar pairs of tokens to merge: an even token and its most similar odd token.

    Each token at an even position (A) has an edge to its most similar token at an odd position (B), by cosine
    similarity in fp32. The r strongest edges merge. Prefix tokens neither merge nor are merged into.

    Args:
        metric: (B,N,D), or keys (B,H,N,D), whose mean over heads is then the metric. It is normalised here.
        r: number of edges to merge, 0 to (N - prefix)//2.
        prefix: leading tokens that take no part.
        backend: "auto", "triton" or "reference".
    Returns:
        Match(kept (B,A-r), source (B,r), target (B,r)), int64: kept and source index the A tokens in ascending order,
        target indexes the B tokens.
    Raises:
        ValueError: the shape or dtype does not match, or r is out of range.
    Source: ToMe, arXiv 2210.09461, section 3. Without CLS the released code has `kept` in order of similarity.
    """
    _check_match(metric, r, prefix)
    chosen = _backend.choose(backend, metric.device, metric.dtype, "match_tokens")
    return (reference.match_tokens if chosen == "reference" else _merge.match_tokens)(metric, r, prefix)


def merge_tokens(
    x: Tensor, match: Match, size: Tensor | None = None, norm: Norm | None = None, *, backend: Backend = "auto"
) -> Merged:
    """The tokens after a merge: the remaining A tokens in order, then the B tokens as means weighted by size.

    Args:
        x: (B,N,C) tokens.
        match: the result of `match_tokens`.
        size: (B,N) patches merged into each token; None is all ones.
        norm: (weight (C,), bias (C,), eps): also return the LayerNorm of the result.
        backend: "auto", "triton" or "reference".
    Returns:
        Merged(tokens (B,N-r,C), size (B,N-r) fp32, normed). The sizes of an image sum to those of the input.
    Raises:
        ValueError: shapes, dtypes or devices do not match.
    Guarantees: tokens that no token merged into are bit-equal copies; equal tokens merge to themselves; fp32
        accumulation; differentiable in x.
    Source: ToMe, arXiv 2210.09461, section 3.
    """
    _check_merge(x, match, size, norm)
    chosen = _backend.choose(backend, x.device, x.dtype, "merge_tokens")
    return (reference.merge_tokens if chosen == "reference" else _merge.merge_tokens)(x, match, size, norm)


def _check_match(metric: Tensor, r: int, prefix: int) -> None:
    if metric.ndim not in (3, 4) or (metric.ndim == 4 and not metric.shape[1]):
        raise ValueError(f"metric must be (B,N,D) or (B,H,N,D), got {shape_of(metric)}")
    check_floating(metric=metric)
    check_prefix(prefix, metric.shape[-2])
    limit = (metric.shape[-2] - prefix) // 2
    if isinstance(r, bool) or not isinstance(r, int) or not 0 <= r <= limit:
        raise ValueError(f"r must be an int from 0 to (N - prefix)//2 = {limit}, got {r!r}")


def _check_merge(x: Tensor, match: Match, size: Tensor | None, norm: Norm | None) -> None:
    check_tokens(x)
    batch, tokens = x.shape[:2]
    r = match.source.shape[-1]
    expected = ((batch, (tokens + 1) // 2 - r), (batch, r), (batch, r))
    actual = tuple(tuple(index.shape) for index in match)
    if actual != expected:
        raise ValueError(f"match must hold kept, source, target of shapes {expected} for x {shape_of(x)}, got {actual}")
    if any(index.dtype != torch.int64 or index.device != x.device for index in match):
        raise ValueError(f"match must be int64 on {x.device}, got {[(i.dtype, str(i.device)) for i in match]}")
    check_size(size, x, batch, tokens)
    check_norm(norm, x)
