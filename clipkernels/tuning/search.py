"""The search for plans: published schedules, then the frontier of the additive model, then neighbours of the best.

Plans that lie on different sides of a budget are compared by their equivalent cost: cost plus what it takes, at the
local exchange rate of damage for cost, to bring the plan's damage to the damage at which the budget breaks.

    equivalent(plan) = cost(plan) + (log damage(plan) - log damage*) / rate

Source of the additive model of a chain and its dynamic program: the knapsack of layer-wise compression, as in
arXiv 2203.08173 (SPDY), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from clipkernels.plan import Condense, Merge, Plan, Prune
from clipkernels.tuning.budget import Constraint
from clipkernels.tuning.candidates import (
    Geometry,
    model_frontier,
    neighbours,
    slopes_for,
    with_proportional,
    with_step_of,
)
from clipkernels.tuning.effects import FAMILIES, Curve, Family, curve_of, single_steps
from clipkernels.tuning.evaluations import Evaluation, Evaluator, slack_of
from clipkernels.tuning.results import Report

TARGET_SLACK = 2.5
"""Standard errors between the figure of the plan that is searched for and its bound, on the search half."""
SAFE_SLACK = 8.0
WINDOW = 0.7
"""Largest difference of the log damages of two plans that the exchange rate compares."""
TRIES_PER_ROUND = 5
SIZES = (6, 3, 1)


class Task(NamedTuple):
    """The task of a search.

    constraints: those about quality.
    families: names of the kinds of steps.
    published: names of the published schedules, by plan; dense is among them.
    cost: of a plan.
    block_cost: returns, for a family, the cost of a block by its index and the tokens before and after its step.
    affordable: false for a plan that breaks a constraint about cost.
    limit: most plans to evaluate on the search half.
    """

    geometry: Geometry
    constraints: Sequence[Constraint]
    families: Sequence[str]
    published: Mapping[Plan, str]
    cost: Callable[[Plan], float]
    block_cost: Callable[[Family], Callable[[int, int, int], float]]
    affordable: Callable[[Plan], bool]
    limit: int


class Search:
    """One search. `run` leaves its result in the evaluator: every plan that was evaluated on the search half."""

    def __init__(self, task: Task, evaluator: Evaluator, report: Report) -> None:
        self.task, self.evaluator, self.report = task, evaluator, report
        self.dense = task.cost(task.geometry.plan((None,) * task.geometry.blocks))
        self.curves: dict[str, dict[int, Curve]] = {}
        self.by_tail = any(constraint.name == "cosine_p1" for constraint in task.constraints)
        self.largest = 0.0

    def run(self) -> None:
        """Evaluate plans until the limit is reached or nothing better is found."""
        self.measure_effects()
        self.report.begin("search", self.task.limit)
        for plan in self.task.published:
            self.evaluate(plan)
        self.largest = max(self.harm(each) for each in self.evaluator.searched.values())
        for name in self.task.families:
            self.bisect(self.frontier_of(name))
        starts = sorted(self.evaluator.searched, key=self.value)
        kinds: set[tuple[object, ...]] = set()
        for plan in starts:
            kind = tuple(sorted({type(step).__name__ for step in plan.steps if step is not None}))
            if kind in kinds or not self.has_room():
                continue
            kinds.add((*kind,))
            if len(kinds) > 2:
                break
            self.improve(plan, self.task.limit - self.room() // 2)
        best = self.best()
        if any(isinstance(step, Merge) for step in best.steps) and self.allowed(best):
            other = with_proportional(best, not best.proportional)
            if self.has_room():
                self.evaluate(other)
        self.mix(self.best())
        self.improve(self.best(), self.task.limit)
        self.spread(self.best())

    def evaluate(self, plan: Plan) -> Evaluation:
        """The evaluation of a plan on the search half."""
        fresh = plan not in self.evaluator.searched
        evaluation = self.evaluator("search", plan)
        if fresh:
            self.report.advance()
        return evaluation

    def allowed(self, plan: Plan) -> bool:
        """True if both families of merges may be used."""
        return {"merge", "merge-plain"} <= set(self.task.families)

    def room(self) -> int:
        """The number of plans that may still be evaluated."""
        return max(0, self.task.limit - len(self.evaluator.searched))

    def has_room(self) -> bool:
        """True if another plan may be evaluated."""
        return self.room() > 0

    def harm(self, evaluation: Evaluation) -> float:
        """The damage by which plans are compared: the mean, or its geometric mean with the tail for percentiles."""
        least = 1e-12
        mean = max(least, evaluation.mean)
        return math.sqrt(mean * max(least, evaluation.tail)) if self.by_tail else mean

    def measure_effects(self) -> None:
        """Measure the curves of all families."""
        geometry = self.task.geometry
        for name in self.task.families:
            curves = {}
            for block in range(geometry.last):
                plans = single_steps(FAMILIES[name], geometry.entry, geometry.prefix, block, geometry.blocks)
                plans = [geometry.plan(plan.steps) for plan in plans]
                curve = curve_of(plans, [self.harm(self.evaluator("effects", plan)) for plan in plans])
                if curve is not None:
                    curves[block] = curve
            self.curves[name] = curves

    def frontier_of(self, family: str) -> list[Plan]:
        """The frontier of the model of one family, by descending cost."""
        plans = model_frontier(
            self.task.geometry,
            FAMILIES[family],
            self.curves[family],
            self.task.block_cost(FAMILIES[family]),
            slopes_for(self.largest, self.dense),
        )
        return sorted(plans, key=self.task.cost, reverse=True)

    def bisect(self, frontier: Sequence[Plan]) -> None:
        """Evaluate the plans of a frontier around the budget."""
        low, high = 0, len(frontier) - 1  # frontier[low] is expected to keep the budget, frontier[high] to break it
        while low <= high and self.has_room():
            middle = (low + high) // 2
            if self.is_safe(frontier[middle]):
                low = middle + 1
            else:
                high = middle - 1

    def is_safe(self, plan: Plan) -> bool:
        """True if a cheaper plan may keep the budget as well; without constraints about quality, if it is too dear."""
        if not self.task.constraints:
            affordable = self.task.affordable(plan)
            if affordable:
                self.evaluate(plan)
            return not affordable
        return slack_of(self.task.constraints, self.evaluate(plan)) >= TARGET_SLACK

    def boundary(self) -> tuple[float, float]:
        """The log damage at which the budget breaks, and the exchange rate there: log damage per cost, negative."""
        points = sorted(
            (math.log(self.harm(evaluation)), self.task.cost(plan), slack_of(self.task.constraints, evaluation))
            for plan, evaluation in self.evaluator.searched.items()
            if any(plan.steps)
        )
        # The log damage that separates best the plans that keep the budget from those that break it.
        wrong = sum(slack >= TARGET_SLACK for _, _, slack in points)
        best, edge = wrong, points[0][0] - 1e-6
        for place, (log_damage, _, slack) in enumerate(points):
            wrong += -1 if slack >= TARGET_SLACK else 1
            if wrong < best:
                following = points[place + 1][0] if place + 1 < len(points) else log_damage + 1e-6
                best, edge = wrong, (log_damage + following) / 2
        return edge, self.rate_at(edge, [(log_damage, cost) for log_damage, cost, _ in points])

    def rate_at(self, edge: float, points: Sequence[tuple[float, float]]) -> float:
        """The slope of log damage over cost of the Pareto-optimal points near a log damage."""
        pareto, least = [], math.inf
        for log_damage, cost in sorted(points):
            if cost < least:
                pareto.append((log_damage, cost))
                least = cost
        near = sorted(pareto, key=lambda point: abs(point[0] - edge))[: max(4, len(pareto) // 3)]
        mean_x = sum(cost for _, cost in near) / len(near)
        mean_y = sum(log_damage for log_damage, _ in near) / len(near)
        spread = sum((cost - mean_x) ** 2 for _, cost in near)
        slope = sum((cost - mean_x) * (log_damage - mean_y) for log_damage, cost in near) / spread if spread else 0.0
        return min(slope, -1.0 / self.dense)

    def value(self, plan: Plan) -> float:
        """The equivalent cost of an evaluated plan, smaller is better; inf far from the budget's boundary."""
        return self.values()(plan)

    def values(self) -> Callable[[Plan], float]:
        """The function from an evaluated plan to its value, with the boundary as it is known now."""
        searched = self.evaluator.searched
        if not self.task.constraints:
            return lambda plan: math.log(self.harm(searched[plan])) if self.task.affordable(plan) else math.inf
        edge, rate = self.boundary()

        def value(plan: Plan) -> float:
            distance = math.log(self.harm(searched[plan])) - edge
            return self.task.cost(plan) - distance / rate if abs(distance) <= WINDOW else math.inf

        return value

    def best(self) -> Plan:
        """The plan of the least value; without one near the boundary, the one nearest to it."""
        value = self.values()
        plan = min(self.evaluator.searched, key=value)
        if value(plan) < math.inf or not self.task.constraints:
            return plan
        edge, _ = self.boundary()
        return min(
            (plan for plan in self.evaluator.searched if any(plan.steps)),
            key=lambda plan: abs(math.log(self.harm(self.evaluator.searched[plan])) - edge),
        )

    def modelled(self, plan: Plan) -> float:
        """The damage of a plan by the additive model."""
        total = 0.0
        for block, step in enumerate(plan.steps):
            if step is not None:
                curve = self.curve(step, block)
                total += curve(plan.tokens[block + 1]) - curve(plan.tokens[block]) if curve else 0.0
        return max(total, 1e-9)

    def curve(self, step: object, block: int) -> Curve | None:
        """The curve of the family that a step is of, or of any other one of that block."""
        names = {
            Merge: ("merge", "merge-plain"),
            Prune: ("prune", "prune-drop"),
            Condense: ("condense",),
        }[type(step)]  # type: ignore[index]
        first = (isinstance(step, Merge) and not step.proportional) or (isinstance(step, Prune) and not step.fuse)
        for name in [*(names[::-1] if first else names), *self.curves]:
            if block in self.curves.get(name, {}):
                return self.curves[name][block]
        return None

    def improve(self, plan: Plan, limit: int) -> None:
        """Move to better neighbours until none is found; the additive model says which ones are tried."""
        sizes = [max(1, round(size * self.task.geometry.entry / 65)) for size in SIZES]
        for size in dict.fromkeys(sizes):
            while len(self.evaluator.searched) < limit and self.has_room():
                moved = self.move(plan, size, limit)
                if moved is None:
                    break
                plan = moved

    def move(self, plan: Plan, size: int, limit: int) -> Plan | None:
        """The best of the most promising neighbours if it is better than the plan, else None."""
        value, tried = self.values(), []
        scores = {other: self.promise(plan, other) for other in neighbours(self.task.geometry, plan, size)}
        fresh = [other for other in scores if other not in self.evaluator.searched and scores[other] < math.inf]
        for other in sorted(fresh, key=scores.__getitem__)[:TRIES_PER_ROUND]:
            if len(self.evaluator.searched) >= limit or not self.has_room():
                break
            self.evaluate(other)
            tried.append(other)
            if value(other) < value(plan) - self.tolerance():
                return other
        return None

    def tolerance(self) -> float:
        """The least gain that counts, in the unit of the values."""
        if not self.task.constraints:
            return 1e-3
        return 2e-4 * self.dense

    def promise(self, plan: Plan, other: Plan) -> float:
        """The value of a neighbour by the additive model, relative to an evaluated plan."""
        ratio = math.log(self.modelled(other) / self.modelled(plan))
        if not self.task.constraints:
            return ratio if self.task.affordable(other) else math.inf
        _, rate = self.boundary()
        return self.task.cost(other) - self.task.cost(plan) - ratio / rate

    def mix(self, plan: Plan) -> None:
        """Try steps of other families in single blocks of a plan, those that the model favours first."""
        options = []
        for block in range(self.task.geometry.last):
            for name in self.task.families:
                other = with_step_of(self.task.geometry, plan, block, FAMILIES[name])
                if other is not None and other not in self.evaluator.searched and self.has_any_curve(other):
                    options.append(other)
        for other in sorted(dict.fromkeys(options), key=lambda other: self.promise(plan, other))[:TRIES_PER_ROUND]:
            if self.has_room():
                self.evaluate(other)

    def has_any_curve(self, plan: Plan) -> bool:
        """True if the model knows every step of a plan."""
        return all(step is None or self.curve(step, block) is not None for block, step in enumerate(plan.steps))

    def spread(self, plan: Plan) -> None:
        """Evaluate safer and cheaper variants of a plan, so that the promise has plans to fall back on."""
        if not self.task.constraints:
            return
        for sign in (-1, 1):
            current = plan
            for _ in range(8):
                slack = slack_of(self.task.constraints, self.evaluate(current))
                if (sign < 0 and slack > SAFE_SLACK) or (sign > 0 and slack < 0):
                    break
                size = max(1, round(self.task.geometry.entry / 65))
                options = [
                    other
                    for other in neighbours(self.task.geometry, current, size)
                    if (self.task.cost(other) > self.task.cost(current)) == (sign < 0)
                ]
                if not options:
                    break
                current = min(options, key=lambda other: self.promise(current, other))
                self.evaluate(current)
