"""Files that stay open between reads: the containers of a source, and the plan."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import IO, Any

from clipkernels.files import open_regular
from clipkernels.messages import printable

MAX_OPEN = 5
"""Files that stay open in a thread: a plan, and four containers."""
_OPEN = threading.local()


def stamped(path: str, kind: str, make: Callable[[IO[bytes]], Any], key: object = None) -> tuple[Any, int, int]:
    """Something made of an open file, with the file's size and the time of its last change.

    It is kept for this thread of this process, because others must not share its position, until the file changes.

    Args:
        path: a regular file.
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
    """Close what this thread keeps of a file: the file is deleted, or its state is unknown after an error."""
    for pair in [pair for pair in getattr(_OPEN, "made", {}) if pair[0] == path]:
        _drop(pair)


def _drop(pair: Any) -> None:
    if pair in _OPEN.made:
        _OPEN.made.pop(pair)[2].close()


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev
