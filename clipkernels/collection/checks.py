"""Checks of a run: its arguments, its columns, and its folder beside its sources."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from clipkernels.arguments import check_device, describe
from clipkernels.collection.layout import OWN_COLUMNS
from clipkernels.collection.manifest import read_manifest
from clipkernels.collection.packages import pyarrow
from clipkernels.messages import list_names, printable


def source_names(sources: Any) -> list[str]:
    """The names of sources: of one path, or of several.

    Raises:
        TypeError: something else.
    """
    if isinstance(sources, str | os.PathLike):
        sources = [sources]
    names = list(sources) if isinstance(sources, Iterable) and not isinstance(sources, torch.Tensor) else [sources]
    for name in names:
        if not isinstance(name, str | os.PathLike) or not isinstance(os.fspath(name), str):
            raise TypeError(f"sources must be paths, got {describe(name)}")
    return list(map(os.fspath, names))


def column_names(columns: Any) -> list[str]:
    """The names of columns, each once.

    Raises:
        TypeError: no list of texts.
    """
    is_list = isinstance(columns, Iterable) and not isinstance(columns, str | bytes | torch.Tensor | Mapping)
    names = list(columns) if is_list else [columns]
    if not is_list or not all(isinstance(name, str) for name in names):
        raise TypeError(f"columns must be a list of names, got {describe(columns)}")
    return list(dict.fromkeys(names))


def check_devices(devices: Any) -> list[torch.device] | None:
    """The devices that models run on, or None.

    Raises:
        ValueError: no list of devices, or an empty one.
    """
    if devices is None:
        return None
    if not isinstance(devices, list | tuple) or not devices:
        raise ValueError(f"devices must be a list of devices, got {describe(devices)}")
    try:
        return [check_device(device) for device in devices]
    except ValueError as error:
        raise ValueError(f"devices must be a list of devices, in which each {error}") from error


def check_columns(text: str | None, columns: Sequence[str], types: Mapping[str, Any]) -> None:
    """Raise ValueError for a column whose name a collection has for its own, or captions that are no strings.

    Args:
        text: the column of captions, or None.
        columns: the columns that are kept.
        types: the Arrow types of all of them.
    """
    names = {*columns, *([text] if text not in (None, "text") else [])}
    if taken := sorted(names & set(OWN_COLUMNS)):
        expected = f"expected columns of other names than the collection's own ({', '.join(OWN_COLUMNS)})"
        raise ValueError(f"{expected}, got {list_names(taken)}: rename them in the source")
    if text is not None and types[text] not in (pyarrow().string(), pyarrow().large_string(), pyarrow().null()):
        raise ValueError(f"expected text of strings, got {text!r} of {types[text]}: name another column")


def check_apart(out: str | os.PathLike[str], sources: Sequence[str]) -> None:
    """Raise ValueError if a source may hold files of the collection, or lies in it.

    Args:
        out: the folder of the collection.
        sources: paths and globs.
    """
    folder = Path(os.path.realpath(out)).parts
    for source in sources:
        pattern = os.path.abspath(source)
        if not glob.has_magic(source) or os.path.lexists(source):
            pattern = glob.escape(os.path.realpath(pattern))
        if _may_overlap(Path(pattern).parts, folder):
            expected = "expected a folder of its own for the collection"
            actual = f"{printable(os.fspath(out))}, which overlaps with the source {printable(source)}"
            raise ValueError(f"{expected}, got {actual}: choose another folder")


def _may_overlap(pattern: Sequence[str], folder: Sequence[str]) -> bool:
    """True if a match of a pattern may be a folder, hold it or lie in it; both are given in parts."""
    for part, name in zip(pattern, folder, strict=False):
        if part == "**":
            return True
        if not fnmatchcase(name, part):
            return False
    return True


def check_all_named(folder: Path, sources: Sequence[str]) -> None:
    """Raise ValueError unless all sources of a collection are named, because rows of the others would be removed."""
    if missing := missing_sources(folder, sources):
        raise ValueError(f"expected all sources of {folder} with prune, got none of {list_names(missing)}")


def missing_sources(folder: Path, sources: Sequence[str]) -> list[str]:
    """The sources of a collection that are not among these."""
    return [source for source in read_manifest(folder).sources if source not in sources]
