"""Files that hold many items, such as Parquet files and tars: the files of a source, and places in them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from zlib import crc32

from clipkernels.collection.sources.folder import fixed_part
from clipkernels.images import find_images, walk

PARQUET = (".parquet", ".parq", ".pq")
TAR = (".tar",)
ROW_BITS = 31
CHANGED = "its container changed since it was listed"


def containers_of(name: str, suffixes: Sequence[str]) -> dict[str, str]:
    """The files with `suffixes` that a file, a folder or a glob names: paths by their names below it, sorted."""
    if os.path.isdir(name):
        root = os.path.abspath(name)
        paths = [os.path.join(path, file) for path, names in walk(root) for file in names]
    elif os.path.lexists(name):
        root, paths = os.path.dirname(os.path.abspath(name)), [os.path.abspath(name)]
    else:
        paths = list(map(os.path.abspath, find_images([name]).paths))
        root = os.path.abspath(fixed_part(name))
    paths = [path for path in paths if path.lower().endswith(tuple(suffixes))]
    return {os.path.relpath(path, root): path for path in sorted(paths)}


def place_of(name: str, row: int) -> int:
    """The place of a row in one of several containers. It does not change when others are added or removed."""
    return crc32(os.fsencode(name)) << ROW_BITS | row


def row_of(place: int) -> int:
    """The row of a place."""
    return place & ((1 << ROW_BITS) - 1)


def checksum_of(place: int) -> int:
    """The checksum of the name of a place's container."""
    return place >> ROW_BITS


def names_by_checksum(names: Iterable[str]) -> dict[int, tuple[str, ...]]:
    """The containers by the checksums of their names: one for each, unless two checksums are equal."""
    result: dict[int, tuple[str, ...]] = {}
    for name in names:
        checksum = checksum_of(place_of(name, 0))
        result[checksum] = (*result.get(checksum, ()), name)
    return result
