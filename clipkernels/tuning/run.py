"""One tuning, once the photographs are embedded densely: search, decision, promise and timing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from clipkernels.measure.timing import HOST, Band, time_variants, vary
from clipkernels.methods import Dense, Method, Schedule
from clipkernels.patching import unpatch
from clipkernels.plan import Plan
from clipkernels.tuning.budget import Constraint
from clipkernels.tuning.candidates import published
from clipkernels.tuning.costs import Costs
from clipkernels.tuning.decision import Decision, all_kept, decide
from clipkernels.tuning.evaluations import Evaluator, PartName, Stopped
from clipkernels.tuning.forwards import Part
from clipkernels.tuning.promise import pareto
from clipkernels.tuning.quality import trend
from clipkernels.tuning.reference import Reference
from clipkernels.tuning.results import Phase, Progress, Promise, Row, Tuned
from clipkernels.tuning.search import Search, Task
from clipkernels.tuning.state import State

ROUNDS = 15
"""Rounds of the paired timing of a plan."""
SHARE_OF_PUBLISHED = 3
"""One in so many plans that are run on the search half is a published schedule, at most."""


class Report:
    """Passes the progress on to the caller, phase by phase."""

    def __init__(self, progress: Callable[[Progress], bool | None] | None, errors: int) -> None:
        self.progress, self.errors = progress, errors
        self.phase: Phase = "embedding"
        self.done, self.total, self.note = 0, 1, ""

    def begin(self, phase: Phase, total: int) -> None:
        """Start a phase of `total` units."""
        self.phase, self.done, self.total = phase, 0, total

    def advance(self, count: int = 1) -> None:
        """Count units that are done; raises `Stopped` if the caller asks for it."""
        self.done += count
        self.look()

    def look(self) -> None:
        """Show the state; raises `Stopped` if the caller asks for it."""
        state = Progress(self.phase, min(self.done, self.total), self.total, self.errors, self.note)
        if self.progress is not None and self.progress(state):
            raise Stopped


class Run(NamedTuple):
    """Everything that a tuning works with, once the photographs are embedded densely."""

    model: nn.Module
    constraints: Sequence[Constraint]
    costs: Costs
    parts: Mapping[PartName, Part]
    reference: Reference
    store: State
    report: Report
    families: Sequence[str]
    evaluations: int
    batch_size: int
    seed: int
    skipped: tuple[int, ...] = ()


def conduct(run: Run) -> Tuned:
    """Search, decide and report; raises `Stopped`."""
    quality = [constraint for constraint in run.constraints if constraint.is_quality]
    report, costs = run.report, run.costs
    evaluator = Evaluator(run.parts, run.reference, quality, run.store, run.seed, report.look)
    names = published(costs.geometry, max(2, run.evaluations // SHARE_OF_PUBLISHED))
    task = Task(
        costs.geometry, quality, run.families, names, costs, costs.for_family, costs.is_affordable, run.evaluations
    )
    Search(task, evaluator, report).run()
    timing = None if costs.table is None else partial(_time, run)
    decision = decide(evaluator, run.constraints, costs, timing, report)
    schedule = Schedule.from_plan(decision.plan) if decision.plan is not None and decision.reason is None else None
    promises, cosines = _promises(run, evaluator, quality, decision)
    return Tuned(
        schedule=schedule,
        reason=decision.reason,
        rows=_rows(evaluator, quality, costs, names, None if schedule is None else decision.plan),
        promises=promises,
        cosines=cosines,
        gmacs=None if decision.plan is None else costs.gmacs(decision.plan),
        dense_gmacs=costs.gmacs(costs.dense),
        speedup=decision.speed,
        evaluations=len(evaluator.searched),
        images=(len(run.parts["search"].index), len(run.parts["held out"].index)),
        skipped=run.skipped,
        stopped=False,
    )


def _promises(
    run: Run, evaluator: Evaluator, quality: Sequence[Constraint], decision: Decision
) -> tuple[tuple[Promise, ...], tuple[float, float] | None]:
    """The promises of a plan, and the first percentile and mean of its cosines, on the held-out half."""
    if decision.plan is None:
        return (), None
    evaluation = evaluator("held out", decision.plan)
    reduced = evaluator.reduced(decision.plan) if any(each.k for each in quality) else None
    promises = []
    for constraint, value, bound in zip(quality, evaluation.figures, evaluation.bounds, strict=True):
        course = trend(constraint, reduced, run.reference) if reduced is not None and constraint.k else {}
        promises.append(Promise(constraint, value, bound, len(run.parts["held out"].index), course))
    return tuple(promises), (evaluation.p1, 1 - evaluation.mean)


def _rows(
    evaluator: Evaluator,
    quality: Sequence[Constraint],
    costs: Costs,
    names: Mapping[Plan, str],
    chosen: Plan | None,
) -> tuple[Row, ...]:
    """The rows of the frontier, and of all published schedules that were run."""
    plans = dict.fromkeys(
        [*pareto(evaluator.searched, quality, costs), *(plan for plan in names if plan in evaluator.searched)]
    )
    plans |= {} if chosen is None else {chosen: None}
    rows = []
    for plan in sorted(plans, key=costs, reverse=True):
        evaluation = evaluator.searched[plan]
        name = names.get(plan) or str(Schedule.from_plan(plan))
        kept = all_kept(quality, evaluation.figures, plan, costs)
        rows.append(
            Row(
                name, plan, costs.milliseconds(plan), costs.gmacs(plan), evaluation.figures, evaluation.p1,
                1 - evaluation.mean, kept, plan in names, plan == chosen,
            )
        )  # fmt: skip
    return tuple(rows)


def _time(run: Run, plan: Plan) -> Band:
    """The paired speed-up of a plan over the faster of the host's own forward and Dense(), as it was first measured."""
    known = run.store.speed(plan)
    if known is not None:
        return known
    memo = {id(tensor): tensor for tensor in [*run.model.parameters(), *run.model.buffers()]}
    host: Any = unpatch(copy.deepcopy(run.model, memo))
    methods: dict[str, Method | None] = {HOST: None, "dense": Dense(), "plan": Schedule.from_plan(plan)}
    variants = vary(host, methods)
    part = run.parts["search"]
    index = part.index.repeat(-(-2 * run.batch_size // len(part.index)))
    batches = [part.read(index[at * run.batch_size :][: run.batch_size]) for at in range(2)]
    run.report.begin("timing", len(methods) * (ROUNDS + 2))
    times = time_variants(variants, batches, ROUNDS, warmup=2, progress=run.report.advance)
    speed = times.ratio("plan", times.fastest([HOST, "dense"]))
    run.store.put_speed(plan, speed)
    return speed
