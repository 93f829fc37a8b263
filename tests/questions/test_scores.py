"""VQA's normalisation and soft accuracy, and the scores of SNLI-VE and VCR, against values computed by hand."""

from __future__ import annotations

import pytest

from clipkernels.questions.scores import score_classes, score_vcr, score_vqa
from clipkernels.questions.vqa_answers import normalize_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("The Dog", "dog"),
        ("a\tdog\n", "dog"),
        ("two", "2"),
        ("None", "0"),
        ("ten dogs", "10 dogs"),
        ("eleven", "eleven"),
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("p.m.", "pm"),
        ("yes!", "yes"),  # the mark becomes a blank at the end
        ("red/white", "red white"),
        ("red / white", "red white"),
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("1,000", "1000"),  # a comma inside a number removes all marks
        ("1,000 t-shirts", "1000 tshirts"),
        ("t-shirt", "t shirt"),
        ("dont", "don't"),
        ("oclock", "o'clock"),
        ("couldntve", "couldntve"),  # both marks are missing, which is not in the list
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("shes", "shes"),
        ("Ive", "ive"),
        ("it's", "it's"),
        ("a", ""),
    ],
)
def test_an_answer_is_normalized_by_the_official_rules(answer: str, normalized: str) -> None:
    assert normalize_answer(answer) == normalized


def test_at_most_32_full_stops_are_removed() -> None:
    assert normalize_answer("." * 33 + "x") == ".x"


@pytest.mark.parametrize(
    ("agree", "expected"),
    # Of the ten ways to leave one out, `agree` have one agreement fewer.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)],
)
def test_the_soft_accuracy_is_a_mean_over_left_out_annotators(agree: int, expected: float) -> None:
    answers = ["red"] * agree + [f"colour {n}" for n in range(10 - agree)]
    assert vqa_accuracy("red", answers) == pytest.approx(expected)


def test_answers_are_normalized_unless_all_annotators_agree() -> None:
    assert vqa_accuracy("2", ["two"] * 10) == 0.0 and vqa_accuracy("two", ["two"] * 10) == 1.0
    assert vqa_accuracy("2", ["two"] * 9 + ["3"]) == 1.0
    assert vqa_accuracy("the net", ["Net.", "a net", "net", "goal"]) == pytest.approx((3 * 2 / 3 + 1) / 4)
    with pytest.raises(ValueError, match="expected the answers of annotators, got none"):
        vqa_accuracy("red", [])


def test_vqa_is_scored_by_type_of_answer() -> None:
    answers = [["red"] * 10, ["yes"] * 2 + ["no"] * 8, ["3"] * 10]
    scores = score_vqa(["red", "yes", "4"], answers, ["other", "yes/no", "number"])
    assert scores == pytest.approx(
        {"accuracy": 1.6 / 3, "accuracy (number)": 0, "accuracy (other)": 1, "accuracy (yes/no)": 0.6}
    )
    with pytest.raises(ValueError, match="items to score"):
        score_vqa([], [])


def test_classes_are_scored_apart_and_absent_ones_are_left_out() -> None:
    scores = score_classes([0, 1, 1, 0], [0, 0, 1, 0], ["entailment", "neutral", "contradiction"])
    assert scores == pytest.approx({"accuracy": 3 / 4, "accuracy (entailment)": 2 / 3, "accuracy (neutral)": 1})


def test_vcr_counts_answers_reasons_and_both() -> None:
    scores = score_vcr([True, True, False, False, True], [True, False, True, False, True])
    assert scores == pytest.approx({"Q→A": 0.6, "QA→R": 0.6, "Q→AR": 0.4})
