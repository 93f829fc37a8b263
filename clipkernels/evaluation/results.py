"""The rows of an evaluation, the combinations without a score, and its progress."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from clipkernels.evaluation.scores import Score
from clipkernels.evaluation.state import MAX_BYTES, SCORE_FORMAT, ScoreRecord
from clipkernels.formats import REMEDY
from clipkernels.state_files import read_json, write_json

RETRIEVAL = "retrieval"
"""The head of rows about captions."""


class Progress(NamedTuple):
    """The state of an evaluation.

    phase: the data set, the method, and the split or the head.
    done, total: the images of that phase, or its runs.
    errors: images without features so far.
    item: the noun of what is counted.
    """

    phase: str
    done: int
    total: int
    errors: int
    item: str = "image"


class Unread(NamedTuple):
    """Images of a split without features: their number, the name of the first, and why."""

    images: int
    name: str
    reason: str


class Row(NamedTuple):
    """The score of one head on one data set by one method.

    data, method, head: names.
    metric: "accuracy", or of captions "text to image R@1" and the like.
    shots: labelled images per class.
    score: mean, interval and spread over runs, which are draws of shots or orders of the stream.
    unread: by split, the images without features; a split that has all of them is absent.
    weights: where the head's weights come from.
    """

    data: str
    method: str
    head: str
    metric: str
    shots: int
    score: Score
    unread: Mapping[str, Unread]
    weights: str


class Skip(NamedTuple):
    """A combination without a score, and why."""

    data: str
    method: str
    head: str
    shots: int
    reason: str


class Results(NamedTuple):
    """The results of an evaluation.

    rows: in the order of the data sets, methods, heads and shots.
    skips: combinations without a score.
    notes: sentences for a report.
    stopped: the caller stopped it; the same call goes on.
    """

    rows: list[Row]
    skips: list[Skip]
    notes: list[str]
    stopped: bool = False


def write_scores(file: Path, scores: Mapping[str, Score], unread: Mapping[str, Unread], weights: str) -> None:
    """Write the scores of one combination by metric, all of the same runs and images or of fewer."""
    runs = next(iter(scores.values())).runs
    values = {name: (each.mean, each.low, each.high, each.spread, each.images) for name, each in scores.items()}
    faults = {split: (each.images, each.name, each.reason) for split, each in unread.items()}
    record = ScoreRecord(values=values, runs=runs, unread=faults, weights=weights)
    write_json(file, SCORE_FORMAT, record, MAX_BYTES)


def read_rows(file: Path, data: str, method: str, head: str, shots: int) -> Iterator[Row]:
    """The rows of a file of `write_scores`.

    Raises:
        ValueError: a file that is not as it was written.
    """
    try:
        record = read_json(file, SCORE_FORMAT, MAX_BYTES)
    except ValueError as error:
        fault = str(error).removesuffix(f": {REMEDY}")
        raise ValueError(f"{fault}: delete {file.name}, and it is scored again") from error
    unread = {split: Unread(*values) for split, values in record.unread.items()}
    for metric, (mean, low, high, spread, images) in record.values.items():
        score = Score(mean, low, high, spread, record.runs, images)
        yield Row(data, method, head, metric, shots, score, unread, record.weights)
