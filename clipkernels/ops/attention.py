"""Attention with a signal that ranks tokens, and that signal reduced over heads: `attention`, `rank_tokens`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import reference
from clipkernels.arguments import (
    check_choice,
    check_floating,
    check_prefix,
    check_same,
    check_size,
    check_tensors,
    shape_of,
)
from clipkernels.backend import Backend
from clipkernels.custom_ops import attention as _attention
from clipkernels.messages import join_sizes
from clipkernels.plan import Signal
from clipkernels.reference import Heads

# Wider heads would spill registers, so they run on SDPA.
HEAD_WIDTH = 128


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
    """Non-causal attention, and a signal that ranks or matches its tokens.

        out = softmax(q @ k.mT / D**0.5 + size.log()[:, None, None]) @ v

    Args:
        q: (B,H,M,D) queries; M = N, or fewer when only the leading rows are needed.
        k: (B,H,N,D) keys.
        v: (B,H,N,D) values.
        size: (B,N) patches merged into each token, finite and at least 0; its logarithm is added to the logits of that
            key. A key of size 0 is not there: its k and v may hold anything and get no gradient. None is all ones.
        signal: "cls" is the first query's softmax over all N keys, without the prefix columns, (B,H,P) fp32;
            "received" is the mean attention that each patch receives over heads and queries, (B,P) fp32, M = N;
            "keys" is the mean of k over heads, (B,N,D) in the dtype of k, detached; None is no signal. Signals are fp64
            for fp64 inputs.
        prefix: leading tokens that get no score.
        backend: "auto", "triton" or "reference".
    Returns:
        (out (B,H,M,D), signal or None); both are zeros for an image whose keys all have size 0.
    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes or devices do not match, or size requires a gradient; the message names the expected
            and the actual value. Sizes themselves are checked on the CPU only, because a GPU would have to be waited
            for.
    Guarantees: out, "cls" and "received" are differentiable in q and k, because they weigh something. Computing a
        signal never holds the entire N×N attention in memory, unless autograd saves it for "received" on the reference;
        the backward of the triton backend computes it again. Signals accumulate in fp32. On the CPU in bf16 with up to
        600 keys `out` is computed without SDPA, which is slower there: logits and probabilities are rounded to bf16,
        and the error is many times SDPA's if logits are large. On a GPU `auto` runs SDPA and a separate score kernel
        wherever that is expected to be faster, and always if a gradient is required. backend="triton" without a
        gradient is one fused launch, which computes the same bits for an image in any batch.
    Source: the size bias is ToMe's proportional attention, arXiv 2210.09461, section 3.
    """
    _check_attention(q, k, v, size, signal, prefix)
    patches = k.shape[2] - prefix if signal == "received" else 0
    chosen = _heads_backend(backend, q, "attention", patches)
    if chosen == "reference":
        return reference.attention(q, k, v, size, signal, prefix)
    return _attention.attention(q, k, v, size, signal, prefix, prefers_fused(q, size, signal, backend))


def prefers_fused(q: Tensor, size: Tensor | None, signal: Signal | None, backend: Backend = "auto") -> bool:
    """Return true if one kernel is to compute attention and signal, false if SDPA and a score kernel are."""
    # A prediction, no GPU has been measured: SDPA and a score kernel are faster, unless a size bias slows SDPA down or
    # "received" makes the second kernel compute QKᵀ again.
    if q.dtype != torch.float32 and (size is not None or signal == "received"):
        return True
    return _backend.requested_backend(backend) == "triton"


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
    """Scores (B,P) fp32 of the patches: an attention signal reduced over heads. Larger is more important.

    Args:
        q: (B,H,M,D) queries.
        k: (B,H,N,D) keys.
        heads: "mean" is the mean of the heads' scores. "rank" counts, per head, the patches that a patch beats, sums
            the counts exactly over heads and divides by H; of two equal scores the lower index beats the higher.
        query: "cls" is the first query's attention, "all" the mean over all queries (needs M = N and heads="mean").
        size: (B,N) or None, as in `attention`.
        prefix: leading tokens that get no score.
        backend: "auto", "triton" or "reference".
    Returns:
        (B,P) fp32 (fp64 for fp64 inputs).
    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes do not match, or an option is unknown or excluded by another one.
    Guarantees: differentiable in q and k with heads="mean"; ranks are choices and have no gradient.
    Source: "mean" EViT, arXiv 2202.07800, section 3.2; "rank" TCA, arXiv 2410.14729.
    """
    _check_rank(q, k, heads, query, size, prefix)
    chosen = _heads_backend(backend, q, "rank_tokens", k.shape[2] - prefix)
    run = reference.rank_tokens if chosen == "reference" else _attention.rank_tokens
    return run(q, k, heads, query, size, prefix)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, signal: str | None, prefix: int) -> None:
    _check_queries(q, k, prefix)
    check_tensors(v=v)
    if v.shape != k.shape:
        raise ValueError(f"v must be (B,H,N,D) = {shape_of(k)} like k, got {shape_of(v)}")
    check_same(q, v=v)
    check_choice("signal", signal, "cls", "received", "keys", None)
    if signal == "received" and q.shape[2] != k.shape[2]:
        raise ValueError(f'signal="received" needs one query per key, {k.shape[2]}, got {q.shape[2]}')
    check_size(size, k, k.shape[0], k.shape[2])


def _check_rank(q: Tensor, k: Tensor, heads: str, query: str, size: Tensor | None, prefix: int) -> None:
    _check_queries(q, k, prefix)
    check_choice("heads", heads, "mean", "rank")
    check_choice("query", query, "cls", "all")
    if query == "all" and heads == "rank":
        raise ValueError('query="all" is a mean over heads, got heads="rank"')
    if query == "all" and q.shape[2] != k.shape[2]:
        raise ValueError(f'query="all" needs one query per key, {k.shape[2]}, got {q.shape[2]}')
    check_size(size, k, k.shape[0], k.shape[2])


def _check_queries(q: Tensor, k: Tensor, prefix: int) -> None:
    check_tensors(q=q, k=k)
    if q.ndim != 4 or not q.shape[2]:
        raise ValueError(f"q must be (B,H,M,D) with at least one query, got {shape_of(q)}")
    if not q.shape[3]:
        raise ValueError(f"q must be (B,H,M,D) with D of at least 1, got {shape_of(q)}")
    check_floating(q=q)
    if k.ndim != 4 or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]) or k.shape[2] < q.shape[2]:
        expected = (*q.shape[:2], "N", q.shape[3])
        raise ValueError(f"k must be (B,H,N,D) = ({join_sizes(expected)}) with N ≥ {q.shape[2]}, got {shape_of(k)}")
    check_same(q, k=k)
    check_prefix(prefix, k.shape[2])


def _heads_backend(backend: Backend, q: Tensor, op: str, patches: int) -> str:
    """Return the backend for queries (B,H,M,D) and scores of that many patches to reduce over heads."""
    width = q.shape[-1]
    refusal = None if width <= HEAD_WIDTH else f"takes heads of at most {HEAD_WIDTH} elements, got {width}"
    return _backend.choose(backend, q.device, q.dtype, op, refusal, scores=patches)
