"""True forwards of plans, measured on one part of the photographs and kept as soon as they are there.

effects    the first photographs of the search half, for the effects of single blocks
search     the search half, on which plans are compared
held out   the other half, on which the promise is checked
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import mul
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from clipkernels.plan import Plan
from clipkernels.tuning.bounds import bound_of, figure, holds, risk_of
from clipkernels.tuning.budget import Constraint
from clipkernels.tuning.forwards import Part
from clipkernels.tuning.quality import damage, per_image
from clipkernels.tuning.reference import Reference

PartName = Literal["effects", "search", "held out"]
COSINE_P1 = Constraint("cosine_p1", None, 1.0)
LEVEL = 0.95
SEARCH_LEVEL = 0.8413447460685429
"""Level of the bounds on the search half: a normal distribution has it one standard error from its mean."""


LEAST_HARM, LEAST_ERROR = 1e-12, 1e-9
BANDWIDTH = 0.3
"""Difference of log harms over which figures are averaged."""


class Evaluation(NamedTuple):
    """The figures of a plan on one part of the photographs.

    mean, tail: damages, as `quality.damage` returns them.
    p1: first percentile of the cosines.
    figures: the figure of each constraint about quality, in the order of the budget; none on "effects".
    bounds: the bound of each figure on the side that can break the promise, at LEVEL on the held-out half and at
        SEARCH_LEVEL on the search half.
    risk: on the held-out half, the greatest `risk_of` a constraint; 1 elsewhere.
    """

    mean: float
    tail: float
    p1: float
    figures: tuple[float, ...] = ()
    bounds: tuple[float, ...] = ()
    risk: float = 1.0


class Store(Protocol):
    """Keeps evaluations by part and plan."""

    def get(self, part: PartName, plan: Plan) -> Evaluation | None:
        """The evaluation that was kept, or None."""

    def put(self, part: PartName, plan: Plan, evaluation: Evaluation) -> None:
        """Keep an evaluation."""


class Stopped(Exception):
    """The caller's `progress` asked to stop."""


class Evaluator:
    """Evaluates plans, each once per part.

    Args:
        parts: the parts of the photographs; "effects" is the beginning of "search".
        reference: the dense embeddings of all photographs, those of the search half first.
        constraints: the constraints about quality.
        store: keeps every evaluation.
        seed: seed of the bootstrap.
        after_batch: called after the forward of each batch; it may raise `Stopped`.
    """

    def __init__(
        self,
        parts: Mapping[PartName, Part],
        reference: Reference,
        constraints: Sequence[Constraint],
        store: Store,
        seed: int,
        after_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self.parts, self.reference, self.constraints = parts, reference, tuple(constraints)
        self.store, self.seed, self.after_batch = store, seed, after_batch
        first = len(parts["search"].index)
        self.rows = {
            "search": torch.arange(first),
            "held out": torch.arange(first, len(reference)),
            "effects": torch.arange(len(parts["effects"].index)),
        }
        self.subsets = {name: reference.subset(rows) for name, rows in self.rows.items()}
        self.searched: dict[Plan, Evaluation] = {}
        """The evaluations on the search half, in the order in which they were made."""

    def __call__(self, part: PartName, plan: Plan) -> Evaluation:
        """The evaluation of a plan on a part; raises `Stopped`."""
        evaluation = self.store.get(part, plan)
        if evaluation is None:
            evaluation = self._measure(part, plan)
            self.store.put(part, plan, evaluation)
        if part == "search":
            self.searched.setdefault(plan, evaluation)
        return evaluation

    def embed(self, part: PartName, plan: Plan) -> Tensor:
        """Normalised embeddings (m,E) of a part; raises `Stopped`."""
        return self.parts[part].embed(plan, self.after_batch)

    def reduced(self, plan: Plan) -> Tensor:
        """Normalised embeddings (n,E) of all photographs, those of the search half first; raises `Stopped`."""
        return torch.cat([self.embed("search", plan), self.embed("held out", plan)])

    def _measure(self, part: PartName, plan: Plan) -> Evaluation:
        reduced = self.embed(part, plan)
        mean, tail = (damage(reduced, self.subsets[part], kind) for kind in ("mean", "tail"))  # type: ignore[arg-type]
        p1 = figure(COSINE_P1, per_image(COSINE_P1, reduced, self.subsets[part]))
        if part == "effects":
            return Evaluation(mean, tail, p1)
        values = [self._values(constraint, part, plan, reduced) for constraint in self.constraints]
        figures = tuple(figure(each, value) for each, value in zip(self.constraints, values, strict=True))
        bounds = tuple(self._bound(part, each, value) for each, value in zip(self.constraints, values, strict=True))
        if part == "search":
            return Evaluation(mean, tail, p1, figures, bounds)
        risks = [risk_of(each, value, self.seed) for each, value in zip(self.constraints, values, strict=True)]
        return Evaluation(mean, tail, p1, figures, bounds, max(risks, default=0.0))

    def _values(self, constraint: Constraint, part: PartName, plan: Plan, reduced: Tensor) -> Tensor:
        """Values (m,) of a part's photographs.

        The gallery is all photographs where it is dense. A reduced gallery is the search half in the search, so that
        the search reads nothing of the other half, and all photographs on the held-out half.
        """
        mixed = self._searches_reduced(constraint)
        if not mixed and constraint.k is None:
            return per_image(constraint, reduced, self.subsets[part])
        if mixed and part == "search":
            return per_image(constraint, reduced, self.subsets[part])
        if mixed:
            everything = torch.cat([self.embed("search", plan), reduced])
        else:
            everything = self.reference.dense.clone()
            everything[self.rows[part]] = reduced
        return per_image(constraint, everything, self.reference)[self.rows[part]]

    def _bound(self, part: PartName, constraint: Constraint, values: Tensor) -> float:
        if part == "held out":
            return bound_of(constraint, values, self.seed, LEVEL)
        # Few photographs have no bound of a percentile, but some distance to their worst.
        return max(bound_of(constraint, values, self.seed, SEARCH_LEVEL, 500), values.min().item())

    def _searches_reduced(self, constraint: Constraint) -> bool:
        against_same = constraint.name == "recall" and self.reference.against == "same"
        return constraint.name == "text_recall" or against_same


def keeps(constraints: Sequence[Constraint], figures: Sequence[float]) -> bool:
    """Return true if every figure keeps its bound."""
    return all(holds(constraint, value) for constraint, value in zip(constraints, figures, strict=True))


def harm_of(constraints: Sequence[Constraint], evaluation: Evaluation) -> float:
    """The damage by which plans are compared: the mean, or its geometric mean with the tail for a percentile.

    It is above 0, and less noisy than any figure.
    """
    mean = max(LEAST_HARM, evaluation.mean)
    if any(constraint.name == "cosine_p1" for constraint in constraints):
        return math.sqrt(mean * max(LEAST_HARM, evaluation.tail))
    return mean


def slacks_of(constraints: Sequence[Constraint], searched: Mapping[Plan, Evaluation]) -> dict[Plan, float]:
    """The least distance of a figure to its bound for each plan, in standard errors; negative if one is broken.

    A figure counts half as it is, and half as the plans of similar harm have it, because the largest of many noisy
    figures is mostly luck. Its error is that of the plans of similar harm.

    Args:
        constraints: those about quality.
        searched: evaluations on the search half, whose bounds are one standard error from their figures.
    """
    harms = {plan: math.log(harm_of(constraints, evaluation)) for plan, evaluation in searched.items()}
    slacks = {}
    for plan, evaluation in searched.items():
        weights = [math.exp(-0.5 * ((harm - harms[plan]) / BANDWIDTH) ** 2) for harm in harms.values()]
        places = [harm - harms[plan] for harm in harms.values()]
        least = math.inf
        for number, constraint in enumerate(constraints):
            figures = [each.figures[number] for each in searched.values()]
            errors = [abs(each.figures[number] - each.bounds[number]) for each in searched.values()]
            sign = 1 if constraint.direction == ">=" else -1
            value = (evaluation.figures[number] + _local_line(places, figures, weights)) / 2
            error = sum(map(mul, weights, errors)) / sum(weights)
            least = min(least, sign * (value - constraint.bound) / max(LEAST_ERROR, error))
        slacks[plan] = least
    return slacks


def _local_line(places: Sequence[float], values: Sequence[float], weights: Sequence[float]) -> float:
    """The value at 0 of the weighted least-squares line through values at places."""
    total, x_sum, y_sum = sum(weights), sum(map(mul, weights, places)), sum(map(mul, weights, values))
    xx_sum = sum(weight * place * place for weight, place in zip(weights, places, strict=True))
    xy_sum = sum(weight * x * y for weight, x, y in zip(weights, places, values, strict=True))
    spread = total * xx_sum - x_sum**2
    if spread <= 1e-9 * total**2:
        return y_sum / total
    return (y_sum * xx_sum - x_sum * xy_sum) / spread
