"""The operations `attention` and `rank_tokens` on the Triton backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipkernels import reference
from clipkernels.custom_ops import can_skip_dispatcher, kernels, register
from clipkernels.reference.attention import ROWS, hide_absent, probabilities
from clipkernels.reference.precision import autocast_disabled, upcast


def attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, signal: str | None, prefix: int, fused: bool
) -> tuple[Tensor, Tensor | None]:
    """Output and signal, from one kernel if `fused` and no gradient is required, else from SDPA and a score kernel."""
    score_signal = "" if signal in (None, "keys") else str(signal)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    scores: Tensor | None = None
    if fused and not needs_grad:
        call = _attention if can_skip_dispatcher(q, k, v, size) else torch.ops.clipkernels.attention
        out, scores = call(q, k, v, size, score_signal, prefix)
    else:
        out, _ = reference.attention(q, k, v, size, None, prefix)
        if score_signal:
            launch = _scores if can_skip_dispatcher(q, k, size) else torch.ops.clipkernels.attention_scores
            scores = launch(q, k, size, score_signal, prefix)
    if signal == "keys":
        return out, k.detach().mean(1)
    return out, scores if score_signal else None


def rank_tokens(q: Tensor, k: Tensor, heads: str, query: str, size: Tensor | None, prefix: int) -> Tensor:
    if heads == "rank":  # a choice, which has no gradient
        q, k = q.detach(), k.detach()
    call = _rank if can_skip_dispatcher(q, k, size) else torch.ops.clipkernels.rank_tokens
    return call(q, k, size, heads, query, prefix)


def _attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, signal: str, prefix: int) -> tuple[Tensor, Tensor]:
    return kernels("attention").attention(q, k, v, size, signal or None, prefix)


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, signal: str, prefix: int
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, width = q.shape
    out = q.new_empty(batch, rows, heads, width).transpose(1, 2)
    return out, _scores_fake(q, k, size, signal, prefix) if signal else q.new_empty(0, dtype=torch.float32)


def _scores(q: Tensor, k: Tensor, size: Tensor | None, signal: str, prefix: int) -> Tensor:
    if signal == "cls":
        return kernels("rank").cls_scores(q, k, size, prefix)
    return kernels("attention").attention(q, k, None, size, signal, prefix)[1]


def _scores_fake(q: Tensor, k: Tensor, size: Tensor | None, signal: str, prefix: int) -> Tensor:
    heads = (q.shape[1],) if signal == "cls" else ()
    return q.new_empty(k.shape[0], *heads, k.shape[2] - prefix, dtype=torch.float32)


def _scores_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, size, ctx.signal, ctx.prefix = inputs
    ctx.save_for_backward(q, k, size)


def _scores_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, size = ctx.saved_tensors
    if ctx.signal == "cls":
        return *_gradient(grad, q, k, size, 1, ctx.prefix), None, None, None
    grad = grad[:, None] / (q.shape[1] * q.shape[2])
    return *_gradient(grad, q, k, size, q.shape[2], ctx.prefix), None, None, None


def _rank(q: Tensor, k: Tensor, size: Tensor | None, heads: str, query: str, prefix: int) -> Tensor:
    if query == "all":
        return _scores(q, k, size, "received", prefix)
    return kernels("rank").reduce_scores(_scores(q, k, size, "cls", prefix), heads == "rank", q.shape[1])


def _rank_fake(q: Tensor, k: Tensor, size: Tensor | None, heads: str, query: str, prefix: int) -> Tensor:
    return q.new_empty(k.shape[0], k.shape[2] - prefix, dtype=torch.float32)


def _rank_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, size, ctx.heads, query, ctx.prefix = inputs
    ctx.rows = q.shape[2] if query == "all" else 1
    ctx.save_for_backward(q, k, size)


def _rank_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if ctx.heads == "rank":
        raise RuntimeError("clipkernels::rank_tokens has no backward with heads='rank': ranks are choices")
    q, k, size = ctx.saved_tensors
    grad = grad[:, None] / (q.shape[1] * ctx.rows)
    return *_gradient(grad, q, k, size, ctx.rows, ctx.prefix), None, None, None, None


def _gradient(grad: Tensor, q: Tensor, k: Tensor, size: Tensor | None, rows: int, prefix: int) -> tuple[Tensor, Tensor]:
    """The gradients of q and k, from those of the attention (B,H,P) or (B,1,P) of each of the first `rows` queries.

    The attention is computed again, a block of rows at a time.
    """
    scale, wide = q.shape[-1] ** -0.5, upcast(hide_absent(k, size))
    pull = torch.cat([grad.new_zeros(*grad.shape[:2], prefix), grad], 2)[:, :, None]
    grad_k, parts = torch.zeros_like(wide), []
    with autocast_disabled(q):
        for start in range(0, rows, ROWS):
            block = q[:, :, start : min(start + ROWS, rows)]
            p = probabilities(block, k, size)
            grad_logits = p * (pull - (p * pull).sum(-1, keepdim=True)) * scale
            parts.append(grad_logits @ wide)
            grad_k = grad_k + grad_logits.mT @ upcast(block)
    unused = wide.new_zeros(*q.shape[:2], q.shape[2] - rows, q.shape[3])
    return torch.cat([*parts, unused], 2).to(q.dtype), grad_k.to(k.dtype)


register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? size, str signal, int prefix) -> (Tensor out, Tensor scores)",
    _attention,
    _attention_fake,
)
register(
    "attention_scores(Tensor q, Tensor k, Tensor? size, str signal, int prefix) -> Tensor",
    _scores,
    _scores_fake,
    _scores_backward,
    _scores_setup,
)
register(
    "rank_tokens(Tensor q, Tensor k, Tensor? size, str heads, str query, int prefix) -> Tensor",
    _rank,
    _rank_fake,
    _rank_backward,
    _rank_setup,
)
