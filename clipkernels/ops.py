"""One public function per operation: validate, choose a backend, run.

B batch, N tokens, P = N - prefix patches, H heads, C width, D head width. The first `prefix` tokens (CLS, registers)
are never scored, dropped or merged. Ties go to the lower index and NaN counts as -inf, on every backend. Choices
carry no gradient: signals, ranks and matches come back detached.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import custom_ops, reference
from clipkernels.backend import Backend
from clipkernels.plan import Signal
from clipkernels.reference import Heads, Match, Merged, Norm, Pruned

__all__ = [
    "Match",
    "Merged",
    "Pruned",
    "attention",
    "match_tokens",
    "merge_tokens",
    "prune_tokens",
    "rank_tokens",
]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    signal: Signal | None = None,
    prefix: int = 1,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Non-causal attention, and the signal that ranks or matches its tokens.

        out = softmax(q @ k.mT / D**0.5 + size.log()[:, None, None]) @ v

    Args:
        q: (B,H,M,D) queries, M = N, or fewer leading rows where only those are wanted.
        k: (B,H,N,D) keys.
        v: (B,H,N,D) values.
        size: (B,N) patches behind each token, whose logarithm is added to the logits of that key; None is all ones.
        signal: "cls", the first query's softmax over all N keys without the prefix columns, (B,H,P) fp32;
            "received", the mean attention each patch receives over heads and queries, (B,P) fp32, M = N;
            "keys", the mean of k over heads, (B,N,D) in its dtype; None.
        prefix: leading tokens that get no score.
        backend: "auto", "triton" or "reference".
    Returns:
        out (B,H,M,D), and the signal, detached, or None.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming what was expected and what came.
    Guarantees: the N×N attention is never whole in memory for a signal; signals accumulate in fp32.
    Source: the size bias is ToMe's proportional attention, arXiv 2210.09461, section 3.
    """
    _check_attention(q, k, v, size, signal, prefix)
    _backend.choose(backend, q.device, q.dtype, "attention", kernel=False)
    return reference.attention(q, k, v, size, signal, prefix)


def rank_tokens(
    q: Tensor,
    k: Tensor,
    heads: Heads = "mean",
    query: Literal["cls", "all"] = "cls",
    size: Tensor | None = None,
    prefix: int = 1,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Scores (B,P) fp32 of the patches, larger is more important: an attention signal reduced over heads.

    Args:
        q: (B,H,M,D) queries.
        k: (B,H,N,D) keys.
        heads: "mean" of the heads' scores, or "rank": per head the number of patches a patch beats (of two equal
            scores the lower index beats the higher), summed exactly over heads and divided by H.
        query: "cls", the first query's attention, or "all", the mean over all queries (M = N, heads="mean").
        size: (B,N) or None, as in `attention`.
        prefix: leading tokens that get no score.
        backend: "auto", "triton" or "reference".
    Returns:
        (B,P) fp32 (fp64 for fp64 inputs), detached.
    Raises:
        ValueError: shapes or choices that do not fit.
    Source: "mean" EViT, arXiv 2202.07800, section 3.2; "rank" TCA, arXiv 2410.14729.
    """
    _check_rank(q, k, heads, query, size, prefix)
    _backend.choose(backend, q.device, q.dtype, "rank_tokens", kernel=False)
    return reference.rank_tokens(q, k, heads, query, size, prefix)


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
    _check_prune(x, scores, keep, heads, prefix, norm)
    dtype = torch.promote_types(x.dtype, scores.dtype)
    chosen = _backend.choose(backend, x.device, dtype, "prune_tokens", kernel=True)
    if chosen == "reference":
        return reference.prune_tokens(x, scores, keep, fuse, heads, prefix, norm)
    return custom_ops.prune_tokens(x, scores, keep, fuse, heads, prefix, norm)


def match_tokens(metric: Tensor, r: int, prefix: int = 1, *, backend: Backend = "auto") -> Match:
    """Which r tokens merge into which: each even token's most similar odd token, the r most similar pairs.

    Tokens at even positions (A) each have an edge to their most similar token at an odd position (B), by cosine
    similarity in fp32; the r strongest edges merge. Prefix tokens neither merge nor are merged into.

    Args:
        metric: (B,N,D), the head mean of the keys as a rule; normalised here.
        r: edges, 0 to (N - prefix)//2.
        prefix: leading tokens left alone.
        backend: "auto", "triton" or "reference".
    Returns:
        Match(kept (B,A-r), source (B,r), both int64 into the A tokens and ascending, target (B,r) int64 into B).
    Raises:
        ValueError: shapes or an r that do not fit.
    Source: ToMe, arXiv 2210.09461, section 3.
    """
    _check_match(metric, r, prefix)
    _backend.choose(backend, metric.device, metric.dtype, "match_tokens", kernel=False)
    return reference.match_tokens(metric, r, prefix)


def merge_tokens(
    x: Tensor, match: Match, size: Tensor | None = None, norm: Norm | None = None, *, backend: Backend = "auto"
) -> Merged:
    """The tokens after a merge: surviving A tokens in position order, then B tokens, means weighted by size.

    Args:
        x: (B,N,C) tokens.
        match: from `match_tokens`.
        size: (B,N) patches behind each token; None is all ones.
        norm: (weight (C,), bias (C,), eps): also return the LayerNorm of the result.
        backend: "auto", "triton" or "reference".
    Returns:
        Merged(tokens (B,N-r,C), size (B,N-r) fp32, normed). Sizes add up to those of the input.
    Raises:
        ValueError: shapes or devices that do not fit.
    Guarantees: tokens that nothing merged into are bit-equal copies; equal tokens merge to themselves; fp32
        accumulation; differentiable in x.
    Source: ToMe, arXiv 2210.09461, section 3.
    """
    _check_merge(x, match, size, norm)
    _backend.choose(backend, x.device, x.dtype, "merge_tokens", kernel=False)
    return reference.merge_tokens(x, match, size, norm)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, signal: str | None, prefix: int) -> None:
    _check_queries(q, k, prefix)
    if v.shape != k.shape:
        raise ValueError(f"v must be (B,H,N,D) = {_shape(k)} like k, got {_shape(v)}")
    _same(q, v=v)
    if signal not in ("cls", "received", "keys", None):
        raise ValueError(f'signal must be "cls", "received", "keys" or None, got {signal!r}')
    if signal == "received" and q.shape[2] != k.shape[2]:
        raise ValueError(f'signal="received" needs one query per key, {k.shape[2]}, got {q.shape[2]}')
    _check_size(size, k, k.shape[0], k.shape[2])


def _check_rank(q: Tensor, k: Tensor, heads: str, query: str, size: Tensor | None, prefix: int) -> None:
    _check_queries(q, k, prefix)
    if heads not in ("mean", "rank"):
        raise ValueError(f'heads must be "mean" or "rank", got {heads!r}')
    if query not in ("cls", "all"):
        raise ValueError(f'query must be "cls" or "all", got {query!r}')
    if query == "all" and heads == "rank":
        raise ValueError('query="all" is a mean over heads, got heads="rank"')
    if query == "all" and q.shape[2] != k.shape[2]:
        raise ValueError(f'query="all" needs one query per key, {k.shape[2]}, got {q.shape[2]}')
    _check_size(size, k, k.shape[0], k.shape[2])


def _check_queries(q: Tensor, k: Tensor, prefix: int) -> None:
    if q.ndim != 4 or not q.shape[2]:
        raise ValueError(f"q must be (B,H,M,D) with at least one query, got {_shape(q)}")
    _floating(q=q)
    if k.ndim != 4 or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]) or k.shape[2] < q.shape[2]:
        expected = (*q.shape[:2], "N", q.shape[3])
        raise ValueError(f"k must be (B,H,N,D) = ({_join(expected)}) with N ≥ {q.shape[2]}, got {_shape(k)}")
    _same(q, k=k)
    _check_prefix(prefix, k.shape[2])


def _check_prune(x: Tensor, scores: Tensor, keep: int, heads: str, prefix: int, norm: Norm | None) -> None:
    _check_tokens(x)
    _check_prefix(prefix, x.shape[1])
    batch, patches = x.shape[0], x.shape[1] - prefix
    if scores.ndim not in (2, 3) or (scores.shape[0], scores.shape[-1]) != (batch, patches) or 0 in scores.shape[1:-1]:
        raise ValueError(f"scores must be (B,P) = ({batch},{patches}) or (B,H,P), got {_shape(scores)}")
    _floating(scores=scores)
    if scores.device != x.device:
        raise ValueError(f"scores must be on {x.device} like x, got {scores.device}")
    if isinstance(keep, bool) or not isinstance(keep, int) or not 0 <= keep <= patches:
        raise ValueError(f"keep must be an int from 0 to P = {patches}, got {keep!r}")
    if heads not in ("mean", "rank"):
        raise ValueError(f'heads must be "mean" or "rank", got {heads!r}')
    _check_norm(norm, x)


def _check_match(metric: Tensor, r: int, prefix: int) -> None:
    if metric.ndim != 3:
        raise ValueError(f"metric must be (B,N,D), got {_shape(metric)}")
    _floating(metric=metric)
    _check_prefix(prefix, metric.shape[1])
    limit = (metric.shape[1] - prefix) // 2
    if isinstance(r, bool) or not isinstance(r, int) or not 0 <= r <= limit:
        raise ValueError(f"r must be an int from 0 to (N - prefix)//2 = {limit}, got {r!r}")


def _check_merge(x: Tensor, match: Match, size: Tensor | None, norm: Norm | None) -> None:
    _check_tokens(x)
    batch, tokens = x.shape[:2]
    r = match.source.shape[-1]
    expected = ((batch, (tokens + 1) // 2 - r), (batch, r), (batch, r))
    came = tuple(tuple(index.shape) for index in match)
    if came != expected:
        raise ValueError(f"match must hold kept, source, target of shapes {expected} for x {_shape(x)}, got {came}")
    if any(index.dtype != torch.int64 or index.device != x.device for index in match):
        raise ValueError(f"match must be int64 on {x.device}, got {[(i.dtype, str(i.device)) for i in match]}")
    _check_size(size, x, batch, tokens)
    _check_norm(norm, x)


def _check_tokens(x: Tensor) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must be (B,N,C), got {_shape(x)}")
    _floating(x=x)


def _check_prefix(prefix: int, tokens: int) -> None:
    if isinstance(prefix, bool) or not isinstance(prefix, int) or not 0 <= prefix <= tokens:
        raise ValueError(f"prefix must be an int from 0 to N = {tokens}, got {prefix!r}")


def _check_size(size: Tensor | None, like: Tensor, batch: int, tokens: int) -> None:
    if size is not None and (tuple(size.shape) != (batch, tokens) or size.device != like.device):
        came = f"{_shape(size)} on {size.device}"
        raise ValueError(f"size must be (B,N) = ({batch},{tokens}) on {like.device}, got {came}")


def _check_norm(norm: Norm | None, x: Tensor) -> None:
    if norm is None:
        return
    for name, tensor in (("weight", norm[0]), ("bias", norm[1])):
        if tuple(tensor.shape) != x.shape[-1:] or tensor.device != x.device:
            came = f"{_shape(tensor)} on {tensor.device}"
            raise ValueError(f"norm must hold a {name} (C,) = ({x.shape[-1]}) on {x.device}, got {came}")


def _floating(**named: Tensor) -> None:
    for name, tensor in named.items():
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")


def _same(like: Tensor, **named: Tensor) -> None:
    for name, tensor in named.items():
        if tensor.dtype != like.dtype or tensor.device != like.device:
            raise ValueError(f"{name} must be {like.dtype} on {like.device}, got {tensor.dtype} on {tensor.device}")


def _shape(tensor: Tensor) -> str:
    return f"({_join(tuple(tensor.shape))})"


def _join(sizes: tuple[object, ...]) -> str:
    return ",".join(str(size) for size in sizes)
