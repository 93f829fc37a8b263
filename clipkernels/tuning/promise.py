"""The promise: plans are tested on the held-out half, in an order that the search half alone has fixed.

The order goes from safe and costly plans to cheap ones, and the tests end with the first that fails. Each test is
passed if the bootstrap bound of every figure keeps the budget. The chance that a plan which passed breaks the budget is
then at most that of one test, however many plans are tested.

Source: fixed-sequence testing in Learn then Test, arXiv 2110.01052, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from clipkernels.plan import Plan
from clipkernels.tuning.budget import Constraint
from clipkernels.tuning.evaluations import Evaluation, Evaluator, keeps, slack_of

START_SLACK = 8.0
END_SLACK = 0.5
MAX_TESTS = 12


class Tested(NamedTuple):
    """A plan, its evaluation on the held-out half, and true if every bound keeps the budget."""

    plan: Plan
    evaluation: Evaluation
    passed: bool


def pareto(evaluator: Evaluator, cost: Callable[[Plan], float], gain: Callable[[Evaluation], float]) -> list[Plan]:
    """The evaluated plans that no other one beats in cost and gain, by ascending cost."""
    plans: list[Plan] = []
    most = -math.inf
    searched = evaluator.searched
    for plan in sorted(searched, key=lambda plan: (cost(plan), -gain(searched[plan]))):
        if gain(searched[plan]) > most:
            plans.append(plan)
            most = gain(searched[plan])
    return plans


def order_of_tests(
    evaluator: Evaluator, constraints: Sequence[Constraint], cost: Callable[[Plan], float]
) -> list[Plan]:
    """The plans to test, from the safest to the cheapest.

    It begins with the cheapest plan whose figures are START_SLACK standard errors from their bounds on the search half,
    or with the safest plan if none is, and has at most MAX_TESTS plans, of which none is closer than END_SLACK.
    """

    def slack(plan: Plan) -> float:
        return slack_of(constraints, evaluator.searched[plan])

    plans = [
        plan
        for plan in pareto(evaluator, cost, lambda evaluation: slack_of(constraints, evaluation))
        if slack(plan) >= END_SLACK and any(plan.steps)
    ]
    first = next((place for place, plan in enumerate(plans) if slack(plan) >= START_SLACK), len(plans) - 1)
    plans = plans[: first + 1][::-1]
    if len(plans) <= MAX_TESTS:
        return plans
    places = sorted({round(at * (len(plans) - 1) / (MAX_TESTS - 1)) for at in range(MAX_TESTS)})
    return [plans[place] for place in places]


def run_tests(
    evaluator: Evaluator,
    constraints: Sequence[Constraint],
    plans: Sequence[Plan],
    advance: Callable[[], None] = lambda: None,
) -> list[Tested]:
    """The results of the tests up to the first that is not passed; `advance` is called after each."""
    results = []
    for plan in plans:
        evaluation = evaluator("held out", plan)
        results.append(Tested(plan, evaluation, keeps(constraints, evaluation.bounds)))
        advance()
        if not results[-1].passed:
            break
    return results
