"""Scores of the three tasks: accuracies as shares in [0, 1], by name.

vqa      accuracy, and by type of the answer: VQA's soft accuracy
snli-ve  accuracy, and by class
vcr      Q→A, QA→R and Q→AR: the answer, the reason for the right answer, and both
"""

from __future__ import annotations

from collections.abc import Sequence

from clipkernels.questions.vqa_answers import vqa_accuracy

ACCURACY = "accuracy"


def score_vqa(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], types: Sequence[str] | None = None
) -> dict[str, float]:
    """The mean soft accuracy, and that of each type of answer.

    Args:
        predictions: n answers.
        answers: those of the annotators of each question.
        types: the type of each question's answer; None for no such scores.
    Raises:
        ValueError: no question, or lists of different lengths.
    """
    accuracies = [vqa_accuracy(*pair) for pair in zip(predictions, answers, strict=True)]
    scores = {ACCURACY: _mean(accuracies)}
    for kind in sorted(set(types or ())):
        scores[f"{ACCURACY} ({kind})"] = _mean(
            [accuracy for accuracy, other in zip(accuracies, types or (), strict=True) if other == kind]
        )
    return scores


def score_classes(predictions: Sequence[int], labels: Sequence[int], classes: Sequence[str]) -> dict[str, float]:
    """The accuracy, and that of each class that occurs: the share of its items that are predicted right.

    Args:
        predictions, labels: n indices of classes.
        classes: their names.
    Raises:
        ValueError: no item, or lists of different lengths.
    """
    right = [prediction == label for prediction, label in zip(predictions, labels, strict=True)]
    scores = {ACCURACY: _mean(right)}
    for index, name in enumerate(classes):
        of_class = [hit for hit, label in zip(right, labels, strict=True) if label == index]
        if of_class:
            scores[f"{ACCURACY} ({name})"] = _mean(of_class)
    return scores


def score_vcr(answers: Sequence[bool], reasons: Sequence[bool]) -> dict[str, float]:
    """The shares of the n questions whose answer is right, whose reason is right, and of which both are.

    Args:
        answers: true for each right answer.
        reasons: true for each right reason, which is chosen for the right answer, whatever the answer was.
    Raises:
        ValueError: no question, or lists of different lengths.
    Source: VCR, arXiv 1811.10830, section 2.
    """
    both = [answer and reason for answer, reason in zip(answers, reasons, strict=True)]
    return {"Q→A": _mean(answers), "QA→R": _mean(reasons), "Q→AR": _mean(both)}


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("expected items to score, got none")
    return sum(values) / len(values)
