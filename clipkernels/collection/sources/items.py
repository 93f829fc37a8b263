"""Items of a source: the protocol of sources, their listings, and names that are not UTF-8."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from clipkernels.collection.layout import listing_schema
from clipkernels.collection.packages import pyarrow
from clipkernels.files import stamp_of

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 10_000
"""Rows of a batch of a listing."""
UNKNOWN = -1
"""The size and time of a file that cannot be examined."""
NAMED_BY_ID, ESCAPED = 0, 1
"""Places of an item that its id finds: by the name that the id is, or by the name that it escapes."""


class Item(NamedTuple):
    """An item as it is fetched.

    content: the bytes of the image file.
    size, modified: the stamp, as in the listing.
    values: of the columns that were asked for; None where the item has none.
    """

    content: bytes
    size: int
    modified: int
    values: dict[str, Any]


Answers: TypeAlias = "list[Item | str]"
"""Items, or the reasons why they cannot be read, each in one line."""


class Source(Protocol):
    """A source of items. It can be pickled, and fetches in any process and thread.

    name: the source as the user named it.
    note: after `list`, one line that counts what was left out and says why.
    """

    @property
    def name(self) -> str:
        """The source as the user named it."""

    @property
    def note(self) -> str | None:
        """After `list`, one line that counts what was left out and says why; None if that was nothing."""

    def list(self, columns: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        """Yield the items in a fixed order, as batches of a listing without its column source.

        Args:
            columns: the columns that will be asked for; files that only hold these are not noted as left out.
        Raises:
            ValueError: no items; a container that cannot be read.
            OSError: a folder or a container cannot be opened.
        """

    def columns(self) -> dict[str, pa.DataType]:
        """The columns that can be asked for, with their types."""

    def fetch(self, ids: Sequence[str], places: Sequence[int], columns: Sequence[str]) -> Answers:
        """Read items; one that cannot be read is the reason, in one line."""


def make_batch(
    ids: Sequence[str] | pa.Array, places: Sequence[int], sizes: Sequence[int], modified: Sequence[int]
) -> pa.RecordBatch:
    """A batch of a listing, without the column source."""
    pa, schema = pyarrow(), listing_schema()
    schema = schema.remove(schema.get_field_index("source"))
    columns = [ids, places, sizes, modified]
    return pa.RecordBatch.from_arrays(
        [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)], schema=schema
    )


def batches_of_files(root: str, names: Iterable[str]) -> Iterator[pa.RecordBatch]:
    """Batches of a listing of files, whose ids are their `names`, relative to `root`."""
    names = iter(names)
    while chunk := list(islice(names, BATCH_ROWS)):
        stamps = [known_stamp(os.path.join(root, name)) for name in chunk]
        ids, places = list(map(escape, chunk)), [NAMED_BY_ID] * len(chunk)
        if ids != chunk:
            places = [NAMED_BY_ID if name == key else ESCAPED for name, key in zip(chunk, ids, strict=True)]
        yield make_batch(ids, places, [size for size, _ in stamps], [time for _, time in stamps])


def known_stamp(path: str) -> tuple[int, int]:
    """The stamp of a file, or UNKNOWN for both numbers."""
    try:
        return stamp_of(path)
    except (OSError, ValueError):  # no such file; a name that no file can have
        return UNKNOWN, UNKNOWN


def escape(name: str) -> str:
    """A file's name as an id. Bytes that are not UTF-8 become \\xNN; in such a name backslashes are doubled."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name).replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    return name


def name_of(key: str, place: int) -> str:
    """The name of the file that an id was made of."""
    if place == NAMED_BY_ID:
        return key
    pattern = rb"\\(?:\\|x([0-9a-f]{2}))"
    raw = re.sub(pattern, lambda match: bytes.fromhex(match[1].decode()) if match[1] else b"\\", key.encode())
    return os.fsdecode(raw)
