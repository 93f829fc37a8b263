"""Exhaustive search for two weights u and v that are linear in the logits.

    logits = base + u·first + v·second

For a fixed u an image is classified correctly on one interval of v, bounded by the nearest of K-1 lines. The cost of a
U×V grid is therefore that of its U values, and no logits are computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SearchResult(NamedTuple):
    """The best accuracy, 0 to 1, and the weights u and v that reach it; ties go to the lowest weights."""

    accuracy: float
    first: float
    second: float


def spaced(start: float, stop: float, steps: int) -> Tensor:
    """`steps` evenly spaced values in [start, stop), fp64."""
    return start + torch.arange(steps, dtype=torch.float64) * ((stop - start) / steps)


def search(base: Tensor, first: Tensor, second: Tensor, labels: Tensor, us: Tensor, vs: Tensor) -> SearchResult:
    """The best weights of a grid.

    Args:
        base: (n,K) logits of weight one.
        first: (n,K) logits of weight u.
        second: (n,K) logits of weight v.
        labels: (n,) int64, the true classes.
        us: (U,) values of u.
        vs: (V,) values of v, ascending.
    """
    correct = count_correct(base, first, second, labels, us, vs)
    best = int(correct.flatten().argmax())  # on the CPU argmax returns the first of equal maxima
    u, v = divmod(best, len(vs))
    return SearchResult(int(correct[u, v]) / len(labels), float(us[u]), float(vs[v]))


def count_correct(base: Tensor, first: Tensor, second: Tensor, labels: Tensor, us: Tensor, vs: Tensor) -> Tensor:
    """The number of images that each pair of weights classifies correctly, (U,V) int64 on the CPU.

    Ties between logits go to the lower class.
    """
    device = base.device
    # Leads of the true class over each class: an image is correct if they are positive, or zero over higher classes.
    level, tilt, slope = (x.gather(1, labels[:, None]) - x for x in (base.double(), first.double(), second.double()))
    class_of = torch.arange(base.shape[1], device=device)
    true, lower = class_of == labels[:, None], class_of < labels[:, None]
    values, counts = vs.to(device, torch.float64), []
    for u in us.tolist():
        lead = level + u * tilt
        crossing = -lead / slope
        constant = (slope == 0) & ~true
        always_wrong = (constant & ((lead < 0) | (lower & (lead == 0)))).any(1) | ~(lead + slope).isfinite().all(1)
        rising, falling = (slope > 0) & ~true, (slope < 0) & ~true
        start, stop = torch.zeros_like(labels), torch.full_like(labels, len(values))
        for strict, group in ((True, lower), (False, ~lower)):
            lower_bound = crossing.masked_fill(~(rising & group), float("-inf")).amax(1)
            upper_bound = crossing.masked_fill(~(falling & group), float("inf")).amin(1)
            start = torch.maximum(start, torch.searchsorted(values, lower_bound, right=strict))
            stop = torch.minimum(stop, torch.searchsorted(values, upper_bound, right=not strict))
        has_interval = (start < stop) & ~always_wrong
        change = torch.zeros(len(values) + 1, dtype=torch.int64, device=device)
        change.index_add_(0, start, has_interval.long())
        change.index_add_(0, stop, -has_interval.long())
        counts.append(change.cumsum(0)[:-1])
    return torch.stack(counts).cpu()
