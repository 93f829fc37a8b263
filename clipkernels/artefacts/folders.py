"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from clipkernels.artefacts.header import FILE, read_header

NEW, OLD = ".new.", ".old."
"""Parts of the names of hidden folders: one that is written, and one that moves aside."""


class Kind(NamedTuple):
    """A kind of folder that may be replaced.

    writer: the function that writes it, for messages.
    header: the file that marks it.
    files: a function from a folder to the paths in it, with slashes, that its header lists; ValueError for a header
        that is damaged.
    """

    writer: str
    header: str
    files: Callable[[Path], Collection[str]]


ARTEFACTS = Kind("ck.save", FILE, lambda folder: read_header(folder).files)


def check_replaceable(folder: Path, kind: Kind = ARTEFACTS) -> None:
    """Raise ValueError unless a folder is new, empty, or one of a kind that holds nothing else.

    A link stands for the folder it points to. Caches of Python beside the listed files do not count.

    Raises:
        OSError: the folder cannot be read.
    """
    folder = _target(folder)
    if not os.path.lexists(folder):
        return
    expected = f"expected a new or empty folder, or one that {kind.writer} wrote"
    if not folder.is_dir():
        raise ValueError(f"{expected}, got {folder}, which is no folder: choose another one")
    names = set(os.listdir(folder))
    if not names:
        return
    if kind.header not in names:
        raise ValueError(f"{expected}, got {folder} with {min(names)!r} and no {kind.header}: choose another one")
    others = _paths_in(folder) - {kind.header, *kind.files(folder)}
    if others:
        raise ValueError(f"{expected}, got {folder} with {min(others)!r} too: move it, or choose another folder")


def _target(folder: Path) -> Path:
    """The folder that a path names, behind every link; it need not exist."""
    return Path(os.path.realpath(folder))


def _paths_in(folder: Path) -> set[str]:
    """The files and the empty folders below a folder, as paths with slashes, without caches of Python."""
    paths = set()
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        links = [name for name in folders if Path(parent, name).is_symlink()]
        empty = [name for name in folders if name not in links and not os.listdir(Path(parent, name))]
        paths |= {Path(parent, name).relative_to(folder).as_posix() for name in (*files, *links, *empty)}
    return paths


@contextmanager
def replaced_folder(folder: Path, kind: Kind = ARTEFACTS) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, which takes its place on success and is deleted on error.

    A folder of the kind that is there moves aside first, and back if the new one cannot take its place. What killed
    writers left beside it is removed first; a folder that one had moved aside returns if its place is free. A link
    stays, and the folder it points to is replaced.

    Raises:
        ValueError: as `check_replaceable`.
        OSError: no folder can be made there.
    """
    folder = _target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder, kind)
    check_replaceable(folder, kind)
    temporary, lock = _make_sibling(folder)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        _exchange(temporary, folder, kind)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        _unlock(lock)


def _make_sibling(folder: Path) -> tuple[Path, int | None]:
    """A new hidden folder beside `folder`, and its lock."""
    while True:
        path = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}{NEW}"))
        # Before it is locked, another process may take it for one that a killed writer left.
        with suppress(BlockingIOError, FileNotFoundError):
            return path, _lock(path)


def _exchange(temporary: Path, folder: Path, kind: Kind) -> None:
    check_replaceable(folder, kind)  # another process may have written to it meanwhile
    if not folder.exists():
        os.rename(temporary, folder)
        return
    before = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}{OLD}"))
    lock = None
    with suppress(BlockingIOError, FileNotFoundError):
        lock = _lock(folder)  # of the folder itself, wherever it moves
    try:
        os.rename(folder, before)
        try:
            os.rename(temporary, folder)
        except BaseException:
            os.rename(before, folder)
            raise
        shutil.rmtree(before, ignore_errors=True)
    finally:
        _unlock(lock)


def _sweep(folder: Path, kind: Kind) -> None:
    """Remove the folders that killed writers of `folder` left beside it; a folder that had moved aside returns.

    The system releases the lock of a writer however it ends. Without such locks nothing is removed.
    """
    pattern = re.compile(rf"{re.escape(f'.{folder.name}')}({re.escape(NEW)}|{re.escape(OLD)})[a-z0-9_]{{8}}")
    for name in os.listdir(folder.parent):
        match, path = pattern.fullmatch(name), folder.parent / name
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        lock = None
        with suppress(BlockingIOError, FileNotFoundError):
            lock = _lock(path)
        if lock is None:
            continue
        try:
            if match[1] == OLD and os.path.lexists(path / kind.header) and not os.path.lexists(folder):
                os.rename(path, folder)
            else:
                shutil.rmtree(path, ignore_errors=True)
        finally:
            _unlock(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder and return the number to `_unlock`, or None on a system or a file system without locks.

    Raises:
        BlockingIOError: another process has locked it.
        FileNotFoundError: it is not there any more.
    """
    if fcntl is None:
        return None
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(number), os.stat(folder)):
            return number
        raise FileNotFoundError(folder)
    except OSError as error:
        os.close(number)
        if isinstance(error, BlockingIOError | FileNotFoundError):
            raise
        return None


def _unlock(number: int | None) -> None:
    """Release a lock, which ends with the open folder."""
    if number is not None:
        os.close(number)


def _flush(file: Path) -> None:
    """Have the system write a file, so that a folder that is there after a power cut has whole files."""
    number = os.open(file, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
