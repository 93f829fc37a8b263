"""Methods and plans as JSON: a name of a fixed table and the values of its fields, and modules as files.

A record is data. Reading one constructs a class of the table, which checks its arguments, and nothing else: no name in
a file is imported or called.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
from torch import nn

from clipkernels.arguments import describe
from clipkernels.formats import Count, Line, Size
from clipkernels.learn.patch_ranking import RankPredictor, VisualTokens
from clipkernels.messages import list_names
from clipkernels.methods import TCA, Dense, EViT, Method, PatchRanking, ToMe
from clipkernels.plan import Condense, Merge, Plan, Predict, Prune

METHODS: dict[str, Any] = {cls.__name__: cls for cls in (Dense, EViT, PatchRanking, TCA, ToMe)}
STEPS: dict[str, Any] = {cls.__name__: cls for cls in (Condense, Merge, Predict, Prune)}
MODULES: dict[str, tuple[Any, str]] = {
    "predictor": (RankPredictor, "predictor.safetensors"),
    "tokens": (VisualTokens, "learnt_tokens.safetensors"),
}
"""Of a method's argument that is a module: its class and its file."""
Value = None | bool | int | float | Line | list[int]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An instance of a dataclass: its class by name, and its fields that are values, not modules.

    modules: the arguments that are modules, which have files of their own.
    """

    name: Line
    arguments: dict[Line, Value]
    modules: list[Line] = []


class PlanRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A plan: the tokens that enter each block and leave the last, and the step of each block."""

    tokens: list[Size]
    prefix: Count
    learnt: Count
    steps: list[Record | None]


def record_method(method: Method) -> Record:
    """The record of a built-in method.

    Raises:
        ValueError: a method of another class, or with a predictor or tokens of another class, because their code would
            have to run when the record is read.
    """
    name = type(method).__name__
    if METHODS.get(name) is not type(method):
        raise ValueError(
            f"expected a built-in method ({', '.join(METHODS)}), got {describe(method)}, which JSON cannot rebuild "
            "without running its code: ck.unpatch the model, save it, and patch it after ck.load"
        )
    for argument, (cls, _) in MODULES.items():
        module = getattr(method, argument, None)
        if module is not None and type(module) is not cls:
            raise ValueError(f"expected {name} with a {cls.__name__} as {argument}, got {describe(module)}")
    return _record(method)


def record_plan(plan: Plan) -> PlanRecord:
    """The record of a plan."""
    steps = [None if step is None else _record(step) for step in plan.steps]
    return PlanRecord(list(plan.tokens), plan.prefix, plan.learnt, steps)


def read_method(record: Record, folder: str | os.PathLike[str]) -> Method:
    """The method of a record whose modules are in a folder.

    Raises:
        ValueError: an unknown method, unknown arguments, arguments out of range, or a file of something else.
        OSError: a file cannot be read.
    """
    if record.name not in METHODS:
        raise ValueError(f"expected a built-in method ({', '.join(METHODS)}), got {record.name!r:.60}")
    cls = METHODS[record.name]
    names = {field.name for field in fields(cls)}
    if unknown := {*record.arguments, *record.modules} - names | set(record.modules) - MODULES.keys():
        raise ValueError(f"expected arguments of {record.name}, got {list_names(unknown)}")
    modules = {name: MODULES[name][0].load(Path(folder) / MODULES[name][1]) for name in record.modules}
    try:
        method: Method = cls(**{name: _from_json(value) for name, value in record.arguments.items()}, **modules)
    except TypeError as error:
        raise ValueError(f"expected the arguments of {record.name}, got others: {error}") from error
    return method


def save_modules(method: Method, folder: str | os.PathLike[str]) -> list[str]:
    """Write the modules of a method to a folder, and return the names of their files."""
    names = []
    for argument, (_, file) in MODULES.items():
        module: nn.Module | None = getattr(method, argument, None)
        if module is not None:
            module.save(Path(folder) / file)  # type: ignore[operator]  # RankPredictor and VisualTokens have it
            names.append(file)
    return names


def _record(value: Any) -> Record:
    content: Mapping[str, Any] = {field.name: getattr(value, field.name) for field in fields(value)}
    modules = [name for name, part in content.items() if isinstance(part, nn.Module)]
    arguments = {
        name: list(part) if isinstance(part, tuple) else part for name, part in content.items() if name not in modules
    }
    return Record(type(value).__name__, arguments, modules)


def _from_json(value: Value) -> Any:
    return tuple(value) if isinstance(value, list) else value
