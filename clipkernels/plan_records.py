"""Plans as JSON: a step is a name of a fixed table and the values of its fields.

A record is data. Reading one constructs a class of the table, which checks its arguments, and nothing else.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgspec

from clipkernels.formats import Count, Line, Size
from clipkernels.messages import list_names
from clipkernels.plan import Condense, Merge, Plan, Predict, Prune, Rank, Step

STEPS: dict[str, Any] = {cls.__name__: cls for cls in (Condense, Merge, Predict, Prune, Rank)}


class StepRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A step: its class by name, and its fields."""

    name: Line
    arguments: dict[Line, bool | int | Line | None]


class PlanRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A plan: the tokens that enter each block and leave the last, and the step of each block."""

    tokens: list[Size]
    prefix: Count
    learnt: Count
    steps: list[StepRecord | None]


def record_step(step: Step) -> StepRecord:
    """The record of a step."""
    return StepRecord(type(step).__name__, {field.name: getattr(step, field.name) for field in fields(step)})


def record_plan(plan: Plan) -> PlanRecord:
    """The record of a plan."""
    steps = [None if step is None else record_step(step) for step in plan.steps]
    return PlanRecord(list(plan.tokens), plan.prefix, plan.learnt, steps)


def read_step(record: StepRecord) -> Step:
    """The step of a record.

    Raises:
        ValueError: an unknown step, unknown or missing arguments, or arguments out of range.
    """
    if record.name not in STEPS:
        raise ValueError(f"a step that is none of {', '.join(STEPS)}: {record.name!r:.60}")
    cls = STEPS[record.name]
    names = {field.name for field in fields(cls)}
    if names != record.arguments.keys():
        raise ValueError(f"a {record.name} with other arguments: {list_names(names ^ record.arguments.keys())}")
    step: Step = cls(**record.arguments)
    return step


def read_plan(record: PlanRecord) -> Plan:
    """The plan of a record.

    Raises:
        ValueError: as in `read_step`, steps that do not fit the tokens, or other token counts than the steps give.
    """
    steps = tuple(None if step is None else read_step(step) for step in record.steps)
    learnt = record.learnt if steps else 0  # tokens[0] counts them if there is a block
    plan = Plan(steps, (record.tokens[0] if record.tokens else 0) - learnt, record.prefix, record.learnt)
    if list(plan.tokens) != record.tokens:
        raise ValueError("other token counts than its steps give")
    return plan
