"""Attention, and the signals that rank tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from clipkernels.reference.precision import autocast_disabled, upcast
from clipkernels.reference.ranking import Heads, reduce_heads
from clipkernels.reference.targeted_l1 import may_be_true

# Rows of attention computed at once for the signal "received".
ROWS = 64
# Up to this many keys CPUs run bf16 attention faster as bmm + softmax than as SDPA. In fp16 that is slower, and it
# overflows.
MAX_BMM_KEYS = 600


def attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, signal: str | None, prefix: int
) -> tuple[Tensor, Tensor | None]:
    bias, empty = _bias(size, q)
    visible_k, visible_v = hide_absent(k, size), hide_absent(v, size)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= MAX_BMM_KEYS:
        logits = (q * q.shape[-1] ** -0.5) @ visible_k.mT
        out = torch.softmax(logits if bias is None else logits + bias.to(q.dtype), -1) @ visible_v
    else:
        # One mask row per query, because Attention of onnxruntime, opset 23, does not broadcast rows.
        mask = None if bias is None else bias.to(q.dtype).expand(-1, -1, q.shape[2], -1)
        out = scaled_dot_product_attention(q, visible_k, visible_v, attn_mask=mask)
    if empty is not None and may_be_true(empty, out):
        out = out.masked_fill(empty, 0)
    if signal == "cls":
        return out, probabilities(q[:, :, :1], k, size)[:, :, 0, prefix:]
    if signal == "received":
        return out, _received(q, k, size)[:, prefix:]
    return out, k.mean(1).detach() if signal == "keys" else None


def probabilities(q: Tensor, k: Tensor, size: Tensor | None) -> Tensor:
    """Return the attention (B,H,M,N) of query rows (B,H,M,D), in fp32 (fp64 for fp64 inputs)."""
    k, (bias, empty) = hide_absent(k, size), _bias(size, q)
    with autocast_disabled(q):
        logits = (upcast(q) * q.shape[-1] ** -0.5) @ upcast(k).mT
    if bias is None or empty is None:
        return torch.softmax(logits, -1)
    return torch.softmax(logits + bias, -1).masked_fill(empty, 0)


def hide_absent(x: Tensor, size: Tensor | None) -> Tensor:
    """Return keys or values x (B,H,N,D) with zeros for keys of size 0, so that no result depends on what they hold.

    A probability of 0 would not do, because 0·NaN is NaN, in a result or in a gradient.
    """
    if size is None:
        return x
    absent = size == 0
    return x.masked_fill(absent[:, None, :, None], 0) if may_be_true(absent, x, size) else x


def _bias(size: Tensor | None, q: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return the bias (B,1,1,N) of proportional attention, and (B,1,1,1) true for an image whose keys all have size 0.

    Such an image has no softmax: its bias is 0, so that no NaN arises, and its results are to be filled with zeros.
    """
    if size is None:
        return None, None
    # In fp64 for fp64 queries: a logarithm in fp32 would be off by 1e-8.
    wide = size.to(upcast(q).dtype)[:, None, None, :]
    empty = (wide == 0).all(-1, keepdim=True)
    return wide.log().masked_fill(empty, 0), empty


def _received(q: Tensor, k: Tensor, size: Tensor | None) -> Tensor:
    """Return the mean (B,N) of the attention over heads and queries, computed a block of rows at a time."""
    total = q.new_zeros(k.shape[0], k.shape[2], dtype=upcast(q).dtype)
    for start in range(0, q.shape[2], ROWS):
        total = total + probabilities(q[:, :, start : start + ROWS], k, size).sum((1, 2))
    return total / (q.shape[1] * q.shape[2])


def rank_tokens(q: Tensor, k: Tensor, heads: Heads, query: str, size: Tensor | None, prefix: int) -> Tensor:
    if query == "all":
        return _received(q, k, size)[:, prefix:]
    return reduce_heads(probabilities(q[:, :, :1], k, size)[:, :, 0, prefix:], heads)
