"""Attention with the signal that ranks tokens, and that signal reduced over heads: `attention`, `rank_tokens`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import reference
from clipkernels.arguments import check_floating, check_prefix, check_same, check_size, join_sizes, shape_of
from clipkernels.backend import Backend
from clipkernels.custom_ops import attention as _attention
from clipkernels.plan import Signal
from clipkernels.reference import Heads

# Wider heads would spill registers: they take SDPA.
_HEAD_WIDTH = 128


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
    Guarantees: the N×N attention is never whole in memory for a signal; signals accumulate in fp32. On the CPU in bf16,
        up to 600 keys, where SDPA is slower, `out` rounds logits and probabilities to bf16: many times SDPA's error
        where logits are large. On a GPU `auto` is SDPA beside a score kernel wherever that is expected to be faster,
        and always if a gradient is wanted; one fused launch, with the same bits for an image in any batch, is
        backend="triton".
    Source: the size bias is ToMe's proportional attention, arXiv 2210.09461, section 3.
    """
    _check_attention(q, k, v, size, signal, prefix)
    chosen = _heads_backend(backend, q, "attention")
    if chosen == "reference":
        return reference.attention(q, k, v, size, signal, prefix)
    # Until measured: SDPA and a score kernel, unless a bias by size slows SDPA or a second kernel needs QKᵀ again.
    better = q.dtype != torch.float32 and (size is not None or signal == "received")
    fused = better or _backend.asked(backend) == "triton"
    return _attention.attention(q, k, v, size, signal, prefix, fused)


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
    chosen = _heads_backend(backend, q, "rank_tokens")
    run = reference.rank_tokens if chosen == "reference" else _attention.rank_tokens
    return run(q, k, heads, query, size, prefix)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, signal: str | None, prefix: int) -> None:
    _check_queries(q, k, prefix)
    if v.shape != k.shape:
        raise ValueError(f"v must be (B,H,N,D) = {shape_of(k)} like k, got {shape_of(v)}")
    check_same(q, v=v)
    if signal not in ("cls", "received", "keys", None):
        raise ValueError(f'signal must be "cls", "received", "keys" or None, got {signal!r}')
    if signal == "received" and q.shape[2] != k.shape[2]:
        raise ValueError(f'signal="received" needs one query per key, {k.shape[2]}, got {q.shape[2]}')
    check_size(size, k, k.shape[0], k.shape[2])


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
    check_size(size, k, k.shape[0], k.shape[2])


def _check_queries(q: Tensor, k: Tensor, prefix: int) -> None:
    if q.ndim != 4 or not q.shape[2]:
        raise ValueError(f"q must be (B,H,M,D) with at least one query, got {shape_of(q)}")
    check_floating(q=q)
    if k.ndim != 4 or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]) or k.shape[2] < q.shape[2]:
        expected = (*q.shape[:2], "N", q.shape[3])
        raise ValueError(f"k must be (B,H,N,D) = ({join_sizes(expected)}) with N ≥ {q.shape[2]}, got {shape_of(k)}")
    check_same(q, k=k)
    check_prefix(prefix, k.shape[2])


def _heads_backend(backend: Backend, q: Tensor, op: str) -> str:
    """The backend for queries (B,H,M,D)."""
    width = q.shape[-1]
    return _backend.choose(backend, q.device, q.dtype, f"{op} at head width {width}", width <= _HEAD_WIDTH)
