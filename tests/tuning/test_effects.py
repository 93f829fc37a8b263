"""Families of steps, the curves of single blocks, and the plans that the additive model favours."""

from __future__ import annotations

from itertools import product

import pytest

import clipkernels as ck
from clipkernels.tuning.candidates import (
    Geometry,
    model_frontier,
    neighbours,
    plan_of_counts,
    published,
    with_proportional,
    with_step_of,
)
from clipkernels.tuning.effects import FAMILIES, Curve, curve_of, single_steps

SMALL = Geometry(entry=17, prefix=1, blocks=4, last=3, by_cls=True)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("before", [10, 17, 65])
def test_a_step_leaves_the_tokens_that_are_asked_for(name: str, before: int) -> None:
    made = 0
    for after in range(2, before):
        step = FAMILIES[name].step(before, after, 1)
        if step is not None:
            plan = ck.Plan((step,), before, 1)
            assert plan.passes[-1][1] == after
            made += 1
    assert made >= (before - 1) // 2 - 6


def test_a_family_has_no_step_that_removes_nothing() -> None:
    assert all(family.step(17, 17, 1) is None for family in FAMILIES.values())
    assert FAMILIES["merge"].step(17, 8, 1) is None and FAMILIES["merge"].step(17, 9, 1) == ck.Merge(8)


def test_a_curve_is_linear_between_its_points() -> None:
    curve = Curve((5, 9, 17), (0.4, 0.1, 0.0))
    assert curve(17) == 0 and curve(9) == 0.1 and curve(13) == pytest.approx(0.05) and curve(7) == pytest.approx(0.25)


def test_a_curve_grows_geometrically_below_its_points() -> None:
    curve = Curve((5, 9, 17), (0.4, 0.1, 0.0))
    assert curve(1) == pytest.approx(1.6)
    assert Curve((9, 17), (0.1, 0.0))(5) == pytest.approx(0.15)


def test_a_curve_of_noisy_damages_is_monotone() -> None:
    plans = single_steps(FAMILIES["merge"], 17, 1, 1, 4)
    tokens = [plan.passes[-1][1] for plan in plans]
    assert tokens == sorted(tokens, reverse=True) and tokens[0] == 16 and tokens[-1] == 9
    curve = curve_of(plans, [0.02, 0.01, *[0.03] * (len(plans) - 2)])
    assert curve is not None and list(curve.damages) == sorted(curve.damages, reverse=True)
    assert curve(tokens[0]) == curve(tokens[1]) == 0.02 and curve(17) == 0


def test_the_frontier_of_the_model_is_that_of_all_plans() -> None:
    family = FAMILIES["merge"]
    curves = {
        0: Curve((9, 13, 17), (0.9, 0.2, 0.0)),
        1: Curve((9, 13, 17), (0.5, 0.3, 0.0)),
        2: Curve((9, 13, 17), (0.3, 0.05, 0.0)),
    }
    weights = (3.0, 2.0, 1.0, 0.0)

    def cost(block: int, before: int, after: int) -> float:
        return weights[block] * after

    def total(counts: tuple[int, ...], slope: float) -> float:
        value, before = 0.0, 17
        for block, after in enumerate(counts):
            value += slope * cost(block, before, after)
            value += curves[block](after) - curves[block](before) if block < 3 else 0.0
            before = after
        return value

    def is_possible(counts: tuple[int, ...]) -> bool:
        pairs = zip((17, *counts[:-1]), counts, strict=True)
        return all(before == after or family.step(before, after, 1) is not None for before, after in pairs)

    every = [(*counts, counts[-1]) for counts in product(range(2, 18), repeat=3)]
    possible = [counts for counts in every if list(counts) == sorted(counts, reverse=True) and is_possible(counts)]
    for slope in (0.001, 0.01, 0.03, 0.3):
        [plan] = model_frontier(SMALL, family, curves, cost, [slope])
        best = min(total(counts, slope) for counts in possible)
        assert total(plan.tokens[1:], slope) == pytest.approx(best, abs=1e-12)


def test_published_schedules_are_those_of_the_methods() -> None:
    plans = published(SMALL)
    assert plans[ck.Plan((None,) * 4, 17, 1)] == "Dense()"
    merged = ck.ToMe(2).plan(17, 4).steps
    assert plans[ck.Plan((*merged[:3], None), 17, 1)] == "ToMe(r=2)"
    assert plans[ck.Plan((*ck.EViT(0.5).plan(17, 4).steps[:3], None), 17, 1)] == "EViT(keep=0.5)"
    assert all(plan.steps[3] is None for plan in plans)
    few = published(Geometry(197, 1, 12, 11, True), 12)
    assert 6 <= len(few) <= 13 and "Dense()" in few.values()
    assert {name.split("(")[0] for name in few.values()} == {"Dense", "ToMe", "EViT", "TCA"}


def test_a_tower_with_another_pool_ranks_by_attention_received() -> None:
    geometry = Geometry(16, 0, 4, 4, False)
    plans = [plan for plan, name in published(geometry).items() if name.startswith("EViT")]
    assert plans and all(step is None or step.signal == "received" for plan in plans for step in plan.steps)


def test_neighbours_move_tokens_by_the_size() -> None:
    plan = plan_of_counts(SMALL, FAMILIES["merge"], (13, 13, 9, 9))
    others = neighbours(SMALL, plan, 2)
    removed = [tuple(a - b for a, b in zip(other.tokens, other.tokens[1:], strict=False)) for other in others]
    assert (6, 0, 4, 0) in removed and (2, 0, 4, 0) in removed and (4, 2, 2, 0) in removed and (2, 2, 4, 0) in removed
    assert plan not in others and len(set(others)) == len(others) and all(other.steps[3] is None for other in others)
    assert all(counts[0] <= 8 for counts in removed)


@pytest.mark.parametrize("name", FAMILIES)
def test_neighbours_of_every_family_are_plans_of_it(name: str) -> None:
    geometry = Geometry(65, 1, 6, 5, True)
    plan = plan_of_counts(geometry, FAMILIES[name], (65, 53, 41, 41, 31, 31))
    others = neighbours(geometry, plan, 3)
    kind = type(next(step for step in plan.steps if step))
    assert len(others) > 10 and all(step is None or type(step) is kind for other in others for step in other.steps)


def test_a_step_of_another_family_leaves_as_many_tokens() -> None:
    plan = plan_of_counts(SMALL, FAMILIES["merge-plain"], (13, 13, 9, 9))
    other = with_step_of(SMALL, plan, 2, FAMILIES["prune"])
    assert other is not None and other.tokens == plan.tokens and other.steps[2] == ck.Prune(7)
    assert with_step_of(SMALL, plan, 1, FAMILIES["prune"]) is None
    back = with_step_of(SMALL, other, 2, FAMILIES["merge"])
    assert back == plan and not back.proportional
    assert with_proportional(plan, True) == plan_of_counts(SMALL, FAMILIES["merge"], (13, 13, 9, 9))
