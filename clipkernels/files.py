"""Regular files, atomic writes, SHA-256, and CSV."""

from __future__ import annotations

import csv
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, TextIO

STALE_SECONDS = 3600
"""Seconds without a write after which a temporary file counts as left behind."""
TEMPORARY = r"\.[0-9a-f]{32}\.safetensors\.[a-z0-9_]{8}"
"""Pattern of the temporary files that `atomic_write` makes for safetensors files named by a UUID."""


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name a file in each OSError that names none, such as an error of reading."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def open_regular(path: str | os.PathLike[str], limit: int | None = None) -> IO[bytes]:
    """Open a regular file of at most `limit` bytes. Nothing else is opened, because that may block or have effects.

    Raises:
        ValueError: a FIFO, a device, a socket or a folder, or a link to one; a larger file.
        OSError: the file cannot be opened.
    """

    def open_at_once(name: str, flags: int) -> int:
        # The path may lead to a FIFO since the check; without O_NONBLOCK that would block.
        number = os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
        try:
            _check_regular(os.fstat(number), limit)
        except ValueError:
            os.close(number)
            raise
        return number

    _check_regular(os.stat(path), limit)
    return open(path, "rb", opener=open_at_once)


@contextmanager
def open_named(path: str | os.PathLike[str], expected: str, limit: int | None = None) -> Iterator[IO[bytes]]:
    """Open a regular file whose errors name it, and the kind of file that was `expected`.

    Raises:
        ValueError, OSError: as `open_regular`.
    """
    with naming(path):
        try:
            file = open_regular(path, limit)
        except ValueError as error:
            raise ValueError(f"expected {expected}, got {path}, which is {error}") from error
        with file:
            yield file


def _check_regular(status: os.stat_result, limit: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if limit is not None and status.st_size > limit:
        raise ValueError(f"larger than {limit // 2**20} MiB")


def stamp_of(path: str | os.PathLike[str]) -> tuple[int, int]:
    """The size of a file and the time of its last change in nanoseconds, which tell a changed one.

    Raises:
        OSError: no such file.
        ValueError: a name that no file can have.
    """
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def hash_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, hexadecimal.

    Raises:
        ValueError: no regular file.
        OSError: the file cannot be read.
    """
    digest = sha256()
    with open_named(path, "a file") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the name of a temporary file next to `path`, which replaces `path` on success and is deleted on error.

    Raises:
        OSError: no file can be created there; it names `path`.
    """
    target = Path(path)
    try:
        number, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    os.close(number)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def sweep(folder: Path, names: str = r"\..*") -> None:
    """Remove stale temporary files that killed writers left behind.

    Args:
        folder: the folder.
        names: a pattern that whole file names must match. The default matches every hidden file; pass `TEMPORARY` for
            a folder that may also hold a user's files.
    """
    for file in folder.iterdir():
        if re.fullmatch(names, file.name):
            with suppress(FileNotFoundError):  # another process sweeps too, or the writer has just finished
                if time.time() - file.stat().st_mtime > STALE_SECONDS:
                    file.unlink()


def write_csv(records: Sequence[Mapping[str, Any]], stream: TextIO) -> None:
    """Write records with the same keys as CSV with a header. A list, such as token counts, becomes one cell."""
    writer = csv.DictWriter(stream, records[0], lineterminator="\n")
    writer.writeheader()
    for record in records:
        joined = {key: " ".join(map(str, cell)) for key, cell in record.items() if isinstance(cell, tuple | list)}
        writer.writerow({**record, **joined})
