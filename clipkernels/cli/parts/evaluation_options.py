"""Options of `clipkernels evaluate`: the data sets, heads, shots and methods that they name."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import click
from torch import nn

from clipkernels.cli.parts.methods import is_supported, methods_for
from clipkernels.evaluation.captions import Captions, read_captions
from clipkernels.evaluation.datasets import Dataset
from clipkernels.evaluation.heads import HEADS
from clipkernels.measure.timing import HOST
from clipkernels.methods import Method
from clipkernels.patching import method_of, tower_of

STATE = "state"


def choose_methods(
    model: nn.Module, specs: Sequence[str], predictor: str | None, tokens: str | None
) -> dict[str, Method | None]:
    """Return the methods by name: the host's own forward, Dense(), and those of --method or of a saved model.

    Raises:
        click.UsageError: as in `methods_for`, or methods for a tower that cannot be patched.
        ValueError: as in `methods_for`.
    """
    if is_supported(model):
        own = method_of(model)
        return methods_for(tower_of(model), specs or ([] if own else ["none"]), predictor, tokens, own)
    if specs:
        raise click.UsageError(f"expected no --method for a {type(model.visual).__name__}, got {specs[0]}")
    return {HOST: None}


def choose_shots(text: str) -> list[int]:
    """Return the numbers of --shots, ascending; click.UsageError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.UsageError(f"expected --shots of numbers such as 0,1,4,16, got {text!r}")
    return sorted({int(part) for part in parts})


def read_named(values: Sequence[str], read: Callable[[str, str], Any], option: str) -> dict[str, Any]:
    """Return what NAME=PATH options name, by name; a path alone has the name of its last part.

    Raises:
        click.UsageError: two of one name, or a name or a path that is empty.
        ValueError: as the reader raises it.
    """
    contents: dict[str, Any] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or os.sep in name:
            name, path = Path(os.path.abspath(value)).name, value
        if not name or not path.strip():
            raise click.UsageError(f"expected {option} of NAME=PATH or a path, got {value!r}: give both, or the path")
        if name in contents:
            raise click.UsageError(f"expected different names with {option}, got {name} twice: name them NAME=PATH")
        contents[name] = read(name, path)
    return contents


def read_named_captions(images: str | None, name: str, path: str) -> Captions:
    """Return the captions of a file whose images are in a folder."""
    return read_captions(path, images)


def check_combinations(
    heads: Sequence[str], shots: Sequence[int], data: Collection[str], supports: Collection[str]
) -> None:
    """Raise click.UsageError for options that nothing would read."""
    few_shot = [head for head in heads if HEADS[head].few_shot]
    for name in supports:
        if name not in data:
            raise click.UsageError(f"expected --support of a data set in --data, got {name}: add it, or leave it out")
    supported = [head for head, kind in HEADS.items() if kind.supported]
    if supports and (0 not in shots or not set(supported) & set(heads)):
        raise click.UsageError(
            f"expected --heads {' or '.join(supported)} and 0 in --shots with --support, got --heads {','.join(heads)} "
            f"and --shots {','.join(map(str, shots))}: add them, or leave --support out"
        )
    if few_shot and not any(shots) and not supports:
        raise click.UsageError(
            f"expected --shots of 1 or more, or --support, with --heads {few_shot[0]}, got --shots 0: add one of them"
        )


def check_clouds(clouds: Sequence[Dataset], views: str | None, picture: str | None) -> None:
    """Raise click.UsageError for options about point clouds that no data set has."""
    for option, value in (("--views", views), ("--picture", picture)):
        if value is not None and not clouds:
            raise click.UsageError(
                f"expected --data of modelnet40 or scanobjectnn with {option} {value}, got none: add it, or leave "
                f"{option} out"
            )
