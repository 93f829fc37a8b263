"""The promise: plans are tested on the held-out half, in an order that the search half alone has fixed.

The order goes from safe and costly plans to cheap ones. The risk of a test is the greatest chance of passing it by a
plan that breaks the budget. Each test has an equal part of the 5 % that all together may have, and a test that is
passed gives what it had to the next. The chance that any plan which passed breaks the budget is then at most 5 %.

The tests do not end with a failure, because plans of nearly equal cost fail by chance: their figures on the same
photographs are correlated by about a half.

Source: the fallback procedure, Wiens, Pharmaceutical Statistics 2, 2003; tests of plans on held-out data, Learn then
    Test, arXiv 2110.01052, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from clipkernels.plan import Plan
from clipkernels.tuning.budget import Constraint
from clipkernels.tuning.costs import Costs
from clipkernels.tuning.evaluations import LEVEL, Evaluation, Evaluator, harm_of, keeps, slacks_of

SAFE_SLACKS = (5.0, 4.0)
"""Standard errors between figures and bounds on the search half: the cheapest plan that has so many is tested."""
START_SLACK, END_SLACK = 3.0, 0.5
"""Most and least standard errors of the other plans that are tested."""
MAX_TESTS = 12
NEAR = 0.01
"""Cost of a plan that is tested above that of the cheapest one without more harm, as a share of the dense cost."""


class Tested(NamedTuple):
    """A plan, its evaluation on the held-out half, and true if its test is passed."""

    plan: Plan
    evaluation: Evaluation
    passed: bool


def pareto(
    searched: Mapping[Plan, Evaluation], constraints: Sequence[Constraint], costs: Costs, margin: float = 0.0
) -> list[Plan]:
    """The evaluated plans that no other one beats in harm and in cost, by more than a margin, by ascending cost."""
    harms = {plan: harm_of(constraints, evaluation) for plan, evaluation in searched.items()}
    by_harm = sorted(searched, key=lambda plan: (harms[plan], costs(plan)))
    plans: list[Plan] = []
    least = math.inf
    for plan in by_harm:
        if costs(plan) < least + margin:
            plans.append(plan)
        least = min(least, costs(plan))
    return sorted(plans, key=lambda plan: (costs(plan), harms[plan]))


def order_of_tests(searched: Mapping[Plan, Evaluation], constraints: Sequence[Constraint], costs: Costs) -> list[Plan]:
    """The plans to test, from the costliest to the cheapest, at most MAX_TESTS.

    They keep the budget on the search half, and no plan is much cheaper without more harm. A few are safe, so that
    their tests pass on their parts of the 5 % to those that are close to the budget.
    """
    slacks = slacks_of(constraints, searched)
    plans = [
        plan
        for plan in pareto(searched, constraints, costs, NEAR * costs(costs.dense))
        if any(plan.steps) and slacks[plan] >= END_SLACK and keeps(constraints, searched[plan].figures)
    ]
    safest = max(plans, key=slacks.__getitem__, default=None)
    safe = {next((plan for plan in plans if slacks[plan] >= slack), safest) for slack in SAFE_SLACKS}
    close = [plan for plan in plans if slacks[plan] <= START_SLACK and plan not in safe]
    most = MAX_TESTS - len(SAFE_SLACKS)
    if len(close) > most:
        close = [close[round(at * (len(close) - 1) / (most - 1))] for at in range(most)]
    return [plan for plan in plans if plan in safe or plan in close][::-1]


def run_tests(evaluator: Evaluator, plans: Sequence[Plan], advance: Callable[[], None] = lambda: None) -> list[Tested]:
    """The results of the tests; `advance` is called after each."""
    results = []
    share = (1 - LEVEL) / max(1, len(plans))
    level = 0.0
    for plan in plans:
        evaluation = evaluator("held out", plan)
        level += share
        results.append(Tested(plan, evaluation, evaluation.risk <= level))
        level = level if results[-1].passed else 0.0
        advance()
    return results
