"""Bounds of the figures of a budget, which hold beyond the sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipkernels.arguments import check_int, check_range
from clipkernels.tuning.budget import RULES, Constraint
from clipkernels.tuning.nearest import BLOCK_VALUES

PERCENTILE = 0.01
ROUNDING = 1e-12


def figure(constraint: Constraint, values: Tensor) -> float:
    """The figure of values (n,) that `per_image` returned: their mean, or their first percentile for cosine_p1."""
    if constraint.name == "cosine_p1":
        return torch.quantile(values, PERCENTILE).item()
    return values.mean().item()


def holds(constraint: Constraint, value: float) -> bool:
    """Return true if a value of a figure keeps its bound; a NaN does not. Rounding of 1e-12 does not count."""
    slack = ROUNDING * max(1.0, abs(constraint.bound))
    return value >= constraint.bound - slack if constraint.direction == ">=" else value <= constraint.bound + slack


def bound_of(
    constraint: Constraint, values: Tensor, seed: int = 0, level: float = 0.95, resamples: int = 2000
) -> float:
    """The bound of a figure on the side that can break the promise: lower, or upper for accuracy_drop.

    Images from the same source have a figure at least that good in a share `level` of all samples. Deterministic.

    The first percentile has the exact bound of order statistics, -1 if the sample is too small for one. A mean has a
    Bayesian bootstrap's, with one worst value added to the sample: 0 for a share, 1 for a drop, the sample's least
    cosine for cosines. For values of 0 and 1 that is the exact bound of a binomial. The plain bootstrap promises too
    much there: without a failure in the sample its bound is 1.

    Args:
        constraint: one about quality.
        values: (n,) from `per_image`.
        seed: seed of the resampling.
        level: confidence, in (0, 1).
        resamples: number of resampled means.
    Source: Bayesian bootstrap, Rubin, 1981; the added value, Learned-Miller and Thomas, arXiv 1905.06208; order
        statistics, David and Nagaraja, Order Statistics, section 7.1.
    """
    check_range("level", level, 0, 1, "()")
    values = values.double().cpu()
    if constraint.name == "cosine_p1":
        rank = _rank_below_percentile(len(values), level)
        return values.sort().values[rank - 1].item() if rank else -1.0
    means = _resampled_means(constraint, values, seed, resamples)
    return torch.quantile(means, 1 - level if constraint.direction == ">=" else level).item()


def risk_of(constraint: Constraint, values: Tensor, seed: int = 0, resamples: int = 2000) -> float:
    """The greatest chance that images from a source which breaks a constraint have a figure at least as good as this.

    `bound_of` at a level of 1 - risk is the constraint's own bound. Deterministic; in (0, 1].

    Args: as in `bound_of`.
    """
    values = values.double().cpu()
    if constraint.name == "cosine_p1":
        broken = sum(not holds(constraint, value) for value in values.tolist())
        return min(1.0, _shares_below_percentile(len(values))[broken].item())
    means = _resampled_means(constraint, values, seed, resamples).tolist()
    return (1 + sum(not holds(constraint, mean) for mean in means)) / (1 + len(means))


def _resampled_means(constraint: Constraint, values: Tensor, seed: int, resamples: int) -> Tensor:
    """Means (resamples,) of values (n,) and one worst value under random weights."""
    check_int("resamples", resamples, 1)
    sign = 1 if constraint.direction == ">=" else -1
    worst = values.min().item() if constraint.name == "cosine_mean" else min(0, sign)
    sample = torch.cat([sign * values, values.new_tensor([worst])])
    generator, means = torch.Generator().manual_seed(seed), []
    step = max(1, BLOCK_VALUES // len(sample))
    for start in range(0, resamples, step):
        weights = sample.new_empty(min(step, resamples - start), len(sample)).exponential_(generator=generator)
        means.append((weights @ sample) / weights.sum(1))
    return sign * torch.cat(means)


def sample_warning(constraint: Constraint, n: int, level: float = 0.95) -> str | None:
    """The warning that not even perfect values of n images prove a constraint; None if they do."""
    if constraint.name == "cosine_mean" or (constraint.name == "cosine_p1" and _rank_below_percentile(n, level)):
        return None
    loss = PERCENTILE if constraint.name == "cosine_p1" else abs(float(constraint.direction == ">=") - constraint.bound)
    if loss <= 0:
        return f"{constraint.text} cannot be proved on a sample: allow a loss, such as {RULES[constraint.name].example}"
    needed = math.ceil(math.log(1 - level) / math.log1p(-loss)) if loss < 1 else 1
    if n >= needed:
        return None
    return f"{constraint.text} needs {needed} held-out images for a bound at {level:.0%}, got {n}: add images"


def _rank_below_percentile(n: int, level: float) -> int:
    """The largest r for which the r-th lowest of n values is below the first percentile in a share `level` of samples.

    0 if there is none.
    """
    return int((_shares_below_percentile(n) <= 1 - level).sum())


def _shares_below_percentile(n: int) -> Tensor:
    """The chance (n+1,) of at most 0 … n values below the first percentile among n."""
    counts = torch.arange(n + 1, dtype=torch.float64)
    binomial = torch.distributions.Binomial(n, torch.tensor(PERCENTILE, dtype=torch.float64))
    return binomial.log_prob(counts).exp().cumsum(0)
