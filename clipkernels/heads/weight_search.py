"""How many images every pair of weights gets right, for logits that are linear in both.

    logits = base + u·first + v·second

For one u an image is right on an interval of v, whose ends are the nearest of K-1 lines; so a grid of u by v costs its
u's alone, and no logits are made.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SearchResult(NamedTuple):
    """The share of images that are right, and the weights u and v that it takes, the lowest of equally good ones."""

    accuracy: float
    first: float
    second: float


def grid(start: float, stop: float, steps: int) -> Tensor:
    """So many evenly spaced values from start, stop left out."""
    return start + torch.arange(steps, dtype=torch.float64) * ((stop - start) / steps)


def search(base: Tensor, first: Tensor, second: Tensor, labels: Tensor, us: Tensor, vs: Tensor) -> SearchResult:
    """The best weights of a grid.

    Args:
        base: (n,K) logits that have weight one.
        first: (n,K) weighed by u.
        second: (n,K) weighed by v.
        labels: (n,) int64 the true classes.
        us: (U,) values of u.
        vs: (V,) values of v, ascending.
    """
    rights = count_correct(base, first, second, labels, us, vs)
    best = int(rights.flatten().argmax())  # the first of the largest, on the CPU
    u, v = divmod(best, len(vs))
    return SearchResult(int(rights[u, v]) / len(labels), float(us[u]), float(vs[v]))


def count_correct(base: Tensor, first: Tensor, second: Tensor, labels: Tensor, us: Tensor, vs: Tensor) -> Tensor:
    """Images that are right for every pair of weights, (U,V) int64 on the CPU; of equal logits the lower class wins."""
    device = base.device
    # By how much the true class leads every class: it must be positive, or zero against a higher one.
    level, tilt, slope = (x.gather(1, labels[:, None]) - x for x in (base.double(), first.double(), second.double()))
    class_of = torch.arange(base.shape[1], device=device)
    own, lower = class_of == labels[:, None], class_of < labels[:, None]
    at, rights = vs.to(device, torch.float64), []
    for u in us.tolist():
        lead = level + u * tilt
        turn = -lead / slope
        flat = (slope == 0) & ~own
        never = (flat & ((lead < 0) | (lower & (lead == 0)))).any(1) | ~(lead + slope).isfinite().all(1)
        rising, falling = (slope > 0) & ~own, (slope < 0) & ~own
        start, stop = torch.zeros_like(labels), torch.full_like(labels, len(at))
        for strict, among in ((True, lower), (False, ~lower)):
            above = turn.masked_fill(~(rising & among), float("-inf")).amax(1)
            below = turn.masked_fill(~(falling & among), float("inf")).amin(1)
            start = torch.maximum(start, torch.searchsorted(at, above, right=strict))
            stop = torch.minimum(stop, torch.searchsorted(at, below, right=not strict))
        good = (start < stop) & ~never
        change = torch.zeros(len(at) + 1, dtype=torch.int64, device=device)
        change.index_add_(0, start, good.long())
        change.index_add_(0, stop, -good.long())
        rights.append(change.cumsum(0)[:-1])
    return torch.stack(rights).cpu()
