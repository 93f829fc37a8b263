"""Sources of image files: a folder, a glob, one file, a list of paths; their columns come from sidecars.

The sidecar of a.jpg in the column txt is a.txt.
"""

from __future__ import annotations

import codecs
import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clipkernels.collection.packages import pyarrow
from clipkernels.collection.sources.items import Answers, Item, batches_of_files, name_of
from clipkernels.files import open_named, open_regular
from clipkernels.images import Found, find_images, images_by_folder, is_image_name, names_in, no_images, walk
from clipkernels.images.reader import MAX_BYTES
from clipkernels.messages import printable, reason_of

if TYPE_CHECKING:
    import pyarrow as pa

MAX_SIDECAR = 16 * 2**20
BINARY = re.compile(r"(?:.*\.)?(?:npy|npz|pth?|pkl|pickle|safetensors|bin|mp[34]|wav|flac|ogg|webm|avi|pdf|zip)")
"""The suffixes of members and sidecars that are not text."""


@dataclass
class FolderSource:
    """The image files below a folder. An id is the path relative to the folder."""

    name: str
    root: str
    note: str | None = None

    def list(self, columns: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        """Yield the items, folder by folder, each folder's files sorted."""
        others = Counter[str]()
        empty = True
        for batch in batches_of_files(self.root, self._names(others)):
            empty = False
            yield batch
        for column in columns:
            del others[f".{column.lower()}"]
        found = Found([], others)
        if empty:
            raise no_images(self.name, found)
        self.note = found.note

    def _names(self, others: Counter[str]) -> Iterator[str]:
        for folder, names in images_by_folder(self.root, others):
            below = os.path.relpath(folder, self.root)
            yield from names if below == os.curdir else (os.path.join(below, name) for name in names)

    def columns(self) -> dict[str, pa.DataType]:
        """The suffixes of the files in the folders that are not images."""
        return _suffixes(name for _, names in walk(self.root) for name in names)

    def fetch(self, ids: Sequence[str], places: Sequence[int], columns: Sequence[str]) -> Answers:
        """Read files and their sidecars."""
        return fetch_files(self.root, ids, places, columns)


@dataclass
class GlobSource:
    """The files that a glob matches. An id is the path relative to the part before the first component with magic."""

    name: str
    pattern: str
    root: str
    note: str | None = None

    @classmethod
    def of(cls, pattern: str) -> GlobSource:
        """The source of a glob, which is relative to the current folder or absolute."""
        fixed = fixed_part(pattern)
        root = os.path.join(os.path.abspath(fixed), "")
        return cls(pattern, glob.escape(root) + pattern[len(fixed) :].lstrip(os.sep), root)

    def list(self, columns: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        """Yield the items, sorted as their paths."""
        found = find_images([self.pattern])
        names, suffixes = found.paths, tuple(f".{column}" for column in columns)
        for index, path in enumerate(names):
            names[index] = path.removeprefix(self.root)
        names = [name for name in names if not name.endswith(suffixes)]  # photos/* also matches the sidecars
        if not names:
            raise ValueError(f"expected images, got none that match {self.name!r}")
        yield from batches_of_files(self.root, names)
        for suffix in suffixes:
            del found.others[suffix.lower()]
        self.note = found.note

    def columns(self) -> dict[str, pa.DataType]:
        """The suffixes of the files beside the matches that are not images."""
        return _suffixes_beside(find_images([self.pattern]).paths)

    def fetch(self, ids: Sequence[str], places: Sequence[int], columns: Sequence[str]) -> Answers:
        """Read files and their sidecars."""
        return fetch_files(self.root, ids, places, columns)


@dataclass
class FileSource:
    """One image file. Its id is its name."""

    name: str
    root: str
    file: str
    note: str | None = None

    def list(self, columns: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        """Yield the item."""
        return batches_of_files(self.root, [self.file])

    def columns(self) -> dict[str, pa.DataType]:
        """The suffixes of the files beside this one that are not images."""
        return _suffixes_beside([os.path.join(self.root, self.file)])

    def fetch(self, ids: Sequence[str], places: Sequence[int], columns: Sequence[str]) -> Answers:
        """Read the file and its sidecars."""
        return fetch_files(self.root, ids, places, columns)


@dataclass
class ListSource:
    """The files that a text file names, one a line, relative to the folder of the list. An id is a line."""

    name: str
    path: str
    note: str | None = None

    def list(self, columns: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        """Yield the items in the order of the lines; blank lines are left out."""
        empty = True
        for batch in batches_of_files(os.path.dirname(self.path), self._lines()):
            empty = False
            yield batch
        if empty:
            raise ValueError(f"expected a file of paths, one a line, got {printable(self.name)} without any")

    def _lines(self) -> Iterator[str]:
        with open_named(self.path, "a file of paths") as file:
            for number, line in enumerate(file):
                name = line.removeprefix(codecs.BOM_UTF8 if number == 0 else b"").rstrip(b"\r\n")
                if name.strip():
                    yield os.fsdecode(name)

    def columns(self) -> dict[str, pa.DataType]:
        """The suffixes of the files beside the images that are not images."""
        folder = os.path.dirname(self.path)
        return _suffixes_beside(os.path.join(folder, line) for line in self._lines())

    def fetch(self, ids: Sequence[str], places: Sequence[int], columns: Sequence[str]) -> Answers:
        """Read files and their sidecars."""
        return fetch_files(os.path.dirname(self.path), ids, places, columns)


def fixed_part(pattern: str) -> str:
    """The folder before the first component of a glob that has magic."""
    parts = pattern.split(os.sep)
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return os.sep.join([*parts[:first], ""])


def fetch_files(root: str, ids: Sequence[str], places: Sequence[int], columns: Sequence[str]) -> Answers:
    """Read files by the ids of `batches_of_files`; one that cannot be read is the reason, in one line."""
    answers: Answers = []
    for key, place in zip(ids, places, strict=True):
        path = os.path.join(root, name_of(key, place))
        try:
            item = read_item(path)
        except Exception as error:
            answers.append(reason_of(error))
            continue
        try:
            values = {column: _read_sidecar(f"{os.path.splitext(path)[0]}.{column}", column) for column in columns}
        except Exception as error:
            answers.append(f"the file of a column: {reason_of(error)}")
            continue
        answers.append(item._replace(values=values))
    return answers


def read_item(path: str) -> Item:
    """The content and the stamp of an image file.

    Raises:
        ValueError, OSError: no regular file, a file of more than 512 MiB, one that cannot be read.
    """
    with open_regular(path, MAX_BYTES) as file:
        status = os.fstat(file.fileno())
        return Item(file.read(status.st_size), status.st_size, status.st_mtime_ns, {})


def column_type(suffix: str) -> pa.DataType:
    """The type of the column of a sidecar or member: a string of text, bytes of images and other known formats."""
    pa = pyarrow()
    return pa.binary() if BINARY.fullmatch(suffix.lower()) or is_image_name(f"x.{suffix}") else pa.string()


def column_value(content: bytes, suffix: str) -> str | bytes:
    """The value of a column: text without a byte-order mark and the end of the last line, or bytes.

    Bytes of a text that are not UTF-8 become U+FFFD.
    """
    if column_type(suffix) == pyarrow().binary():
        return content
    return content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").rstrip("\r\n")


def _read_sidecar(path: str, column: str) -> Any:
    try:
        with open_regular(path, MAX_SIDECAR) as file:
            return column_value(file.read(os.fstat(file.fileno()).st_size), column)
    except FileNotFoundError:
        return None


def _suffixes_beside(paths: Iterable[str]) -> dict[str, pa.DataType]:
    """The columns that the files in the folders of `paths` may fill."""

    def names() -> Iterator[str]:
        for folder in sorted({os.path.dirname(path) for path in paths}):
            try:
                yield from names_in(folder)
            except (OSError, ValueError):  # of a file that does not exist
                continue

    return _suffixes(names())


def _suffixes(names: Iterable[str]) -> dict[str, pa.DataType]:
    suffixes = {os.path.splitext(name)[1][1:] for name in names if not is_image_name(name)}
    return {suffix: column_type(suffix) for suffix in sorted(suffixes) if suffix}
