"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipkernels.artefacts.header import FILE, read_header


def check_replaceable(folder: Path) -> None:
    """Raise ValueError unless a folder is new, empty, or an artefact that holds nothing else.

    Raises:
        OSError: the folder cannot be read.
    """
    if not os.path.lexists(folder):
        return
    expected = "expected a new or empty folder, or one that ck.save wrote"
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"{expected}, got {folder}, which is no folder: choose another one")
    names = set(os.listdir(folder))
    if not names:
        return
    if FILE not in names:
        raise ValueError(f"{expected}, got {folder} with {min(names)!r} and no {FILE}: choose another one")
    others = names - {FILE, *read_header(folder).files}
    if others:
        raise ValueError(f"{expected}, got {folder} with {min(others)!r} too: move it, or choose another folder")


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, which takes its place on success and is deleted on error.

    An artefact that is there moves aside first, and back if the new one cannot take its place.

    Raises:
        ValueError: as `check_replaceable`.
        OSError: no folder can be made there.
    """
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        for file in temporary.iterdir():
            _flush(file)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        _exchange(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _exchange(temporary: Path, folder: Path) -> None:
    check_replaceable(folder)  # another process may have written to it meanwhile
    if not folder.exists():
        os.rename(temporary, folder)
        return
    before = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    os.rename(folder, before)
    try:
        os.rename(temporary, folder)
    except BaseException:
        os.rename(before, folder)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _flush(file: Path) -> None:
    """Have the system write a file, so that a folder that is there after a power cut has whole files."""
    number = os.open(file, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
