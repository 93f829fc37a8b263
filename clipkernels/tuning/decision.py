"""The decision on a plan: those that keep the promise, then the first of them that is also as fast as it must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from clipkernels.measure.timing import Band
from clipkernels.plan import Plan
from clipkernels.tuning.bounds import holds
from clipkernels.tuning.budget import Constraint
from clipkernels.tuning.costs import Costs
from clipkernels.tuning.evaluations import Evaluator, keeps, slacks_of
from clipkernels.tuning.promise import order_of_tests, run_tests
from clipkernels.tuning.results import Report

MAX_TIMED = 3
"""Plans that are timed before none is returned."""


class Decision(NamedTuple):
    """A plan, or why there is none.

    plan: the plan that is returned, or the one that came nearest; None if there is none at all.
    reason: why no plan is returned; None if one is.
    speed: the paired speed-up of the plan; None if it was not timed.
    """

    plan: Plan | None
    reason: str | None
    speed: Band | None = None


def decide(
    evaluator: Evaluator,
    constraints: Sequence[Constraint],
    costs: Costs,
    time_plan: Callable[[Plan], Band] | None,
    report: Report,
) -> Decision:
    """The cheapest plan that keeps the promise and, with `time_plan`, is faster than the dense tower.

    Args:
        evaluator: has evaluated the plans on the search half.
        constraints: all constraints of the budget.
        costs: the costs of plans.
        time_plan: the paired speed-up of a plan; None times nothing.
        report: takes note of the progress.
    """
    quality = [constraint for constraint in constraints if constraint.is_quality]
    if quality:
        verified, failure = _verified(evaluator, quality, costs, report)
    else:
        verified, failure = _affordable(evaluator, costs)
    if failure is not None:
        return failure
    least = max([1.0, *(constraint.bound for constraint in constraints if constraint.name == "speedup")])
    nearest: Decision | None = None
    for plan in verified[:MAX_TIMED]:
        if time_plan is None:
            return Decision(plan, None)
        speed = time_plan(plan)
        if speed.low > least or (speed.low == least > 1):
            return Decision(plan, None, speed)
        if nearest is None or nearest.speed is None or speed.median > nearest.speed.median:
            wanted = "a plan that is faster than dense" if least == 1 else f"speedup>={least:g}"
            reason = (
                f"expected {wanted}, got a speed-up of {speed.median:.2f} ({speed.low:.2f} to {speed.high:.2f}) by the "
                "best plan that keeps the rest of the budget"
            )
            nearest = Decision(plan, reason, speed)
    assert nearest is not None
    return nearest


def _verified(
    evaluator: Evaluator, quality: Sequence[Constraint], costs: Costs, report: Report
) -> tuple[list[Plan], Decision | None]:
    """The plans that passed their tests and are affordable, the cheapest first; or why there is none."""
    plans = order_of_tests(evaluator.searched, quality, costs)
    if not plans:
        slacks = slacks_of(quality, evaluator.searched)
        nearest = max((plan for plan in slacks if any(plan.steps)), key=slacks.__getitem__)
        return [], Decision(nearest, _complaint(quality, evaluator.searched[nearest].figures, "the search half"))
    report.begin("promise", len(plans))
    results = run_tests(evaluator, plans, report.advance)
    passed = [result.plan for result in results if result.passed]
    if not passed:
        safest = min(results, key=lambda result: result.evaluation.risk)
        return [], Decision(safest.plan, _complaint(quality, safest.evaluation.bounds, "held-out photographs"))
    verified = [plan for plan in passed[::-1] if costs.is_affordable(plan)]
    if not verified:
        cheapest = passed[-1]
        return [], Decision(cheapest, _too_dear(cheapest, costs))
    return verified, None


def _affordable(evaluator: Evaluator, costs: Costs) -> tuple[list[Plan], Decision | None]:
    """The plans that keep the constraints about cost, the least damage first; or why there is none."""
    plans = [plan for plan in evaluator.searched if any(plan.steps) and costs.is_affordable(plan)]
    if plans:
        return sorted(plans, key=lambda plan: (evaluator.searched[plan].mean, costs(plan))), None
    cheapest = min(evaluator.searched, key=costs)
    return [], Decision(cheapest, _too_dear(cheapest, costs))


def _too_dear(plan: Plan, costs: Costs) -> str:
    """The constraints about cost, and the costs of the cheapest plan, in one line."""
    wanted = ", ".join(constraint.text for constraint in costs.constraints)
    faster = costs(costs.dense) / costs(plan)
    return (
        f"expected a plan that keeps {wanted}, got {costs.gmacs(plan):.4g} GMACs and a cost ×{faster:.2f} below dense "
        "by the cheapest plan that keeps the rest of the budget"
    )


def _complaint(constraints: Sequence[Constraint], values: Sequence[float], where: str) -> str:
    """The constraints that values break, in one line."""
    pairs = zip(constraints, values, strict=True)
    broken = [(constraint, value) for constraint, value in pairs if not holds(constraint, value)]
    wanted = ", ".join(constraint.text for constraint in [each for each, _ in broken] or constraints)
    actual = ", ".join(f"{value:.4f}" for _, value in broken) or "figures too close to it"
    return f"expected a plan that keeps {wanted}, got {actual} by the best plan on {where}"


def all_kept(constraints: Sequence[Constraint], figures: Sequence[float], plan: Plan, costs: Costs) -> bool:
    """True if a plan's figures and expected costs keep a budget."""
    return keeps(constraints, figures) and costs.is_affordable(plan)
