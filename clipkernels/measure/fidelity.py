"""Fidelity of embeddings: their distance from the host's dense ones and from their own method's in fp32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

MIN_COSINE = 0.99
"""The cosine with the same method in fp32 below which a low precision is reported."""


class Fidelity(NamedTuple):
    """How close embeddings came to the host's dense ones in eager fp32, and to their own method's.

    Cosines are the least and the mean over images; an embedding that is not finite counts as 0. `precision` is None in
    fp32. `agreement` is the share of images whose nearest other image is the same, None where there is no other.
    """

    cosine: tuple[float, float]
    precision: tuple[float, float] | None
    agreement: float | None
    finite: bool


def compare(came: Tensor, dense: Tensor, own: Tensor | None) -> Fidelity:
    """Fidelity of embeddings (n,E) to the dense ones, and to their own method's in fp32 unless they are those."""

    def cosine(other: Tensor) -> tuple[float, float]:
        each = (unit(came) * unit(other)).sum(1).clamp(-1, 1)
        return each.min().item(), each.mean().item()

    same = (nearest(came) == nearest(dense)).double().mean().item() if len(came) > 1 else None
    return Fidelity(cosine(dense), None if own is None else cosine(own), same, bool(came.isfinite().all()))


def unit(x: Tensor) -> Tensor:
    """Rows of length one, zeros for a row that is not finite."""
    return normalize(x.masked_fill(~x.isfinite().all(1, keepdim=True), 0), dim=1)


def nearest(x: Tensor) -> Tensor:
    """For every row (n,E) the index of the other row with the largest cosine, the lower of equals."""
    x = unit(x)
    found = []
    for start, part in zip(range(0, len(x), 1024), x.split(1024), strict=True):
        near = part @ x.T
        near.diagonal(start).fill_(-torch.inf)
        found.append(near.argmax(1))
    return torch.cat(found)


def complaint(fidelity: Fidelity) -> str | None:
    """The fault of embeddings that are not finite, or that a low precision moved too far; None without one."""
    worst, mean = fidelity.precision or (1.0, 1.0)
    if not fidelity.finite:
        return "expected finite embeddings, got some that are not"
    if worst < MIN_COSINE:
        return (
            f"expected a cosine of {MIN_COSINE} with the same in fp32, got {worst:.4f} at worst, {mean:.4f} in the mean"
        )
    return None
