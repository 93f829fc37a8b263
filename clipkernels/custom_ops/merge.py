"""The operations `match_tokens` and `merge_tokens` on the Triton backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipkernels.custom_ops import call_with_norm, can_skip_dispatcher, flatten_norm, kernels, norm_backward, register
from clipkernels.reference import Match, Merged, Norm


def match_tokens(metric: Tensor, r: int, prefix: int) -> Match:
    metric = metric.detach()
    if can_skip_dispatcher(metric):
        return Match(*_launch_match(metric, r, prefix))
    return Match(*torch.ops.clipkernels.match_tokens(metric, r, prefix))


def merge_tokens(x: Tensor, match: Match, size: Tensor | None, norm: Norm | None) -> Merged:
    tensors = (x, *match, size)
    return Merged(*call_with_norm("merge_tokens", _launch_merge, tensors, norm, *tensors))


def _launch_match(metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    return kernels("merge").match_tokens(metric, r, prefix)


def _match_fake(metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens = metric.shape[0], metric.shape[-2]
    kept, source, target = (
        metric.new_empty(batch, count, dtype=torch.int64) for count in ((tokens + 1) // 2 - r, r, r)
    )
    return kept, source, target


def _launch_merge(*arguments: Any) -> Any:
    return kernels("merge").merge_tokens(*arguments)


def _merge_fake(
    x: Tensor, kept: Tensor, source: Tensor, target: Tensor, size: Tensor | None, weight: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x.new_empty(x.shape[0], x.shape[1] - source.shape[1], x.shape[2])
    merged = tokens.new_empty(tokens.shape[:2], dtype=torch.float32)
    return tokens, merged, x.new_empty(0) if weight is None else torch.empty_like(tokens)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, kept, source, target, size, weight, bias, ctx.eps = inputs
    tokens, merged, _ = output
    ctx.mark_non_differentiable(merged)
    ctx.shape, ctx.dtype = x.shape, x.dtype
    ctx.save_for_backward(kept, source, target, size, merged, tokens if weight is not None else None, weight, bias)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None, grad_normed: Tensor | None) -> tuple[Any, ...]:
    kept, source, target, size, merged, tokens, weight, bias = ctx.saved_tensors
    batch, count, width = ctx.shape
    total = merged.new_zeros(*merged.shape, width)
    total = total if grad is None else total + grad
    total, grad_weight, grad_bias = norm_backward(total, grad_normed, tokens, weight, bias, ctx.eps)
    size = merged.new_ones(batch, count) if size is None else size.float()
    survivors, targets = total[:, : kept.shape[1]], total[:, kept.shape[1] :]
    sums = merged[:, kept.shape[1] :]
    weights = torch.where(sums == 0, 1, size[:, 1::2])  # of two tokens of size 0 the target remains
    sums = torch.where(sums == 0, 1, sums)
    # Every source has one target and every row one position, so this gathers, and scatters without adding.
    share = size[:, ::2].gather(1, source) / sums.gather(1, target)
    pulled = share[..., None] * targets.gather(1, target[..., None].expand(-1, -1, width))
    even = total.new_zeros(batch, (count + 1) // 2, width)
    even = even.scatter(1, kept[..., None].expand_as(survivors), survivors)
    even = even.scatter(1, source[..., None].expand_as(pulled), pulled)
    grad_x = total.new_empty(batch, count, width)
    grad_x[:, ::2], grad_x[:, 1::2] = even, (weights / sums)[..., None] * targets
    return grad_x.to(ctx.dtype), None, None, None, None, grad_weight, grad_bias, None


register(
    "match_tokens(Tensor metric, int r, int prefix) -> (Tensor kept, Tensor source, Tensor target)",
    _launch_match,
    _match_fake,
)
register(
    "merge_tokens(Tensor x, Tensor kept, Tensor source, Tensor target, Tensor? size, Tensor? weight, Tensor? bias, "
    "float eps) -> (Tensor tokens, Tensor merged, Tensor normed)",
    flatten_norm(_launch_merge),
    _merge_fake,
    _backward,
    _setup,
)
