"""Bootstrap intervals of means over images."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

RESAMPLES = 2000


def interval(values: np.ndarray) -> np.ndarray:
    """Return the 95 % bootstrap interval (2,k) of the means of values (n,k), or (2,) of (n,): images are drawn anew.

    The resamples are the same in every call for n images, so intervals of differences are paired.
    """
    return np.percentile(_counts(len(values)) @ values.astype(np.float64) / len(values), (2.5, 97.5), axis=0)


@lru_cache(maxsize=4)
def _counts(n: int) -> np.ndarray:
    """Return how often each of n images is in each resample, (2000,n)."""
    rng = np.random.default_rng(0)
    return np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(RESAMPLES)]).astype(np.float64)
