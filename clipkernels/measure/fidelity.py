"""Fidelity of embeddings: similarity to the host's dense embeddings, and to those of the same method in fp32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

MIN_COSINE = 0.99
"""A warning is due if the cosine of a low precision with the same method in fp32 falls below this."""


class Fidelity(NamedTuple):
    """Similarity of embeddings to the host's dense embeddings in eager fp32, and to those of the same method in fp32.

    cosine: minimum and mean, over images, of the cosine with the dense embedding; not finite counts as 0.
    precision: minimum and mean of the cosine with the same method in fp32; None in fp32.
    agreement: share of images whose nearest other image is the same as with dense embeddings; None for one image.
    finite: true if every embedding is finite.
    """

    cosine: tuple[float, float]
    precision: tuple[float, float] | None
    agreement: float | None
    finite: bool


def compare(embeddings: Tensor, dense: Tensor, fp32: Tensor | None) -> Fidelity:
    """Return the fidelity of embeddings (n,E) to dense ones (n,E), and to the same method's in fp32 unless None."""

    def cosine(other: Tensor) -> tuple[float, float]:
        cosines = (unit(embeddings) * unit(other)).sum(1).clamp(-1, 1)
        return cosines.min().item(), cosines.mean().item()

    same = (nearest(embeddings) == nearest(dense)).double().mean().item() if len(embeddings) > 1 else None
    return Fidelity(cosine(dense), None if fp32 is None else cosine(fp32), same, bool(embeddings.isfinite().all()))


def unit(x: Tensor) -> Tensor:
    """Return the rows normalised to length one; a row that is not finite becomes zeros."""
    return normalize(x.masked_fill(~x.isfinite().all(1, keepdim=True), 0), dim=1)


def nearest(x: Tensor) -> Tensor:
    """Return, for every row (n,E), the index of the other row with the largest cosine; ties go to the lower index."""
    x = unit(x)
    indices = []
    for start, part in zip(range(0, len(x), 1024), x.split(1024), strict=True):
        cosines = part @ x.T
        cosines.diagonal(start).fill_(-torch.inf)
        indices.append(cosines.argmax(1))
    return torch.cat(indices)


def complaint(fidelity: Fidelity) -> str | None:
    """Return what is wrong with embeddings that are not finite or that low precision changed too much, or None."""
    worst, mean = fidelity.precision or (1.0, 1.0)
    if not fidelity.finite:
        return "expected finite embeddings, got inf or nan"
    if worst < MIN_COSINE:
        return (
            f"expected a cosine of at least {MIN_COSINE} with the same method in fp32, "
            f"got a minimum of {worst:.4f} and a mean of {mean:.4f}"
        )
    return None
