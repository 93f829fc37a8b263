"""Nearest neighbours among embeddings, a few queries at a time.

Cosines that differ by at most 1e-6 are equal.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

TIE = 1e-6
"""Cosines that differ by at most this are equal, because fp32 embeddings of one image differ so much by batch size."""
BLOCK_VALUES = 1 << 23
"""Values of the matrix of cosines that are computed at once, 64 MiB in fp64."""


def unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n,E) in fp64 of length one, and true (n,) for those without a direction, which become zeros."""
    rows = rows.detach().double()
    lost = ~(rows.isfinite().all(1) & (rows != 0).any(1))
    return normalize(rows.masked_fill(lost[:, None], 0), dim=1), lost


def blocks(queries: Tensor, index: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The cosines of queries (m,E) with an index (n,E), a few queries at a time."""
    step = max(1, BLOCK_VALUES // len(index))
    for start in range(0, len(queries), step):
        place = slice(start, min(start + step, len(queries)))
        yield place, queries[place] @ index.T


def others(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The cosines of rows (n,E) with each other, -inf with themselves, a few rows at a time."""
    for place, cosines in blocks(rows, rows):
        cosines.diagonal(place.start).fill_(-torch.inf)
        yield place, cosines


def kth(cosines: Tensor, k: int) -> Tensor:
    """The k-th largest of each row (m,n), as (m,1)."""
    return cosines.amax(1, keepdim=True) if k == 1 else cosines.topk(k, 1).values[:, -1:]


def choose(cosines: Tensor, k: int) -> Tensor:
    """The places (m,k) of the k largest of each row (m,n), ascending; of equal ones the lower places."""
    limit = kth(cosines, k)
    larger, equal = cosines > limit + TIE, (cosines - limit).abs() <= TIE
    chosen = larger | (equal & (equal.cumsum(1) <= k - larger.sum(1, keepdim=True)))
    return chosen.nonzero()[:, 1].view(-1, k)
