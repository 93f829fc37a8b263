"""Order and places: ties go to the lower index, NaN counts as -inf."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clipkernels.reference.precision import upcast

Heads = Literal["mean", "rank"]


def strongest_first(scores: Tensor) -> Tensor:
    """Indices int64 in descending order of scores, equal ones by position, NaN as -inf."""
    scores = scores.detach().nan_to_num(float("-inf"), float("inf"), float("-inf"))
    if not torch.compiler.is_compiling():
        return scores.argsort(dim=-1, descending=True, stable=True)
    # Graphs are exported, and ONNX has no stable sort: the place of a score is the number of those that beat it.
    one, other, at = scores[..., None], scores[..., None, :], torch.arange(scores.shape[-1], device=scores.device)
    return ((other > one) | ((other == one) & (at < at[:, None]))).sum(-1).argsort(-1)


def inverse_of(order: Tensor) -> Tensor:
    """The place (…,P) of each index in an order (…,P)."""
    if torch.compiler.is_compiling():  # graphs are exported, and runtimes are slow at scatters
        return order.argsort(-1)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def reduce_heads(scores: Tensor, heads: Heads) -> Tensor:
    """Scores (B,P) of per-head scores (B,H,P): their mean, or the mean of each head's ranks (0 weakest)."""
    if heads == "mean":
        return upcast(scores).mean(1)
    # The place in a stable descending order counts those that beat a patch; integer ranks are summed exactly.
    place = inverse_of(strongest_first(scores))
    return (scores.shape[-1] - 1 - place).sum(1).to(upcast(scores).dtype) / scores.shape[1]


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Rows (B,n,...) of x (B,N,...) at index (B,n)."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]
