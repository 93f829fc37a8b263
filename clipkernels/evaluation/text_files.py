"""The text and JSON files that come with data: bounded, UTF-8, checked against a schema."""

from __future__ import annotations

import os
from typing import TypeVar

import msgspec

from clipkernels.files import open_named
from clipkernels.messages import one_line

MAX_BYTES = 512 * 2**20
"""The largest file is dataset_coco.json with 144 MB."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Content = TypeVar("Content")


def read_text(path: str | os.PathLike[str], expected: str) -> str:
    """The text of a file, without a byte-order mark.

    Args:
        path: the file.
        expected: its kind, for messages.
    Raises:
        ValueError: no regular file, a file of more than 512 MiB, or no UTF-8.
        OSError: the file cannot be read.
    """
    try:
        return _read(path, expected).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected {expected} in UTF-8, got {path}: {error.reason} at byte {error.start}") from error


def read_lines(path: str | os.PathLike[str], expected: str) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, stripped, each with its number from 1; raises as `read_text`."""
    lines = enumerate(read_text(path, expected).splitlines(), 1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def read_json(path: str | os.PathLike[str], expected: str, schema: type[Content]) -> Content:
    """The content of a JSON file, as an instance of a schema; values that the schema does not name are skipped.

    Raises:
        ValueError: no regular file, a file of more than 512 MiB, no JSON, or JSON that does not fit the schema.
        OSError: the file cannot be read.
    """
    try:
        return msgspec.json.decode(_read(path, expected), type=schema)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"expected {expected}, got {path}: {one_line(str(error)):.200}: get that file anew") from error


def _read(path: str | os.PathLike[str], expected: str) -> bytes:
    with open_named(path, expected, MAX_BYTES) as file:
        return file.read().removeprefix(BYTE_ORDER_MARK)
