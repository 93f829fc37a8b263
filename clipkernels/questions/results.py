"""The rows of CLIP-TD's protocol, their means over seeds, and its progress."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

NONE = "none"
"""The method of a student without distillation, which the gains are against."""


class Progress(NamedTuple):
    """The state of a run.

    phase: what is done, such as "training 3 of 12: targeted, 5 %, seed 0".
    done, total: items of the phase.
    errors: images that cannot be read so far.
    item: the noun of what is counted.
    """

    phase: str
    done: int
    total: int
    errors: int
    item: str


class Row(NamedTuple):
    """A score of one training.

    method: "none", "finetune", "plain" or "targeted".
    share: of the labels.
    seed: of the labels, the order and the first weights.
    split: "test", or "same" and "shifted" where a domain is held out.
    metric: the name of the score.
    score: in [0, 1].
    train, classes: annotations that were trained on, and their classes.
    scored: annotations that were scored.
    steps: steps of the training.
    weight: mean weight of the distances; None without any.
    seconds: time of the training.
    """

    method: str
    share: float
    seed: int
    split: str
    metric: str
    score: float
    train: int
    classes: int
    scored: int
    steps: int
    weight: float | None
    seconds: float


class Results(NamedTuple):
    """The results of a run.

    rows: by seed, share and method.
    notes: sentences for a report.
    unread: the reasons for images that cannot be read, by path.
    stopped: the caller stopped it; the same call goes on.
    """

    rows: list[Row]
    notes: list[str]
    unread: Mapping[str, str]
    stopped: bool = False


def summarize(rows: Sequence[Mapping[str, Any]], none: str = NONE) -> list[dict[str, Any]]:
    """The mean and standard deviation over seeds of each score, and of its gain over no distillation.

    Args:
        rows: with split, metric, share, method, seed and score.
        none: the method that the gains are against.
    Returns:
        Rows with split, metric, share, method, seeds, score, sd, gain and gain_sd, in the order in which they first
        occur. A deviation of one seed is None, and so is a gain without the same seed of `none`.
    """
    scores = {(row["split"], row["metric"], row["share"], row["method"], row["seed"]): row["score"] for row in rows}
    summary = []
    for split, metric, share, method in dict.fromkeys(key[:4] for key in scores):
        seeds = sorted(key[4] for key in scores if key[:4] == (split, metric, share, method))
        values = [scores[split, metric, share, method, seed] for seed in seeds]
        base = [scores.get((split, metric, share, none, seed)) for seed in seeds]
        gains = [value - other for value, other in zip(values, base, strict=True) if other is not None]
        known = len(gains) == len(values)
        summary.append(
            {
                "split": split, "metric": metric, "share": share, "method": method, "seeds": len(seeds),
                "score": statistics.mean(values), "sd": deviation(values),
                "gain": statistics.mean(gains) if known else None, "gain_sd": deviation(gains) if known else None,
            }
        )  # fmt: skip
    return summary


def deviation(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None
