"""Methods as JSON: a name of a fixed table and the values of its fields, and modules as files.

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

from clipkernels.arguments import describe
from clipkernels.formats import Line
from clipkernels.learn.patch_ranking import RankPredictor, VisualTokens
from clipkernels.messages import list_names
from clipkernels.methods import TCA, Dense, EViT, Method, PatchRanking, Schedule, ToMe
from clipkernels.plan import Step
from clipkernels.plan_records import StepRecord, read_step, record_step

METHODS: dict[str, Any] = {cls.__name__: cls for cls in (Dense, EViT, PatchRanking, Schedule, TCA, ToMe)}
MODULES: dict[str, tuple[Any, str]] = {
    "predictor": (RankPredictor, "predictor.safetensors"),
    "tokens": (VisualTokens, "learnt_tokens.safetensors"),
}
"""Of a method's argument that is a module: its class and its file."""
Value = None | bool | int | float | Line | list[int | StepRecord | None]
"""Of a method's argument: a number, a text, numbers, or a step or None per block."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An instance of a dataclass: its class by name, and its fields that are values, not modules.

    modules: the arguments that are modules, which have files of their own.
    """

    name: Line
    arguments: dict[Line, Value]
    modules: list[Line] = []


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
    for argument, module in _modules_of(method).items():
        cls, _ = MODULES[argument]
        if type(module) is not cls:
            raise ValueError(f"expected {name} with a {cls.__name__} as {argument}, got {describe(module)}")
    return _record(method)


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
    for argument, module in _modules_of(method).items():
        _, file = MODULES[argument]
        module.save(Path(folder) / file)
        names.append(file)
    return names


def _modules_of(method: Method) -> dict[str, Any]:
    """The arguments of a method with weights that are modules, by name."""
    if not hasattr(method, "weights"):
        return {}
    modules = {name: getattr(method, name, None) for name in MODULES}
    return {name: module for name, module in modules.items() if module is not None}


def _record(method: Any) -> Record:
    content: Mapping[str, Any] = {field.name: getattr(method, field.name) for field in fields(method)}
    modules = list(_modules_of(method))
    arguments = {
        name: [record_step(item) if isinstance(item, Step) else item for item in part]
        if isinstance(part, tuple)
        else part
        for name, part in content.items()
        if name not in modules
    }
    return Record(type(method).__name__, arguments, modules)


def _from_json(value: Value) -> Any:
    if not isinstance(value, list):
        return value
    return tuple(read_step(item) if isinstance(item, StepRecord) else item for item in value)
