"""Affinity to a support set, summed by class."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels.reference.precision import autocast_disabled, upcast

# Support rows processed at once; their affinities stay in cache, which is faster.
ROWS = 1024


def sort_by_class(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return the stable order (n,) that sorts the labels, and the offsets (K+1,) of the classes in that order."""
    ascending, order = labels.sort(stable=True)
    return order, torch.searchsorted(ascending, torch.arange(classes + 1, device=labels.device))


def affinity(
    queries: Tensor, support: Tensor, labels: Tensor, classes: int, beta: float, weights: Tensor | None
) -> Tensor:
    wide = upcast(queries)
    minus = wide.new_full((1,), -1.0)
    # One extra row at either end collects the labels below 0 and above K-1.
    total, row = wide.new_zeros(classes + 2, wide.shape[0]), labels.clamp(-1, classes) + 1
    with autocast_disabled(queries):
        for start in range(0, max(1, support.shape[0]), ROWS):
            part = slice(start, start + ROWS)
            votes = torch.addmm(minus, upcast(support[part]), wide.T).mul_(beta).exp_()
            total.index_add_(0, row[part], votes if weights is None else votes * weights[part, None].to(votes.dtype))
    return total[1:-1].T.contiguous()
