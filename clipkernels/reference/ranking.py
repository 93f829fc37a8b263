"""Stable ordering and ranks of scores: ties go to the lower index, NaN counts as -inf."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clipkernels.reference.precision import upcast

Heads = Literal["mean", "rank"]


# Dynamo takes it for true in torch.compile too until about torch 2.13, and torch 2.6 does not have it.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def is_exporting() -> bool:
    """Return true in a graph for other runtimes, which have no stable sort and are slow at scatters."""
    return torch.compiler.is_compiling() and _is_exporting()


def strongest_first(scores: Tensor) -> Tensor:
    """Return int64 indices that sort the scores in descending order; ties go to the lower index, NaN counts as -inf."""
    scores = scores.detach().nan_to_num(float("-inf"), float("inf"), float("-inf"))
    if not is_exporting():
        return scores.argsort(dim=-1, descending=True, stable=True)
    # Exported graphs count instead, because ONNX has no stable sort: the number of scores that beat a score is its
    # position.
    score, other, at = scores[..., None], scores[..., None, :], torch.arange(scores.shape[-1], device=scores.device)
    return ((other > score) | ((other == score) & (at < at[:, None]))).sum(-1).argsort(-1)


def inverse_of(order: Tensor) -> Tensor:
    """Return the position (…,P) of each index in an order (…,P)."""
    if is_exporting():
        return order.argsort(-1)
    positions = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, positions)


def reduce_heads(scores: Tensor, heads: Heads) -> Tensor:
    """Reduce per-head scores (B,H,P) to scores (B,P): their mean, or the mean of each head's ranks (0 is weakest)."""
    if heads == "mean":
        return upcast(scores).mean(1)
    # The position in a stable descending order is the number of patches that beat a patch. Integer ranks sum exactly.
    position = inverse_of(strongest_first(scores))
    return (scores.shape[-1] - 1 - position).sum(1).to(upcast(scores).dtype) / scores.shape[1]


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows (B,n,…) of x (B,N,…) at index (B,n)."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]
