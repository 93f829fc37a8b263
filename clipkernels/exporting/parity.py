"""Comparison of an exported graph with the module that it was made of, at several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

BATCHES = (1, 3, 8)
"""Sizes of the first batches of a comparison; the following ones have the last."""
NEAR = 0.9999
"""Cosine of two embeddings that differ by rounding alone."""


class Parity(NamedTuple):
    """Cosines of embeddings with those of the same method in PyTorch's fp32.

    inputs: number of images or texts.
    cosine_min, cosine_p1, cosine_mean: the least, the first percentile and the mean; not finite counts as -1.
    near: share of inputs with a cosine of at least .9999.
    error: largest difference, over the largest entry.
    """

    inputs: int
    cosine_min: float
    cosine_p1: float
    cosine_mean: float
    near: float
    error: float

    def record(self) -> dict[str, Any]:
        """The values for JSON."""
        digits = {"inputs": 0, "error": 9}
        return {name: round(value, digits.get(name, 7)) for name, value in self._asdict().items()}


def measure_parity(actual: Tensor, expected: Tensor) -> Parity:
    """The parity of embeddings (n,E) with the expected ones (n,E)."""
    cosines = cosine_similarity(actual.double(), expected.double()).nan_to_num(-1.0, -1.0, -1.0).clamp(-1, 1)
    error = (actual - expected).abs().max() / expected.abs().max()
    return Parity(
        inputs=len(cosines),
        cosine_min=cosines.min().item(),
        cosine_p1=first_percentile(cosines),
        cosine_mean=cosines.mean().item(),
        near=(cosines >= NEAR).double().mean().item(),
        error=error.nan_to_num(torch.inf).item(),
    )


def first_percentile(cosines: Tensor) -> float:
    """The value that one in a hundred is below or at; the least of fewer than a hundred."""
    return cosines.sort().values[max(0, len(cosines) // 100 - 1)].item()


def batches(inputs: Tensor) -> Iterator[Tensor]:
    """Inputs (n,…) in batches of 1, 3, 8, and 8 from there on."""
    start = 0
    for size in (*BATCHES, *[BATCHES[-1]] * len(inputs)):
        if start < len(inputs):
            yield inputs[start : start + size]
            start += size


@torch.no_grad()
def encode_all(encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """The embeddings (n,E) of inputs (n,…), in those batches."""
    return torch.cat([encode(batch).float() for batch in batches(inputs)])
