"""The result of a tuning: the schedule, the frontier, and the promise about photographs that the search never saw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol

from clipkernels.measure.timing import Band
from clipkernels.methods import Schedule
from clipkernels.plan import Plan
from clipkernels.tuning.budget import Constraint

Phase = Literal["measuring cost", "embedding", "effects", "search", "promise", "timing"]


class Progress(NamedTuple):
    """The state of a tuning after a batch.

    phase: "measuring cost", "embedding" the photographs densely, measuring the "effects" of single blocks, the
        "search", the "promise" on held-out photographs, or "timing".
    done, total: forwards of plans, of runs in "measuring cost" and "timing".
    errors: images that are None.
    note: the best plan so far, or an empty text.
    """

    phase: Phase
    done: int
    total: int
    errors: int = 0
    note: str = ""


class Report(Protocol):
    """Takes note of the progress of a tuning."""

    note: str

    def begin(self, phase: Phase, total: int) -> None:
        """Start a phase of `total` units."""

    def advance(self, count: int = 1) -> None:
        """Count units that are done."""


class Row(NamedTuple):
    """One plan on the search half.

    name: the name of a published schedule, or that of the plan as a `ck.Schedule`.
    plan: the plan.
    milliseconds: the measured cost of a batch by the cost table; None if operations count.
    gmacs: operations of an image as executed.
    figures: the figure of each constraint about quality.
    cosine_p1, cosine_mean: first percentile and mean of the cosines.
    keeps: true if the figures and the costs keep the budget.
    published: true for a published schedule.
    chosen: true for the schedule that is returned.
    """

    name: str
    plan: Plan
    milliseconds: float | None
    gmacs: float
    figures: tuple[float, ...]
    cosine_p1: float
    cosine_mean: float
    keeps: bool
    published: bool
    chosen: bool


class Promise(NamedTuple):
    """A constraint about quality on n held-out photographs.

    figure: the figure.
    bound: the 95 % bootstrap bound of the figure, on the side that can break the constraint.
    images: n.
    trend: of a recall, the figure by the number of photographs of the gallery.
    """

    constraint: Constraint
    figure: float
    bound: float
    images: int
    trend: Mapping[int, float]


class Tuned(NamedTuple):
    """The result of `ck.tune`.

    schedule: the plan as a method; None if no plan keeps the budget, or if the run was stopped.
    reason: why there is no schedule, in one line; None if there is one.
    rows: the plans that no other one beats in cost and quality, and all published schedules, by descending cost.
    promises: of the schedule, or of the best plan that failed; one per constraint about quality.
    cosines: first percentile and mean of the cosines of the same plan on the held-out photographs.
    gmacs, dense_gmacs: operations of an image as executed, with the schedule and without.
    speedup: paired speed-up over the fastest dense tower, its median, 10 % and 90 % quantile; None if it was not
        measured.
    evaluations: plans that were run on the search half.
    images: photographs of the search half and of the held-out half.
    skipped: indices of the images that are None.
    stopped: true if `progress` stopped the run.
    """

    schedule: Schedule | None
    reason: str | None
    rows: tuple[Row, ...]
    promises: tuple[Promise, ...]
    cosines: tuple[float, float] | None
    gmacs: float | None
    dense_gmacs: float
    speedup: Band | None
    evaluations: int
    images: tuple[int, int]
    skipped: tuple[int, ...]
    stopped: bool
