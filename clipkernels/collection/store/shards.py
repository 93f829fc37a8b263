"""Shards: the files of embeddings/, and the table of errors.

A shard ends with the first unit at which its rows reach `layout.SHARD_ROWS`; the last one stays open and is replaced by
itself and later units. Its header names the units whose rows were appended to it, so that none is appended twice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from clipkernels.collection.layout import EMBEDDINGS, ERRORS, error_schema, shard_schema
from clipkernels.collection.manifest import Settings, differences
from clipkernels.collection.packages import pyarrow
from clipkernels.collection.store.parquet_files import no_tensors, open_parquet, parquet_writer
from clipkernels.formats import Count, Format, Line

if TYPE_CHECKING:
    import pyarrow as pa

NAME = re.compile(r"(\d{5,})\.parquet")


class ShardHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings of a shard's rows, the last generation that wrote it, and (generation, first, last) of its units.

    notes: the notes of its units, such as threads, batch size and versions, each once.
    """

    settings: Settings
    generation: Count
    units: list[tuple[Count, Count, Count]]
    notes: list[dict[Line, Line]]


class ErrorHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings of the run, and the last generation that changed the errors."""

    settings: Settings
    generation: Count


FORMAT = Format("clipkernels.shard.1", "a shard of a collection", ShardHeader, no_tensors)
ERROR_FORMAT = Format("clipkernels.errors.1", "the errors of a collection", ErrorHeader, no_tensors)


class Shard(NamedTuple):
    """A shard's number, rows and header."""

    number: int
    rows: int
    header: ShardHeader


def shard_file(folder: str | os.PathLike[str], number: int) -> Path:
    """The file of a shard."""
    return Path(folder) / EMBEDDINGS / f"{number:05d}.parquet"


def error_file(folder: str | os.PathLike[str]) -> Path:
    """The file of the errors."""
    return Path(folder) / ERRORS / "00000.parquet"


def shard_numbers(folder: Path) -> list[int]:
    """The numbers of the shards, ascending."""
    matches = (NAME.fullmatch(name) for name in os.listdir(folder / EMBEDDINGS))
    return sorted(int(match[1]) for match in matches if match)


def read_shard(folder: Path, number: int, settings: Settings, unit_schema: pa.Schema) -> Shard:
    """A shard without its rows.

    Raises:
        ValueError: not as it was written, or of other settings or columns.
        OSError: the file cannot be read.
    """
    with open_parquet(shard_file(folder, number), FORMAT) as (header, file):
        if header.settings != settings:
            raise ValueError(f"other settings: {'; '.join(differences(settings, header.settings))}")
        if not file.schema_arrow.equals(shard_schema(unit_schema)):
            raise ValueError("other columns than the collection's")
        return Shard(number, file.metadata.num_rows, header)


def append_units(
    folder: Path,
    shard: Shard,
    unit_schema: pa.Schema,
    units: tuple[int, int, int],
    tables: Iterable[pa.Table],
    notes: Iterable[dict[str, str]],
) -> Shard:
    """Replace a shard by itself and the embeddings of further units, streaming; a shard of no units has no file yet.

    Args:
        folder, shard, unit_schema: the shard.
        units: generation, first and last of the units.
        tables, notes: their rows and their notes.
    Raises:
        ValueError: the shard is not as it was written.
        OSError: the file cannot be written.
    """
    schema = shard_schema(unit_schema)
    ranges = [*shard.header.units]
    if ranges and ranges[-1][0] == units[0] and ranges[-1][2] + 1 == units[1]:
        ranges[-1] = (units[0], ranges[-1][1], units[2])
    else:
        ranges.append(units)
    header = ShardHeader(shard.header.settings, units[0], ranges, _each_once(shard.header.notes, notes))
    path, rows = shard_file(folder, shard.number), 0
    with parquet_writer(path, schema, FORMAT, header) as writer:
        for table in _row_groups(path) if shard.header.units else ():
            rows += _write(writer, table)
        for table in tables:
            rows += _write(writer, table.filter(table["reason"].is_null()).drop_columns(["reason"]))
    return Shard(shard.number, rows, header)


def replace_rows(
    folder: Path,
    shard: Shard,
    unit_schema: pa.Schema,
    generation: int,
    ids: pa.ChunkedArray,
    apply: Callable[[pa.Table, np.ndarray], pa.Table],
    notes: Iterable[dict[str, str]],
) -> Shard:
    """Rewrite a shard with new rows in place of those of some ids; to do it again gives the same file.

    Args:
        folder, shard, unit_schema: the shard.
        generation: number of the generation that does it.
        ids: the ids whose rows change.
        apply: the new rows for a table of rows and the index of each among `ids`, -1 for a row that stays.
        notes: of the units of the new rows.
    Raises:
        ValueError: the shard is not as it was written.
        OSError: the file cannot be written.
    """
    pa, path = pyarrow(), shard_file(folder, shard.number)
    with open_parquet(path, FORMAT) as (_, file):
        present = file.read(columns=["id"], use_threads=False)["id"]
    index = pa.compute.index_in(present, value_set=ids).fill_null(-1).to_numpy()
    if not (index >= 0).any():
        return shard
    header = ShardHeader(shard.header.settings, generation, shard.header.units, _each_once(shard.header.notes, notes))
    start = rows = 0
    with parquet_writer(path, shard_schema(unit_schema), FORMAT, header) as writer:
        for table in _row_groups(path):
            part = index[start : start + len(table)]
            start += len(table)
            if (part >= 0).any():
                table = apply(table, part)
            rows += _write(writer, table)
    return Shard(shard.number, rows, header)


def _each_once(known: Iterable[dict[str, str]], added: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    notes: list[dict[str, str]] = []
    for note in (*known, *added):
        if note not in notes:
            notes.append(note)
    return notes


def _row_groups(path: Path) -> Iterator[pa.Table]:
    with open_parquet(path, FORMAT) as (_, file):
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, use_threads=False)


def _write(writer: Any, table: pa.Table) -> int:
    """Write a table as one row group, if it has rows; return their number."""
    if table.num_rows:
        writer.write_table(table.combine_chunks(), row_group_size=table.num_rows)
    return int(table.num_rows)


def read_errors(folder: Path) -> tuple[pa.Table, int]:
    """The table of errors, sorted by id, and the last generation that changed it.

    Raises:
        ValueError: the file is not as it was written.
        OSError: the file cannot be read.
    """
    if not os.path.lexists(error_file(folder)):
        return error_schema().empty_table(), 0
    with open_parquet(error_file(folder), ERROR_FORMAT) as (header, file):
        if not file.schema_arrow.equals(error_schema()):
            raise ValueError("other columns than those of errors")
        return file.read(use_threads=False).replace_schema_metadata(), header.generation


def merge_errors(
    folder: Path, settings: Settings, generation: int, ids: pa.ChunkedArray, table: pa.Table | None = None
) -> int:
    """Remove some ids from the errors and add rows of units that have a reason; return the number of errors.

    To do it again leaves the file as it is.

    Raises:
        ValueError: the file is not as it was written.
        OSError: the file cannot be written.
    """
    pa = pyarrow()
    before, _ = read_errors(folder)
    kept = before.filter(pa.compute.invert(pa.compute.is_in(before["id"], value_set=ids)))
    parts = [kept]
    if table is not None:
        failed = table.filter(table["reason"].is_valid()).select(error_schema().names)
        parts.append(failed.replace_schema_metadata().cast(error_schema()))
    after = pa.concat_tables(parts).combine_chunks().sort_by("id")
    if not after.equals(before):
        with parquet_writer(error_file(folder), error_schema(), ERROR_FORMAT, ErrorHeader(settings, generation)) as out:
            out.write_table(after, row_group_size=max(len(after), 1))
    return len(after)


def known_rows(folder: Path, numbers: Iterable[int], columns: list[str], rows: int) -> Iterator[pa.Table]:
    """Columns of the shards, a table for at least `rows` rows at a time, so that few are in memory.

    Raises:
        ValueError: a shard is not as it was written.
        OSError: a file cannot be read.
    """
    pa = pyarrow()
    parts: list[Any] = []
    for number in numbers:
        with open_parquet(shard_file(folder, number), FORMAT) as (_, file):
            parts.append(file.read(columns=columns, use_threads=False).replace_schema_metadata())
        if sum(map(len, parts)) >= rows:
            yield pa.concat_tables(parts)
            parts = []
    if parts:
        yield pa.concat_tables(parts)
