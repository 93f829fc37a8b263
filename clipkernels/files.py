"""Atomic writes, tables of digests, and CSV."""

from __future__ import annotations

import csv
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

STALE_SECONDS = 3600
"""Seconds without a write after which a temporary file counts as left behind."""
TEMPORARY = r"\.[0-9a-f]{32}\.safetensors\.[a-z0-9_]{8}"
"""Pattern of the temporary files that `atomic_write` makes for safetensors files named by a UUID."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the name of a temporary file next to `path`, which replaces `path` on success and is deleted on error.

    Raises:
        OSError: no file can be created there.
    """
    target = Path(path)
    number, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
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


def digest_table(digests: Sequence[bytes]) -> Tensor:
    """SHA-256 digests as rows of a tensor (n,32) uint8."""
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, 32)


def write_csv(records: Sequence[Mapping[str, Any]], stream: TextIO) -> None:
    """Write records with the same keys as CSV with a header. A list, such as token counts, becomes one cell."""
    writer = csv.DictWriter(stream, records[0], lineterminator="\n")
    writer.writeheader()
    for record in records:
        joined = {key: " ".join(map(str, cell)) for key, cell in record.items() if isinstance(cell, tuple | list)}
        writer.writerow({**record, **joined})
