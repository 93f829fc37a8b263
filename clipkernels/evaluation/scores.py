"""Accuracies with their intervals: over images by a bootstrap, and over runs by their spread."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 1000
BLOCK_VALUES = 1 << 24


class Score(NamedTuple):
    """A share of images over one or several runs.

    mean: the mean of the runs.
    low, high: its 95 % bootstrap interval; images are drawn anew, the runs stay.
    spread: the standard deviation over the runs, None for a single one.
    runs, images: their numbers.
    """

    mean: float
    low: float
    high: float
    spread: float | None
    runs: int
    images: int


def score(hits: Tensor, seed: int = 0) -> Score:
    """The score of hits (R,n), 0 or 1, of n images in R runs. Deterministic.

    Raises:
        ValueError: no run or no image.
    """
    if hits.ndim != 2 or not hits.numel():
        raise ValueError(f"hits must be (R,n) with at least one run and one image, got {tuple(hits.shape)}")
    per_image = hits.double().mean(0)
    runs = hits.double().mean(1).tolist()
    generator, means, n = torch.Generator().manual_seed(seed), [], len(per_image)
    step = max(1, BLOCK_VALUES // n)
    for start in range(0, RESAMPLES, step):
        index = torch.randint(n, (min(step, RESAMPLES - start), n), generator=generator)
        means.append(per_image[index].mean(1))
    low, high = torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    spread = statistics.stdev(runs) if len(runs) > 1 else None
    return Score(statistics.mean(runs), low, high, spread, len(runs), n)
