"""Affinity to a support set, summed by class."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels.reference.precision import autocast_disabled, upcast

# Rows of the support whose affinities are held at once: the faster for staying in cache.
ROWS = 1024


def sort_by_class(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The order (n,) in which labels ascend, equal ones as they were, and the offsets (K+1,) of the classes in it."""
    ascending, order = labels.sort(stable=True)
    return order, torch.searchsorted(ascending, torch.arange(classes + 1, device=labels.device))


def affinity(
    queries: Tensor, support: Tensor, labels: Tensor, classes: int, beta: float, weights: Tensor | None
) -> Tensor:
    wide = upcast(queries)
    minus = wide.new_full((1,), -1.0)
    # One row more at either end: for labels below 0 and above K-1.
    total, row = wide.new_zeros(classes + 2, wide.shape[0]), labels.clamp(-1, classes) + 1
    with autocast_disabled(queries):
        for start in range(0, max(1, support.shape[0]), ROWS):
            here = slice(start, start + ROWS)
            near = torch.addmm(minus, upcast(support[here]), wide.T).mul_(beta).exp_()
            total.index_add_(0, row[here], near if weights is None else near * weights[here, None].to(near.dtype))
    return total[1:-1].T.contiguous()
