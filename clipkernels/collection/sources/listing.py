"""The sources that a collection is made of: found by name, listed in one table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from clipkernels.collection.layout import listing_schema
from clipkernels.collection.packages import pyarrow
from clipkernels.collection.sources.containers import PARQUET, TAR
from clipkernels.collection.sources.dataset import DatasetSource, is_dataset
from clipkernels.collection.sources.folder import FileSource, FolderSource, GlobSource, ListSource
from clipkernels.collection.sources.items import Answers, Item, Source
from clipkernels.collection.sources.parquet import ParquetSource
from clipkernels.collection.sources.tar import TarSource
from clipkernels.images import images_below, is_image_name, no_images, walk
from clipkernels.messages import list_names, printable

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Answers", "Item", "Listing", "Source", "find_sources", "list_items"]

LISTS = (".txt", ".lst")
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
MAX_SOURCES = 2**15 - 1


class Listing(NamedTuple):
    """The items of all sources.

    table: of `layout.listing_schema`, in the order of the sources.
    sources: the sources, which `source` in the table counts.
    notes: one line for each source that left something out.
    types: the types of the columns that were asked for.
    """

    table: pa.Table
    sources: list[Source]
    notes: list[str]
    types: dict[str, pa.DataType]


def find_sources(
    names: Sequence[str], *, image_column: str | None = None, id_column: str | None = None
) -> list[Source]:
    """The sources that names stand for.

    Args:
        names: folders of images, globs, image files, text files of paths (.txt, .lst), Parquet files, WebDataset tars,
            folders or globs of either, and Hugging Face datasets on disk.
        image_column: the column of images in Parquet files and datasets, or the suffix of images in tars.
        id_column: the column of ids in Parquet files and datasets.
    Raises:
        ValueError: no names; a name that matches nothing, or a file of no kind that is read; a column that no source
            can have.
        OSError: a folder cannot be read.
    """
    if not names or len(names) > MAX_SOURCES:
        raise ValueError(f"expected 1 to {MAX_SOURCES} sources, got {len(names)}: name a folder or a glob of them")
    sources = [_find_source(name, image_column, id_column) for name in names]
    tables = [source for source in sources if isinstance(source, ParquetSource | DatasetSource)]
    if id_column is not None and not tables:
        raise ValueError(
            f"expected Parquet files or datasets for id_column={list_names([id_column])}, got {list_names(names)}"
        )
    if image_column is not None and not tables and not any(isinstance(source, TarSource) for source in sources):
        expected = f"Parquet files, tars or datasets for image_column={list_names([image_column])}"
        raise ValueError(f"expected {expected}, got {list_names(names)}")
    return sources


def _find_source(name: str, image_column: str | None, id_column: str | None) -> Source:
    lower = name.lower()
    if os.path.isdir(name):
        if is_dataset(name):
            return DatasetSource(name, os.path.abspath(name), image_column, id_column)
        suffixes = _suffixes_below(name)
        if suffixes is None:
            return FolderSource(name, os.path.abspath(name))
    elif lower.endswith(COMPRESSED_TARS):
        raise _compressed(name)
    elif lower.endswith(PARQUET):
        suffixes = PARQUET
    elif lower.endswith(TAR):
        suffixes = TAR
    elif not os.path.lexists(name):
        if not any(letter in name for letter in "*?["):
            raise ValueError(f"expected a file, a folder or a glob, got {name!r}, which matches nothing")
        return GlobSource.of(name)
    elif lower.endswith(LISTS):
        return ListSource(name, os.path.abspath(name))
    else:
        folder, file = os.path.split(os.path.abspath(name))
        return FileSource(name, folder, file)
    if suffixes == TAR:
        return TarSource.of(name, image_column)
    return ParquetSource.of(name, image_column, id_column)


def _suffixes_below(folder: str) -> tuple[str, ...] | None:
    """The kind of containers below a folder, by their suffixes; None for a folder with images.

    Raises:
        ValueError: neither; Parquet files and tars; compressed tars.
    """
    kinds = set[tuple[str, ...]]()
    compressed = None
    for _, names in walk(folder):
        if any(map(is_image_name, names)):
            return None
        compressed = compressed or next((name for name in names if name.lower().endswith(COMPRESSED_TARS)), None)
        kinds |= {kind for kind in (PARQUET, TAR) if any(name.lower().endswith(kind) for name in names)}
    if compressed is not None:
        raise _compressed(compressed)
    if len(kinds) == 2:
        raise ValueError(f"expected images, Parquet files or tars, got {folder!r} with Parquet files and tars")
    if not kinds:
        raise no_images(folder, images_below(folder))
    return kinds.pop()


def _compressed(name: str) -> ValueError:
    return ValueError(f"expected an uncompressed tar, got {printable(name)}: decompress it, such as with gunzip")


def list_items(sources: Sequence[Source], columns: Sequence[str] = ()) -> Listing:
    """List the items of all sources.

    Args:
        sources: the sources.
        columns: the columns that will be asked for.
    Raises:
        ValueError: a source without items, or one that cannot be read; equal ids; a column that no source has, or that
            has different types in two.
        OSError: a file or a folder cannot be read.
    """
    pa, schema = pyarrow(), listing_schema()
    batches, hashes = [], []
    for index, source in enumerate(sources):
        for batch in source.list(columns):
            numbers = pa.array(np.full(len(batch), index, np.int16))
            batches.append(pa.RecordBatch.from_arrays([batch.column(0), numbers, *batch.columns[1:]], schema=schema))
            hashes.append(np.fromiter(map(hash, batch.column(0).to_pylist()), np.int64, len(batch)))
    table = pa.Table.from_batches(batches, schema)
    _check_unique(table, np.concatenate(hashes), sources)
    notes = [f"{printable(source.name)}: {source.note}" for source in sources if source.note]
    return Listing(table, list(sources), notes, _types(sources, columns))


def _check_unique(table: pa.Table, hashes: np.ndarray, sources: Sequence[Source]) -> None:
    """Check that no two items have one id, by the ids' hashes first; a table of a million ids takes 100 MB to compare.

    Raises:
        ValueError: two have.
    """
    ordered = np.sort(hashes)
    equal = ordered[1:][ordered[1:] == ordered[:-1]]
    known: dict[str, int] = {}
    for row in np.flatnonzero(np.isin(hashes, equal)).tolist():
        key, index = table.column("id")[row].as_py(), table.column("source")[row].as_py()
        if key in known:
            names = list(dict.fromkeys(repr(sources[number].name) for number in (known[key], index)))
            where = f"{names[0]} and {names[1]}" if len(names) == 2 else f"twice in {names[0]}"
            remedy = "name a folder above both, or a column of ids by id_column"
            raise ValueError(f"expected ids that differ, got {key!r} in {where}: {remedy}")
        known[key] = index


def _types(sources: Sequence[Source], columns: Sequence[str]) -> dict[str, pa.DataType]:
    """The types of columns.

    Raises:
        ValueError: a column that no source has, or that has different types in two.
    """
    if not columns:
        return {}
    every = [source.columns() for source in sources]
    available = set[str]().union(*every)
    if missing := [column for column in columns if column not in available]:
        names = list_names(available) or "which have none"
        raise ValueError(f"expected columns of the sources ({names}), got {list_names(missing)}")
    types: dict[str, pa.DataType] = {}
    for source, known in zip(sources, every, strict=True):
        for column in columns:
            kind = known.get(column)
            if kind is not None and types.setdefault(column, kind) != kind:
                expected = f"expected one type of the column {column!r} in all sources"
                raise ValueError(f"{expected}, got {types[column]}, and {kind} in {printable(source.name)}")
    return types
