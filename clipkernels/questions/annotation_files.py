"""The parts that the readers of annotation files share: strict JSON Lines, and the images that annotations name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from clipkernels.evaluation.file_tree import FileTree, missing_note
from clipkernels.evaluation.text_files import BYTE_ORDER_MARK
from clipkernels.files import open_named
from clipkernels.messages import list_items, one_line

MAX_LINE_BYTES = 1 << 22
Content = TypeVar("Content")


class Annotations(NamedTuple):
    """The annotations of one split.

    items: the annotations, in the order of the file.
    notes: sentences for a report, such as a count of those that were left out.
    """

    items: tuple[Any, ...]
    notes: tuple[str, ...]


def read_json_lines(
    path: str | os.PathLike[str], expected: str, schema: type[Content]
) -> Iterator[tuple[int, Content]]:
    """Yield the lines of a JSON Lines file that are not blank, each with its number from 1, as instances of a schema.

    Values that the schema does not name are skipped. The file is read line by line.

    Args:
        path: the file.
        expected: its kind, for messages.
        schema: of a line.
    Raises:
        ValueError: no regular file, or a line that is too long, no JSON, or JSON that does not fit the schema; the
            message names the file and the line.
        OSError: the file cannot be read.
    """
    decoder = msgspec.json.Decoder(schema)
    with open_named(path, expected) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise line_error(path, expected, number, f"more than {MAX_LINE_BYTES >> 20} MiB in one line")
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.strip():
                continue
            try:
                item = decoder.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise line_error(path, expected, number, f"{one_line(str(error)):.200}") from error
            yield number, item


def line_error(path: str | os.PathLike[str], expected: str, number: int, fault: str) -> ValueError:
    """The error of a fault in a line of a file, by number from 1."""
    return ValueError(f"expected {expected}, got line {number} of {path}: {fault}: get that file anew")


def find_images(
    names: Iterable[str], root: str | os.PathLike[str], folders: Sequence[str], split: str
) -> tuple[dict[str, str], str | None]:
    """The paths of the images that exist, and a sentence that counts the missing ones; None without any.

    No image is opened.

    Args:
        names: paths of images, relative to one of the folders.
        root: the folder of the images.
        folders: folders below it that are searched, in this order; "" is the folder itself.
        split: the name of the split, for the sentence.
    Raises:
        ValueError: none of the images exists.
        OSError: a folder cannot be read.
    """
    tree = FileTree(Path(os.path.abspath(os.path.expanduser(root))))
    wanted = list(dict.fromkeys(names))
    paths: dict[str, str] = {}
    for name in wanted:
        for folder in folders:
            path = tree.find(f"{folder}/{name}" if folder else name)
            if path is not None:
                paths[name] = path
                break
    if not paths:
        places = list_items(os.path.join(tree.root, folder) if folder else tree.root for folder in folders)
        raise ValueError(
            f"expected the images of the {split} split, such as {next(iter(wanted), '')!r}, in {places}, got none of "
            "them: name their folder (--images)"
        )
    return paths, missing_note(split, (name for name in wanted if name not in paths), len(wanted))
