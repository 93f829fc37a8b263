"""The operation `condense_tokens` on the Triton backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipkernels.custom_ops import call_with_norm, flatten_norm, kernels, norm_backward, register
from clipkernels.reference import Condensed, Norm, reduce_heads
from clipkernels.reference.prune import hide_unweighed
from clipkernels.reference.ranking import rows_at


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
    return Condensed(*call_with_norm("condense_tokens", _launch, arguments, norm, x, scores, weights))


def _launch(*arguments: Any) -> Any:
    return kernels("condense").condense_tokens(*arguments)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, patches = x.shape[0], x.shape[1] - prefix
    tokens = x.new_empty(batch, prefix + keep + centers + 1, x.shape[2])
    source = x.new_empty(batch, patches, dtype=torch.int64)
    index = x.new_empty(batch, keep + centers, dtype=torch.int64)
    return tokens, source, index, x.new_empty(0) if weight is None else torch.empty_like(tokens)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, scores, ctx.keep, _, ctx.centers, weights, ctx.heads, ctx.prefix, _, weight, bias, ctx.eps = inputs
    tokens, source, index, _ = output
    ctx.mark_non_differentiable(source, index)
    ctx.save_for_backward(x, scores, weights, source, index, tokens if weight is not None else None, weight, bias)


def _backward(ctx: Any, grad: Tensor | None, *rest: Tensor | None) -> tuple[Any, ...]:
    x, scores, weights, source, index, tokens, weight, bias = ctx.saved_tensors
    grad_normed, first = rest[-1], ctx.prefix + ctx.keep
    total = x.new_zeros(x.shape[0], first + ctx.centers + 1, x.shape[2], dtype=torch.float32)
    total = total if grad is None else total + grad
    total, grad_weight, grad_bias = norm_backward(total, grad_normed, tokens, weight, bias, ctx.eps)
    patches, center = x[:, ctx.prefix :].float(), index[:, ctx.keep :]
    # A row is the sum of its patches times their coefficients, …
    pull = total.gather(1, source[..., None].expand(-1, -1, x.shape[2]))
    joined = source[:, None] == torch.arange(first, first + ctx.centers, device=x.device)[:, None]  # (B,K,P)
    fuse_weights, by_rank = (scores, ctx.heads == "rank") if weights is None else (weights, False)
    if fuse_weights.ndim == 3:
        reduced = reduce_heads(fuse_weights, "rank" if by_rank else "mean")
    else:
        reduced, by_rank = fuse_weights.float(), False
    fused = (source == first + ctx.centers) & (reduced > float("-inf"))
    fused_weights = torch.where(fused, reduced, 0.0)
    along = (hide_unweighed(patches, fused_weights) * pull).sum(-1)  # the gradients of the coefficients
    joined, share, grad_patches = _shares_and_gradient(patches, joined, center, along)
    coefficient = torch.where(source < first, 1.0, share + fused_weights)
    grad_patches = grad_patches + coefficient[..., None] * pull
    # … except that a centre without patches yields its own token.
    alone = total[:, first:-1] * ~joined.any(2, keepdim=True)
    grad_patches = grad_patches.scatter_add(1, center[..., None].expand_as(alone), alone)
    grad_fuse_weights = None
    if not by_rank:
        grad_fuse_weights = torch.where(fused, along, 0.0)
        if fuse_weights.ndim == 3:
            grad_fuse_weights = (grad_fuse_weights / fuse_weights.shape[1])[:, None].expand_as(fuse_weights)
        grad_fuse_weights = grad_fuse_weights.to(fuse_weights.dtype)
    grad_x = torch.cat([total[:, : ctx.prefix], grad_patches], 1).to(x.dtype)
    grad_scores, grad_weights = (grad_fuse_weights, None) if weights is None else (None, grad_fuse_weights)
    return grad_x, grad_scores, None, None, None, grad_weights, None, None, None, grad_weight, grad_bias, None


def _shares_and_gradient(
    patches: Tensor, joined: Tensor, center: Tensor, along: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The patches that have a share (B,K,P), each one's share (B,P), and the gradient (B,P,C) through the shares.

    A share falls with the distance to the centre, unless that is 0, and with the other shares of the cluster. A patch
    at a distance that is not finite has none.

    Args:
        patches: (B,P,C) fp32.
        joined: (B,K,P) true where a patch joins a centre.
        center: (B,K) the patch of each centre.
        along: (B,P) gradient of each share.
    """
    merged, cluster = joined.any(1), joined.int().argmax(1)
    apart = torch.where(merged[..., None], patches - rows_at(patches, center.gather(1, cluster)), 0.0)
    merged = merged & apart.square().sum(-1).isfinite()
    joined, apart = joined & merged[:, None], torch.where(merged[..., None], apart, 0.0)
    distance = torch.linalg.vector_norm(apart, dim=-1)
    at_center = distance == 0
    distance = torch.where(at_center, 1, distance)
    weight = torch.where(merged, 1 / distance, 0.0)
    mass = (joined * weight[:, None]).sum(2)
    share = weight / torch.where(mass > 0, mass, 1).gather(1, cluster)
    pull = torch.where(merged, share * along, 0.0)
    mean = (joined * pull[:, None]).sum(2).gather(1, cluster)
    slope = torch.where(at_center, 0.0, (share * mean - pull) / distance)
    grad = slope[..., None] * (apart / distance[..., None])
    return joined, share, grad.scatter_add(1, center[..., None].expand(-1, -1, grad.shape[2]), -(joined.float() @ grad))


register(
    "condense_tokens(Tensor x, Tensor scores, int keep, int merge, int centers, Tensor? weights, str heads, "
    "int prefix, int first, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor tokens, Tensor source, Tensor index, Tensor normed)",
    flatten_norm(_launch),
    _fake,
    _backward,
    _setup,
)
