"""The operation `prune_tokens` on the Triton backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipkernels.custom_ops import call_with_norm, flatten_norm, kernels, norm_backward, register
from clipkernels.reference import Norm, Pruned, reduce_heads
from clipkernels.reference.prune import hide_unweighed


def prune_tokens(
    x: Tensor, scores: Tensor, keep: int, fuse: bool, heads: str, prefix: int, norm: Norm | None
) -> Pruned:
    return Pruned(*call_with_norm("prune_tokens", _launch, (x, scores, keep, fuse, heads, prefix), norm, x, scores))


def _launch(*arguments: Any) -> Any:
    return kernels("prune").prune_tokens(*arguments)


def _fake(
    x: Tensor, scores: Tensor, keep: int, fuse: bool, heads: str, prefix: int, weight: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x.new_empty(x.shape[0], prefix + keep + fuse, x.shape[2])
    index = x.new_empty(x.shape[0], keep, dtype=torch.int64)
    return tokens, index, x.new_empty(0) if weight is None else torch.empty_like(tokens)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, scores, ctx.keep, ctx.fuse, ctx.heads, ctx.prefix, weight, bias, ctx.eps = inputs
    tokens, index, _ = output
    ctx.mark_non_differentiable(index)
    ctx.save_for_backward(x, scores, index, tokens if weight is not None else None, weight, bias)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None, grad_normed: Tensor | None) -> tuple[Any, ...]:
    x, scores, index, tokens, weight, bias = ctx.saved_tensors
    rows = ctx.prefix + ctx.keep + ctx.fuse
    total = x.new_zeros(x.shape[0], rows, x.shape[2], dtype=torch.float32)
    total = total if grad is None else total + grad
    total, grad_weight, grad_bias = norm_backward(total, grad_normed, tokens, weight, bias, ctx.eps)
    grad_scores = None
    kept = total[:, ctx.prefix : ctx.prefix + ctx.keep]
    patches = torch.zeros_like(x[:, ctx.prefix :], dtype=torch.float32)
    patches = patches.scatter(1, index[..., None].expand_as(kept), kept)
    if ctx.fuse:
        fused = total[:, -1:]
        reduced = reduce_heads(scores, ctx.heads) if scores.ndim == 3 else scores.float()
        counts = (reduced > float("-inf")).scatter(1, index, False)
        weights = torch.where(counts, reduced, 0.0)
        patches = patches + weights[..., None] * fused
        if ctx.heads == "mean" or scores.ndim == 2:
            grad_scores = torch.where(
                counts, (hide_unweighed(x[:, ctx.prefix :].float(), weights) * fused).sum(-1), 0.0
            )
            if scores.ndim == 3:
                grad_scores = (grad_scores / scores.shape[1])[:, None].expand_as(scores)
            grad_scores = grad_scores.to(scores.dtype)
    grad_x = torch.cat([total[:, : ctx.prefix], patches], 1).to(x.dtype)
    return grad_x, grad_scores, None, None, None, None, grad_weight, grad_bias, None


register(
    "prune_tokens(Tensor x, Tensor scores, int keep, bool fuse, str heads, int prefix, "
    "Tensor? weight, Tensor? bias, float eps) -> (Tensor tokens, Tensor index, Tensor normed)",
    flatten_norm(_launch),
    _fake,
    _backward,
    _setup,
)
