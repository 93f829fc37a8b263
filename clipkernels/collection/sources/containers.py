"""Files that hold many items, such as Parquet files and tars: the files of a source, and those that are open."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Any
from zlib import crc32

from clipkernels.collection.sources.folder import fixed_part
from clipkernels.files import open_regular
from clipkernels.images import find_images, walk
from clipkernels.messages import printable

PARQUET = (".parquet", ".parq", ".pq")
TAR = (".tar",)
MAX_OPEN = 4
"""Containers that stay open in a thread."""
ROW_BITS = 31
CHANGED = "its container changed since it was listed"
_OPEN = threading.local()


def containers_of(name: str, suffixes: Sequence[str]) -> dict[str, str]:
    """The files with `suffixes` that a file, a folder or a glob names: paths by their names below it, sorted."""
    if os.path.isdir(name):
        root = os.path.abspath(name)
        paths = [os.path.join(path, file) for path, names in walk(root) for file in names]
    elif os.path.lexists(name):
        root, paths = os.path.dirname(os.path.abspath(name)), [os.path.abspath(name)]
    else:
        paths = list(map(os.path.abspath, find_images([name]).paths))
        root = os.path.abspath(fixed_part(name))
    paths = [path for path in paths if path.lower().endswith(tuple(suffixes))]
    return {os.path.relpath(path, root): path for path in sorted(paths)}


def place_of(name: str, row: int) -> int:
    """The place of a row in one of several containers. It does not change when others are added or removed."""
    return crc32(os.fsencode(name)) << ROW_BITS | row


def row_of(place: int) -> int:
    """The row of a place."""
    return place & ((1 << ROW_BITS) - 1)


def names_at(place: int, names: Iterable[str]) -> list[str]:
    """The containers that a place may lie in: one, unless the checksums of their names are equal."""
    return [name for name in names if crc32(os.fsencode(name)) == place >> ROW_BITS]


def stamped(path: str, kind: str, make: Callable[[IO[bytes]], Any], key: object = None) -> tuple[Any, int, int]:
    """Something made of an open container, with the container's size and the time of its last change.

    It is kept for this thread of this process, because others must not share its position, until the file changes.

    Args:
        path: the container, a regular file.
        kind: the kind of file that is expected, for errors.
        make: a function of the open file, which stays open.
        key: tells things apart that are made of one file.
    Raises:
        ValueError, OSError: no regular file; it cannot be opened.
    """
    if getattr(_OPEN, "process", None) != os.getpid():
        _OPEN.process, _OPEN.made = os.getpid(), {}
    made: dict[Any, tuple[Any, tuple[int, ...], IO[bytes]]] = _OPEN.made
    stamp = _stamp(os.stat(path))
    if (path, key) in made and made[path, key][1] == stamp:
        made[path, key] = made.pop((path, key))  # the last one used is dropped last
    else:
        _drop((path, key))
        try:
            stream = open_regular(path)
        except ValueError as error:
            raise ValueError(f"expected {kind}, got {printable(path)}, which is {error}") from error
        try:
            made[path, key] = make(stream), _stamp(os.fstat(stream.fileno())), stream
        except BaseException:
            stream.close()
            raise
        while len(made) > MAX_OPEN:
            _drop(next(iter(made)))
    thing, (size, modified, *_), _ = made[path, key]
    return thing, size, modified


def forget(path: str) -> None:
    """Drop what this thread keeps of a container, because its state is unknown after an error."""
    for pair in [pair for pair in getattr(_OPEN, "made", {}) if pair[0] == path]:
        _drop(pair)


def _drop(pair: Any) -> None:
    if pair in _OPEN.made:
        _OPEN.made.pop(pair)[2].close()


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev
