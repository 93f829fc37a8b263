"""The boundary of a budget: the harm at which it breaks, and the exchange rate of harm for cost."""

from __future__ import annotations

import pytest

from clipkernels.tuning.boundary import TARGET_SLACK, Point, boundary_of

KEEPS, BREAKS = TARGET_SLACK, TARGET_SLACK - 0.5


def line(*slacks: float) -> list[Point]:
    """Plans whose log harm rises from -5 by 1 as their cost falls from 9 by 2."""
    return [Point(-5.0 + number, 9.0 - 2 * number, slack) for number, slack in enumerate(slacks)]


def test_the_edge_is_between_plans_that_keep_and_that_break() -> None:
    assert boundary_of(line(KEEPS, KEEPS, KEEPS, BREAKS, BREAKS), dense=10.0) == (-2.5, pytest.approx(-0.5))
    # Two plans on the wrong side of it cannot be fewer.
    assert boundary_of(line(KEEPS, BREAKS, KEEPS, KEEPS, BREAKS), dense=10.0).edge == -1.5


def test_a_budget_that_all_plans_keep_or_none_has_its_edge_beside_them() -> None:
    assert boundary_of(line(KEEPS, KEEPS, KEEPS), dense=10.0).edge == pytest.approx(-3 + 5e-7, abs=1e-9)
    assert boundary_of(line(BREAKS, BREAKS, BREAKS), dense=10.0).edge == pytest.approx(-5 - 1e-6, abs=1e-9)


def test_the_rate_is_that_of_plans_that_no_other_beats_and_negative() -> None:
    beaten = [Point(-3.5, 30.0, KEEPS), Point(-1.5, 40.0, BREAKS)]
    assert boundary_of([*line(KEEPS, KEEPS, KEEPS, BREAKS, BREAKS), *beaten], dense=10.0).rate == pytest.approx(-0.5)
    assert boundary_of(line(KEEPS), dense=10.0).rate == -0.1
