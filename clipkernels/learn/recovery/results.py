"""The results of a recovery: the closeness of reduced embeddings to dense ones, by evaluation."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

ROWS_AT_A_TIME = 1024
"""Queries of one block of the similarity matrix."""


class Closeness(NamedTuple):
    """The closeness of the reduced embeddings of n held-out images to their dense ones.

    cosine: mean cosine.
    cosine_p1: first percentile of the cosines: one image in a hundred is below it.
    cosine_min: least cosine.
    recall_at_1: share of the reduced embeddings whose nearest dense embedding, among those of the n images, is that of
        the same image. It falls as n grows.
    """

    cosine: float
    cosine_p1: float
    cosine_min: float
    recall_at_1: float


class Evaluation(NamedTuple):
    """The closeness on held-out images after a number of steps.

    step: steps that were made.
    loss: mean loss of the images since the evaluation before; 0 without a step.
    closeness: of the held-out images.
    """

    step: int
    loss: float
    closeness: Closeness


class Progress(NamedTuple):
    """The state of a recovery after a batch.

    phase: "embedding" the images densely, "measuring" the held-out ones, or "training".
    done, total: images of the phase, of all epochs in training.
    errors: images that are None so far.
    loss: mean loss of the images since the last evaluation; 0 outside of training.
    cosine: mean cosine of the last evaluation; 0 before the first.
    """

    phase: Literal["embedding", "measuring", "training"]
    done: int
    total: int
    errors: int
    loss: float = 0.0
    cosine: float = 0.0


class Recovered(NamedTuple):
    """The result of `recover`.

    before: closeness of the held-out images as the tower came; None if the run was stopped before.
    after: closeness with the weights that the tower has now; None if the run was stopped.
    steps: steps that were made, with those of earlier calls.
    best_step: step of the weights that were closest to the dense ones; 0 for those that the tower came with.
    history: the evaluations, by step.
    images, held_out: number of images that were trained on, and of those that were not.
    skipped: indices of the images that are None.
    stopped: true if `progress` stopped the run.
    """

    before: Closeness | None
    after: Closeness | None
    steps: int
    best_step: int
    history: tuple[Evaluation, ...]
    images: int
    held_out: int
    skipped: tuple[int, ...]
    stopped: bool


def closeness_of(reduced: Tensor, dense: Tensor) -> Closeness:
    """The closeness of reduced embeddings (n,E) to dense ones (n,E), the rows of both L2-normalised.

    An equal dense embedding of another image does not count as nearer.
    """
    cosines = (reduced * dense).sum(1)
    nearest = 0
    for start in range(0, len(reduced), ROWS_AT_A_TIME):
        similarity = reduced[start : start + ROWS_AT_A_TIME] @ dense.T
        # Taken from the same product, because another one may round differently.
        own = similarity.diagonal(start)[:, None]
        nearest += int((similarity <= own).all(1).sum())
    percentile = float(np.percentile(cosines.double().numpy(), 1))  # torch.quantile takes 2²⁴ values at most
    return Closeness(float(cosines.double().mean()), percentile, float(cosines.min()), nearest / len(reduced))


def best_of(history: tuple[Evaluation, ...] | list[Evaluation]) -> Evaluation:
    """The first evaluation of the largest mean cosine."""
    return max(history, key=lambda evaluation: evaluation.closeness.cosine)
