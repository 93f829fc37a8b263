"""The operation `condense_tokens` on the Triton backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipkernels.custom_ops import call_with_norm, flatten_norm, norm_backward, register
from clipkernels.reference import Condensed, Norm


def condense_tokens(
    x: Tensor,
    scores: Tensor,
    keep: int,
    merge: int,
    centers: int,
    weights: Tensor | None,
    heads: str,
    prefix: int,
    first: int,
    norm: Norm | None,
) -> Condensed:
    arguments = (x, scores, keep, merge, centers, weights, heads, prefix, first)
    tokens, source, index, _, normed = call_with_norm("condense_tokens", _launch, arguments, norm, x, scores, weights)
    return Condensed(tokens, source, index, normed)


def _launch(*arguments: Any) -> Any:
    from clipkernels.kernels.condense import condense_tokens as launch

    return launch(*arguments)


def _fake(
    x: Tensor,
    scores: Tensor,
    keep: int,
    merge: int,
    centers: int,
    weights: Tensor | None,
    heads: str,
    prefix: int,
    first: int,
    weight: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, patches = x.shape[0], x.shape[1] - prefix
    tokens = x.new_empty(batch, prefix + keep + centers + 1, x.shape[2])
    source = x.new_empty(batch, patches, dtype=torch.int64)
    index = x.new_empty(batch, keep + centers, dtype=torch.int64)
    coefficient = x.new_empty(batch, patches, dtype=torch.float32)
    return tokens, source, index, coefficient, x.new_empty(0) if weight is None else torch.empty_like(tokens)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, scores, ctx.keep, _, ctx.centers, weights, ctx.heads, ctx.prefix, _, weight, bias, ctx.eps = inputs
    tokens, source, index, coefficient, _ = output
    ctx.mark_non_differentiable(source, index, coefficient)
    saved = tokens if weight is not None else None
    ctx.save_for_backward(x, scores, weights, source, index, coefficient, saved, weight, bias)


def _backward(ctx: Any, grad: Tensor | None, *rest: Tensor | None) -> tuple[Any, ...]:
    x, scores, weights, source, index, coefficient, tokens, weight, bias = ctx.saved_tensors
    grad_normed, first = rest[-1], ctx.prefix + ctx.keep
    total = x.new_zeros(x.shape[0], first + ctx.centers + 1, x.shape[2], dtype=torch.float32)
    total = total if grad is None else total + grad
    total, grad_weight, grad_bias = norm_backward(total, grad_normed, tokens, weight, bias, ctx.eps)
    # A row is the sum of its patches times their coefficients, …
    pull = total.gather(1, source[..., None].expand(-1, -1, x.shape[2]))
    patches = coefficient[..., None] * pull
    # … except that a centre without patches yields its own token.
    centers = torch.arange(first, first + ctx.centers, device=x.device)
    alone = ~(source[:, None] == centers[:, None]).any(2)
    center_patches = index[:, ctx.keep :, None].expand(-1, -1, x.shape[2])
    patches = patches.scatter_add(1, center_patches, total[:, first:-1] * alone[..., None])
    fuse_weights = scores if weights is None else weights
    grad_fuse_weights = None
    if weights is not None or scores.ndim == 2 or ctx.heads == "mean":
        reduced = fuse_weights.float() if fuse_weights.ndim == 2 else fuse_weights.float().mean(1)
        counts = (source == first + ctx.centers) & (reduced > float("-inf"))
        grad_fuse_weights = (x[:, ctx.prefix :].float() * pull).sum(-1) * counts
        if fuse_weights.ndim == 3:
            grad_fuse_weights = (grad_fuse_weights / fuse_weights.shape[1])[:, None].expand_as(fuse_weights)
        grad_fuse_weights = grad_fuse_weights.to(fuse_weights.dtype)
    grad_x = torch.cat([total[:, : ctx.prefix], patches], 1).to(x.dtype)
    grad_scores, grad_weights = (grad_fuse_weights, None) if weights is None else (None, grad_fuse_weights)
    return grad_x, grad_scores, None, None, None, grad_weights, None, None, None, grad_weight, grad_bias, None


register(
    "condense_tokens(Tensor x, Tensor scores, int keep, int merge, int centers, Tensor? weights, str heads, "
    "int prefix, int first, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor tokens, Tensor source, Tensor index, Tensor coefficient, Tensor normed)",
    flatten_norm(_launch),
    _fake,
    _backward,
    _setup,
)
