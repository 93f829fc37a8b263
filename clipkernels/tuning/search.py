"""The search for plans: published schedules, then the frontier of the additive model, then neighbours of the best.

Plans that lie on different sides of a budget are compared by their equivalent cost: cost plus what it takes, at the
local exchange rate of harm for cost, to bring the plan's harm to that at which the budget breaks.

    equivalent(plan) = cost(plan) + (log harm* - log harm(plan)) / rate,  rate < 0

Source of a chain's dynamic program over effects of single layers: SPDY, arXiv 2203.08173, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from clipkernels.plan import Condense, Merge, Plan, Prune, Step
from clipkernels.tuning.boundary import Boundary, Point, boundary_of
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
from clipkernels.tuning.evaluations import Evaluation, Evaluator, harm_of, slacks_of
from clipkernels.tuning.results import Report

SAFE_SLACK = 6.0
WINDOW = 0.5
"""Largest difference of the log harms of two plans that the exchange rate compares."""
PROBES = 3
"""Plans of the frontier of a family that are run."""
HOPELESS = 0.06
"""Equivalent cost of a family above the best one, over the dense cost, at which its frontier is left alone."""
TRIES_PER_ROUND = 8
SIZES = (6, 3, 1)
"""Tokens that a move takes from one block to another, of 65."""
SPREAD_SHARE = 0.2
"""Share of the plans of a search that vary its result, so that the promise has plans to fall back on."""
FAMILIES_OF: Mapping[type, tuple[str, str]] = {
    Merge: ("merge", "merge-plain"),
    Prune: ("prune", "prune-drop"),
    Condense: ("condense", "condense"),
}


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
        self.searched = evaluator.searched
        self.dense = task.cost(task.geometry.plan((None,) * task.geometry.blocks))
        self.curves: dict[str, dict[int, Curve]] = {}
        self.limit = task.limit
        """Plans up to which the present stage may go."""

    def run(self) -> None:
        """Evaluate plans until the limit is reached or nothing better is found."""
        self.measure_effects()
        self.report.begin("search", self.task.limit)
        self.evaluate_all(self.task.published)
        reserve = round(SPREAD_SHARE * self.task.limit) if self.task.constraints else 0
        self.limit = self.task.limit - reserve
        for name in self.task.families:
            self.probe(self.frontier_of(name))
        found = [plan for plan in self.searched if plan not in self.task.published]
        for start in dict.fromkeys([self.best(), self.best(found) if found else self.best()]):
            self.improve(start)
        self.vary(self.best())
        self.improve(self.best())
        self.limit = self.task.limit
        if self.task.constraints:
            self.spread(self.best())

    def evaluate(self, plan: Plan) -> Evaluation | None:
        """The evaluation of a plan on the search half; None if it is not there and the limit is reached."""
        if plan not in self.searched and len(self.searched) >= self.limit:
            return None
        fresh = plan not in self.searched
        evaluation = self.evaluator("search", plan)
        if fresh:
            self.report.advance()
        return evaluation

    def evaluate_all(self, plans: Iterable[Plan]) -> None:
        """Evaluate plans up to the limit."""
        for plan in plans:
            self.evaluate(plan)

    def harm(self, plan: Plan) -> float:
        """The log harm of an evaluated plan."""
        return math.log(harm_of(self.task.constraints, self.searched[plan]))

    def measure_effects(self) -> None:
        """Measure the curves of all families."""
        geometry = self.task.geometry
        plans = {
            (name, block): [
                geometry.plan(plan.steps)
                for plan in single_steps(FAMILIES[name], geometry.entry, geometry.prefix, block, geometry.blocks)
            ]
            for name in self.task.families
            for block in range(geometry.last)
        }
        self.report.begin("effects", sum(map(len, plans.values())))
        for (name, block), singles in plans.items():
            harms = []
            for plan in singles:
                harms.append(harm_of(self.task.constraints, self.evaluator("effects", plan)))
                self.report.advance()
            curve = curve_of(singles, harms)
            if curve is not None:
                self.curves.setdefault(name, {})[block] = curve

    def frontier_of(self, family: str) -> list[Plan]:
        """The frontier of the model of one family, by descending cost."""
        largest = math.exp(max(map(self.harm, self.searched)))
        slopes = slopes_for(largest, self.dense)
        block_cost = self.task.block_cost(FAMILIES[family])
        plans = model_frontier(self.task.geometry, FAMILIES[family], self.curves.get(family, {}), block_cost, slopes)
        return sorted((plan for plan in plans if any(plan.steps)), key=self.task.cost, reverse=True)

    def probe(self, frontier: Sequence[Plan]) -> None:
        """Evaluate a few plans of a frontier near the budget's boundary, fewer of a frontier that is far behind."""
        if not self.task.constraints:
            self.evaluate_all([plan for plan in frontier if self.task.affordable(plan)][:PROBES])
            return
        edge, error = self.boundary().edge, 0.0
        best = min(map(self.values(), self.searched))
        for _ in range(PROBES):
            fresh = [plan for plan in frontier if plan not in self.searched]
            if not fresh:
                return
            # The model is off by some factor, which a plan that was run shows.
            plan = min(fresh, key=lambda plan: abs(math.log(self.modelled(plan)) + error - edge))
            if self.evaluate(plan) is None:
                return
            error = self.harm(plan) - math.log(self.modelled(plan))
            if self.values(math.inf)(plan) > best + HOPELESS * self.dense:
                return

    def boundary(self) -> Boundary:
        """The boundary of the budget as it is known now."""
        slacks = slacks_of(self.task.constraints, self.searched)
        points = [
            Point(self.harm(plan), self.task.cost(plan), slacks[plan]) for plan in self.searched if any(plan.steps)
        ]
        return boundary_of(points, self.dense)

    def values(self, window: float = WINDOW) -> Callable[[Plan], float]:
        """The function from an evaluated plan to its value, smaller is better, with the boundary as it is known now.

        It is the equivalent cost, inf for a plan whose harm is far from the boundary's; or, for a budget about cost
        alone, the log harm of a plan that keeps it.
        """
        if not self.task.constraints:
            return lambda plan: self.harm(plan) if self.task.affordable(plan) else math.inf
        edge, rate = self.boundary()

        def value(plan: Plan) -> float:
            distance = edge - self.harm(plan)
            return self.task.cost(plan) + distance / rate if abs(distance) <= window else math.inf

        return value

    def best(self, plans: Iterable[Plan] | None = None) -> Plan:
        """The plan of the least value, of all or of some that were run; if all are far from the budget, the nearest."""
        value = self.values()
        plans = [plan for plan in (self.searched if plans is None else plans) if any(plan.steps)]
        plan = min(plans, key=value)
        if value(plan) < math.inf or not self.task.constraints:
            return plan
        edge = self.boundary().edge
        return min(plans, key=lambda plan: abs(self.harm(plan) - edge))

    def modelled(self, plan: Plan) -> float:
        """The harm of a plan by the additive model."""
        total = 0.0
        for block, step in enumerate(plan.steps):
            curve = None if step is None else self.curve(step, block)
            total += curve(plan.tokens[block + 1]) - curve(plan.tokens[block]) if curve else 0.0
        return max(total, 1e-9)

    def curve(self, step: Step, block: int) -> Curve | None:
        """The curve of the family of a step in a block, or of the most similar family that was measured."""
        first, second = FAMILIES_OF[type(step)]
        plain = (isinstance(step, Merge) and not step.proportional) or (isinstance(step, Prune) and not step.fuse)
        for name in [*((second, first) if plain else (first, second)), *self.curves]:
            if block in self.curves.get(name, {}):
                return self.curves[name][block]
        return None

    def improve(self, plan: Plan) -> None:
        """Move to better neighbours until none is found; the additive model says which ones are tried."""
        for size in dict.fromkeys(max(1, round(size * self.task.geometry.entry / 65)) for size in SIZES):
            moved: Plan | None = plan
            while moved is not None:
                plan = moved
                moved = self.move(plan, size)

    def move(self, plan: Plan, size: int) -> Plan | None:
        """The first of the most promising neighbours that is better than the plan, or None."""
        promise = self.promise_from(plan)
        scores = {other: promise(other) for other in neighbours(self.task.geometry, plan, size)}
        fresh = [other for other in scores if other not in self.searched and scores[other] < math.inf]
        gain = 2e-4 * self.dense if self.task.constraints else 1e-3
        for other in sorted(fresh, key=scores.__getitem__)[:TRIES_PER_ROUND]:
            if self.evaluate(other) is None:
                return None
            value = self.values()
            if value(other) < value(plan) - gain:
                return other
        return None

    def promise_from(self, plan: Plan) -> Callable[[Plan], float]:
        """The function to the value of another plan by the additive model, relative to that of an evaluated one."""
        rate = self.boundary().rate if self.task.constraints else -1.0

        def promise(other: Plan) -> float:
            ratio = math.log(self.modelled(other) / self.modelled(plan))
            if not self.task.constraints:
                return ratio if self.task.affordable(other) else math.inf
            return self.task.cost(other) - self.task.cost(plan) - ratio / rate

        return promise

    def vary(self, plan: Plan) -> None:
        """Try a plan with its merges weighed otherwise, and with steps of other families in single blocks."""
        if {"merge", "merge-plain"} <= set(self.task.families) and any(isinstance(step, Merge) for step in plan.steps):
            self.evaluate(with_proportional(plan, not plan.proportional))
        options: dict[Plan, None] = {}
        for block in range(self.task.geometry.last):
            for name in self.task.families:
                other = with_step_of(self.task.geometry, plan, block, FAMILIES[name])
                if other is not None and other not in self.searched and self.curve_is_known(other):
                    options[other] = None
        self.evaluate_all(sorted(options, key=self.promise_from(plan))[:TRIES_PER_ROUND])

    def curve_is_known(self, plan: Plan) -> bool:
        """True if the model knows every step of a plan."""
        return all(step is None or self.curve(step, block) is not None for block, step in enumerate(plan.steps))

    def spread(self, plan: Plan) -> None:
        """Evaluate safer and cheaper variants of a plan, so that the promise has plans to fall back on."""
        size = max(1, round(self.task.geometry.entry / 65))
        for sign in (-1, 1):
            current: Plan | None = plan
            while current is not None and self.evaluate(current) is not None:
                slack = slacks_of(self.task.constraints, self.searched)[current]
                if slack > SAFE_SLACK if sign < 0 else slack < 0:
                    break
                current = self.next_to(current, 2 * size if sign < 0 else size, sign)

    def next_to(self, plan: Plan, size: int, sign: int) -> Plan | None:
        """The most promising neighbour on the safer or on the cheaper side of a plan that was not run, or None."""
        cost = self.task.cost(plan)
        options = [
            other
            for other in neighbours(self.task.geometry, plan, size)
            if other not in self.searched and (self.task.cost(other) > cost) == (sign < 0)
        ]
        return min(options, key=self.promise_from(plan), default=None)
