"""The promise: plans are tested on the held-out half, in an order that the search half alone has fixed.

The order goes from safe and costly plans to cheap ones, and the tests end with the first that fails. Each test is
passed if the bootstrap bound of every figure keeps the budget. The chance that a plan which passed breaks the budget is
then at most that of one test, however many plans are tested.

Source: fixed-sequence testing in Learn then Test, arXiv 2110.01052, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from clipkernels.plan import Plan
from clipkernels.tuning.budget import Constraint
from clipkernels.tuning.costs import Costs
from clipkernels.tuning.evaluations import Evaluation, Evaluator, harm_of, keeps, slacks_of

START_SLACK = 5.0
END_SLACK = 0.5
MAX_TESTS = 12


class Tested(NamedTuple):
    """A plan, its evaluation on the held-out half, and true if every bound keeps the budget."""

    plan: Plan
    evaluation: Evaluation
    passed: bool


def pareto(searched: Mapping[Plan, Evaluation], constraints: Sequence[Constraint], costs: Costs) -> list[Plan]:
    """The evaluated plans that no other one beats in cost and harm, by ascending cost."""
    harms = {plan: harm_of(constraints, evaluation) for plan, evaluation in searched.items()}
    plans: list[Plan] = []
    least = math.inf
    for plan in sorted(searched, key=lambda plan: (costs(plan), harms[plan])):
        if harms[plan] < least:
            plans.append(plan)
            least = harms[plan]
    return plans


def order_of_tests(searched: Mapping[Plan, Evaluation], constraints: Sequence[Constraint], costs: Costs) -> list[Plan]:
    """The plans to test, from the safest to the cheapest.

    It begins with the cheapest plan whose figures are START_SLACK standard errors from their bounds on the search half,
    or with the safest plan if none is, and has at most MAX_TESTS plans. Each keeps the budget there, and none is closer
    than END_SLACK.
    """
    slacks = slacks_of(constraints, searched)
    plans = [
        plan
        for plan in pareto(searched, constraints, costs)
        if any(plan.steps) and slacks[plan] >= END_SLACK and keeps(constraints, searched[plan].figures)
    ]
    first = next((place for place, plan in enumerate(plans) if slacks[plan] >= START_SLACK), len(plans) - 1)
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
