"""The boundary of a budget among plans that were run: the harm at which it breaks, and the price of harm there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

TARGET_SLACK = 2.0
"""Standard errors between the figure of the plan that is searched for and its bound, on the search half."""
LEAST_DISTANCE = 1e-6
"""Distance of the boundary from the outermost plan, if all plans keep the budget or none does."""


class Point(NamedTuple):
    """A plan that was run: its log harm, its cost, and the slack of its figures as `slacks_of` gives it."""

    harm: float
    cost: float
    slack: float


class Boundary(NamedTuple):
    """The log harm at which a budget breaks, and the exchange rate there: log harm per cost, negative."""

    edge: float
    rate: float


def boundary_of(points: Sequence[Point], dense: float) -> Boundary:
    """The boundary that plans show.

    Args:
        points: one or more reduced plans.
        dense: the cost of the dense tower.
    """
    edge = _edge_of(points)
    return Boundary(edge, _rate_at(edge, points, dense))


def _edge_of(points: Iterable[Point]) -> float:
    """The log harm that best separates plans that keep the budget from those that break it."""
    pairs = sorted((point.harm, point.slack) for point in points)
    wrong = sum(slack >= TARGET_SLACK for _, slack in pairs)
    least, edge = wrong, pairs[0][0] - LEAST_DISTANCE
    for place, (harm, slack) in enumerate(pairs):
        wrong += -1 if slack >= TARGET_SLACK else 1
        if wrong < least:
            following = pairs[place + 1][0] if place + 1 < len(pairs) else harm + LEAST_DISTANCE
            least, edge = wrong, (harm + following) / 2
    return edge


def _rate_at(edge: float, points: Iterable[Point], dense: float) -> float:
    """The slope of log harm over cost of the best plans near a log harm."""
    pareto, least = [], math.inf
    for harm, cost in sorted((point.harm, point.cost) for point in points):
        if cost < least:
            pareto.append((harm, cost))
            least = cost
    near = sorted(pareto, key=lambda point: abs(point[0] - edge))[: max(4, len(pareto) // 3)]
    middle = sum(cost for _, cost in near) / len(near)
    spread = sum((cost - middle) ** 2 for _, cost in near)
    slope = sum((cost - middle) * harm for harm, cost in near) / spread if spread else 0.0
    return min(slope, -1.0 / dense)
