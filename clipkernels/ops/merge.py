"""Bipartite soft matching of tokens, and the merge: `match_tokens`, `merge_tokens`."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import reference
from clipkernels.arguments import (
    check_floating,
    check_int,
    check_norm,
    check_prefix,
    check_size,
    check_tensors,
    check_tokens,
    describe,
    shape_of,
    values_are_readable,
)
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
        TypeError: metric is no tensor.
        ValueError: the shape or dtype does not match, or r is out of range.
    Source: ToMe, arXiv 2210.09461, section 3. Without CLS the released code has `kept` in order of similarity.
    """
    _check_match(metric, r, prefix)
    even, width = (metric.shape[-2] + 1) // 2, metric.shape[-1]
    chosen = _backend.choose(backend, metric.device, metric.dtype, "match_tokens", scores=even, width=width)
    return (reference.match_tokens if chosen == "reference" else _merge.match_tokens)(metric, r, prefix)


def merge_tokens(
    x: Tensor, match: Match, size: Tensor | None = None, norm: Norm | None = None, *, backend: Backend = "auto"
) -> Merged:
    """The tokens after a merge: the remaining A tokens in order, then the B tokens as means weighted by size.

    Args:
        x: (B,N,C) tokens.
        match: the result of `match_tokens`. Its values are checked on the CPU only, because a GPU would have to be
            waited for.
        size: (B,N) patches merged into each token, finite and at least 0; None is all ones. A token of size 0 adds
            nothing to another, whatever it holds. Of two tokens of size 0 the target remains.
        norm: (weight (C,), bias (C,), eps): also return the LayerNorm of the result.
        backend: "auto", "triton" or "reference".
    Returns:
        Merged(tokens (B,N-r,C), size (B,N-r) fp32 (fp64 for fp64 inputs), normed). The sizes of an image sum to those
        of the input.
    Raises:
        TypeError: an argument is no tensor, match no `Match`, or norm no tuple.
        ValueError: shapes, dtypes or devices do not match, or indices or sizes are out of range.
    Guarantees: tokens that no token merged into are bit-equal copies; equal tokens merge to themselves; fp32
        accumulation; differentiable in x.
    Source: ToMe, arXiv 2210.09461, section 3.
    """
    _check_merge(x, match, size, norm)
    return merge_matched(x, match, size, norm, backend)


def merge_matched(x: Tensor, match: Match, size: Tensor | None, norm: Norm | None, backend: Backend = "auto") -> Merged:
    """`merge_tokens` of a match that `match_tokens` gives: without checks, which take a quarter of the time."""
    pairs, width = match.source.shape[1], x.shape[2]
    chosen = _backend.choose(backend, x.device, x.dtype, "merge_tokens", pairs=pairs, width=width)
    return (reference.merge_tokens if chosen == "reference" else _merge.merge_tokens)(x, match, size, norm)


def _check_match(metric: Tensor, r: int, prefix: int) -> None:
    check_tensors(metric=metric)
    if metric.ndim not in (3, 4) or (metric.ndim == 4 and not metric.shape[1]):
        raise ValueError(f"metric must be (B,N,D) or (B,H,N,D), got {shape_of(metric)}")
    check_floating(metric=metric)
    check_prefix(prefix, metric.shape[-2])
    check_int("r", r, 0, (metric.shape[-2] - prefix) // 2, "(N - prefix)//2")


def _check_merge(x: Tensor, match: Match, size: Tensor | None, norm: Norm | None) -> None:
    check_tokens(x)
    if not isinstance(match, Match):
        raise TypeError(f"match must be an ops.Match, got {describe(match)}: call ops.match_tokens")
    kept, source, target = match
    check_tensors(**{"match's kept": kept, "match's source": source, "match's target": target})
    batch, tokens, _ = x.shape
    r = source.shape[-1] if source.ndim else 0
    expected = ((batch, (tokens + 1) // 2 - r), (batch, r), (batch, r))
    actual = (kept.shape, source.shape, target.shape)
    if actual != expected:
        shapes = tuple(map(tuple, actual))
        raise ValueError(f"match must hold kept, source, target of shapes {expected} for x {shape_of(x)}, got {shapes}")
    for index in match:
        if index.dtype != torch.int64 or index.device != x.device:
            raise ValueError(f"match must be int64 on {x.device}, got {[(i.dtype, str(i.device)) for i in match]}")
    check_size(size, x, batch, tokens)
    check_norm(norm, x)
    if values_are_readable(*match):
        even = torch.cat([kept, source], 1).sort(1).values
        if not torch.equal(even, torch.arange(even.shape[1]).expand_as(even)):
            raise ValueError(f"match's kept and source must hold each of the {even.shape[1]} even tokens once")
        if ((target < 0) | (target >= tokens // 2)).any():
            low, high = int(target.min()), int(target.max())
            raise ValueError(f"match's target must be from 0 to N//2 - 1 = {tokens // 2 - 1}, got {low} to {high}")
