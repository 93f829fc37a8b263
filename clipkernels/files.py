"""Files that are whole or not there at all, and tensors in them: safetensors, never pickle."""

from __future__ import annotations

import csv
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

METADATA_KEY = "clipkernels"
"""Where the header of a file of ours says what it is, as JSON."""
STALE_SECONDS = 3600
"""Seconds after which a half-written file is one that was left behind."""
TEMPORARY = r"\.[0-9a-f]{32}\.safetensors\.[a-z0-9_]{8}"
"""What `replacing` calls a file beside one that is named by a UUID."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[str]:
    """The name of a temporary file beside `path`, which takes its place when all went well.

    Raises:
        OSError: no file can be made there.
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
    """Removes what writers that were killed left behind: files of such names that nobody writes any more. All hidden
    ones, in a folder that is nobody else's; `TEMPORARY`, where a user may keep something beside ours."""
    for left in folder.iterdir():
        if re.fullmatch(names, left.name):
            with suppress(FileNotFoundError):  # another one sweeps, or the writer has just finished
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    left.unlink()


def digest_table(digests: Sequence[bytes]) -> Tensor:
    """SHA-256 digests as rows of a tensor (n,32) uint8."""
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, 32)


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Writes tensors and what is to be known about them, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(about)))
        file.flush()
        os.fsync(file.fileno())


def map_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file where they lie in it, read when they are looked at, and what is known about them.

    Raises:
        ValueError: the file is no safetensors file.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"expected a safetensors file, got {path}: {error}") from error


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and what is known about them; raises as `map_tensors`."""
    tensors, about = map_tensors(path)
    # Copied from where they lie in the file, which may be anywhere: products of aligned rows are faster.
    return {name: tensor.clone() for name, tensor in tensors.items()}, about


def read_metadata(header: Mapping[str, str]) -> dict[str, Any]:
    """What the header of a file says of it, its "format" among it; nothing where the file is another's."""
    try:
        said = json.loads(header.get(METADATA_KEY, ""))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def write_csv(records: Sequence[Mapping[str, Any]], stream: TextIO) -> None:
    """Records with the same keys as CSV with a header; several numbers, such as token counts, are one cell."""
    writer = csv.DictWriter(stream, records[0], lineterminator="\n")
    writer.writeheader()
    for record in records:
        joined = {key: " ".join(map(str, cell)) for key, cell in record.items() if isinstance(cell, tuple | list)}
        writer.writerow({**record, **joined})
