"""Budgets: the grammar of constraints, and one-line refusals that name the term."""

from __future__ import annotations

from typing import Any

import pytest

from clipkernels.tuning.budget import Constraint, parse_budget


def test_every_figure_is_parsed() -> None:
    budget = parse_budget(
        "recall@1>=.99, recall@10 >= 0.9,cosine_p1>=.98 ,COSINE_MEAN>=9.9e-1,accuracy_drop<=.005,"
        "text_recall@10>=.5,speedup>=1.5,gmacs<=11"
    )
    assert budget == (
        Constraint("recall", 1, 0.99),
        Constraint("recall", 10, 0.9),
        Constraint("cosine_p1", None, 0.98),
        Constraint("cosine_mean", None, 0.99),
        Constraint("accuracy_drop", None, 0.005),
        Constraint("text_recall", 10, 0.5),
        Constraint("speedup", None, 1.5),
        Constraint("gmacs", None, 11.0),
    )
    assert [constraint.is_quality for constraint in budget] == [True] * 6 + [False] * 2
    assert [constraint.is_cost for constraint in budget] == [False] * 6 + [True] * 2
    assert [constraint.direction for constraint in budget] == [">="] * 4 + ["<=", ">=", ">=", "<="]


def test_the_text_of_a_constraint_is_parsed_to_itself() -> None:
    text = "recall@1>=0.99,cosine_p1>=0.123456789012,accuracy_drop<=0,gmacs<=11,speedup>=1"
    budget = parse_budget(text)
    assert ",".join(constraint.text for constraint in budget) == text
    assert budget[0].figure_name == "recall@1" and budget[3].figure_name == "gmacs"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got an empty one: name a figure"),
        (" \n", "got an empty one: name a figure"),
        ("recall@1>=.9,", "between commas, got nothing: remove a comma"),
        ("recal@1>=.9", "expected one of recall@1>=0.99, text_recall@10>=0.8, cosine_p1>=0.98"),
        ("recal@1>=.9", "got 'recal@1>=.9': use one of these names"),
        (">=.9", "got '>=.9': use one of these names"),
        ("recall@1<=.9", "expected recall>=…, got 'recall@1<=.9': a budget bounds recall from the other side"),
        ("accuracy_drop>=.1", "expected accuracy_drop<=…"),
        ("gmacs>=11", "expected gmacs<=…"),
        ("speedup<=2", "expected speedup>=…"),
        (
            "recall@1>=99%",
            "expected a fraction as in recall@1>=0.99, got 'recall@1>=99%': divide the percentage by 100",
        ),
        ("recall@1>=99", "expected a bound of recall in (0, 1], got 'recall@1>=99': give a fraction"),
        ("cosine_p1>=1.01", "expected a bound of cosine_p1 in (0, 1]"),
        ("cosine_mean>=0", "expected a bound of cosine_mean in (0, 1]"),
        ("accuracy_drop<=-.1", "expected a bound of accuracy_drop in [0, 1]"),
        ("accuracy_drop<=2", "expected a bound of accuracy_drop in [0, 1]"),
        ("speedup>=.9", "expected a bound of speedup in [1, 1e+06], got 'speedup>=.9': write it as in speedup>=1.5"),
        ("gmacs<=0", "expected a bound of gmacs in (0, 1e+09]"),
        ("gmacs<=1e400", "expected a bound of gmacs in (0, 1e+09]"),
        ("cosine_p1>=nan", "expected a term such as cosine_p1>=0.98, got 'cosine_p1>=nan'"),
        ("recall@1>.9", "write recall>= and a number"),
        ("recall@1≥.9", "write recall>= and a number"),
        ("recall@1>=.9.9", "write recall>= and a number"),
        ("recall>=.9", "expected recall@K with K from 1 to 1048576, got 'recall>=.9'"),
        ("recall@0>=.9", "expected recall@K with K from 1"),
        ("recall@99999999999999999999>=.9", "expected recall@K with K from 1"),
        ("cosine_p1@3>=.9", "expected cosine_p1 without @3"),
        ("recall@1>=.9,recall@1>=.95", "expected recall@1 once in a budget, got it twice: keep the stricter bound"),
    ],
)
def test_a_wrong_term_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_budget(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["recall@1>=.9\n" * 50, "x" * 10**6, "recall@1>=" + "9" * 10**5, "\x1b[2J", "a\u2028b"]
)
def test_hostile_text_gives_a_short_line(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_budget(text)
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


@pytest.mark.parametrize("budget", [None, 0.9, ["recall@1>=.9"], b"recall@1>=.9"])
def test_a_budget_that_is_no_text_is_a_type_error(budget: Any) -> None:
    with pytest.raises(TypeError, match=r"budget must be text such as 'recall@1>=0\.99'"):
        parse_budget(budget)
