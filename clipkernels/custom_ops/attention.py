"""The operations `attention` and `rank_tokens` on the Triton backend."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels import reference
from clipkernels.custom_ops import can_skip_dispatcher, register


def attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, signal: str | None, prefix: int, fused: bool
) -> tuple[Tensor, Tensor | None]:
    """Output and signal, from one kernel if `fused` and no gradient is required, else from SDPA and a score kernel."""
    scores: Tensor | None
    score_signal = "" if signal in (None, "keys") else str(signal)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if fused and not needs_grad:
        out, scores = _attention(q, k, v, size, score_signal, prefix)
    else:
        out, _ = reference.attention(q, k, v, size, None, prefix)
        scores = _scores(q.detach(), k.detach(), size, score_signal, prefix)
    if signal == "keys":
        return out, k.detach().mean(1)
    return out, scores if score_signal else None


def rank_tokens(q: Tensor, k: Tensor, heads: str, query: str, size: Tensor | None, prefix: int) -> Tensor:
    q, k = q.detach(), k.detach()
    if can_skip_dispatcher(q, k, size):
        return _rank(q, k, size, heads, query, prefix)
    return torch.ops.clipkernels.rank_tokens(q, k, size, heads, query, prefix)


def _attention(
    q: Tensor, k: Tensor, v: Tensor | None, size: Tensor | None, signal: str, prefix: int
) -> tuple[Tensor, Tensor]:
    call = _launch if can_skip_dispatcher(q, k, v, size) else torch.ops.clipkernels.attention
    out, scores = call(q, k, v, size, signal, prefix)
    return out, scores


def _scores(q: Tensor, k: Tensor, size: Tensor | None, signal: str, prefix: int) -> Tensor | None:
    if signal == "cls":
        call = _cls_scores if can_skip_dispatcher(q, k, size) else torch.ops.clipkernels.cls_scores
        return call(q, k, size, prefix)
    return _attention(q, k, None, size, signal, prefix)[1] if signal else None


def _launch(
    q: Tensor, k: Tensor, v: Tensor | None, size: Tensor | None, signal: str, prefix: int
) -> tuple[Tensor, Tensor]:
    from clipkernels.kernels.attention import attention as launch

    return launch(q, k, v, size, signal or None, prefix)


def _fake(
    q: Tensor, k: Tensor, v: Tensor | None, size: Tensor | None, signal: str, prefix: int
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, width = q.shape
    out = q.new_empty((batch, rows, heads, width) if v is not None else (0, 0, 0, 0)).transpose(1, 2)
    patches = k.shape[2] - prefix
    shape = {"": (0,), "cls": (batch, heads, patches), "received": (batch, patches)}[signal]
    return out, q.new_empty(shape, dtype=torch.float32)


def _cls_scores(q: Tensor, k: Tensor, size: Tensor | None, prefix: int) -> Tensor:
    from clipkernels.kernels.rank import cls_scores as launch

    return launch(q, k, size, prefix)


def _cls_scores_fake(q: Tensor, k: Tensor, size: Tensor | None, prefix: int) -> Tensor:
    return q.new_empty(*k.shape[:2], k.shape[2] - prefix, dtype=torch.float32)


def _rank(q: Tensor, k: Tensor, size: Tensor | None, heads: str, query: str, prefix: int) -> Tensor:
    from clipkernels.kernels.rank import reduce_scores

    if query == "all":
        return _launch(q, k, None, size, "received", prefix)[1]
    return reduce_scores(_cls_scores(q, k, size, prefix), heads == "rank", q.shape[1])


def _rank_fake(q: Tensor, k: Tensor, size: Tensor | None, heads: str, query: str, prefix: int) -> Tensor:
    return q.new_empty(k.shape[0], k.shape[2] - prefix, dtype=torch.float32)


register(
    "attention(Tensor q, Tensor k, Tensor? v, Tensor? size, str signal, int prefix) -> (Tensor out, Tensor scores)",
    _launch,
    _fake,
)
register("cls_scores(Tensor q, Tensor k, Tensor? size, int prefix) -> Tensor", _cls_scores, _cls_scores_fake)
register("rank_tokens(Tensor q, Tensor k, Tensor? size, str heads, str query, int prefix) -> Tensor", _rank, _rank_fake)
