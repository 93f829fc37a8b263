"""Units: the rows of consecutive items of a plan, encoded and written as one file by any process."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from clipkernels.collection.layout import UNITS
from clipkernels.collection.packages import pyarrow
from clipkernels.collection.store.parquet_files import no_tensors, open_parquet, parquet_writer, read_header
from clipkernels.formats import Count, Digest, Format, Line

if TYPE_CHECKING:
    import pyarrow as pa

NAME = re.compile(r"(\d{6,})-(\d{5,})\.parquet")


class UnitHeader(msgspec.Struct, forbid_unknown_fields=True):
    """The place of a unit, the rows in it with and without an embedding, and notes such as the threads.

    settings: the digest of the settings that the rows are made with.
    """

    settings: Digest
    generation: Count
    unit: Count
    embeddings: Count
    errors: Count
    notes: dict[Line, Line]


FORMAT = Format("clipkernels.unit.1", "a unit of a collection", UnitHeader, no_tensors)


def unit_file(folder: str | os.PathLike[str], generation: int, unit: int) -> Path:
    """The file of a unit."""
    return Path(folder) / UNITS / f"{generation:06d}-{unit:05d}.parquet"


def write_unit(
    folder: str | os.PathLike[str],
    settings: str,
    generation: int,
    unit: int,
    table: pa.Table,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write a finished unit, atomically. Equal rows give equal files; any process may call it.

    Args:
        folder: the collection.
        settings: `Settings.digest` of the rows.
        generation, unit: the place of the unit.
        table: a row of `layout.unit_schema` for each item, in the order of `read_items`.
        notes: kept in the file's metadata, until a shard holds the unit.
    Raises:
        ValueError: a row with both an embedding and a reason, or with neither; zeros are no embedding.
        OSError: the file cannot be written.
    """
    compute = pyarrow().compute
    failed, vectors = table["reason"].is_valid(), table["embedding"].combine_chunks()
    values = vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, vectors.type.list_size)
    if vectors.null_count or (values.any(1) == failed.to_numpy()).any():
        raise ValueError("expected an embedding or a reason in each row of a unit, got a row with both or neither")
    errors = compute.sum(failed).as_py() or 0
    header = UnitHeader(settings, generation, unit, table.num_rows - errors, errors, dict(notes or {}))
    with parquet_writer(unit_file(folder, generation, unit), table.schema, FORMAT, header, sync=False) as writer:
        writer.write_table(table, row_group_size=max(table.num_rows, 1))


def read_unit(
    folder: Path, settings: str, generation: int, unit: int, schema: pa.Schema, ids: pa.ChunkedArray
) -> pa.Table:
    """The rows of a finished unit, which must be those of the plan.

    Raises:
        ValueError: the unit is not as it was written, or holds other columns or items, or rows of other settings.
        OSError: the file cannot be read.
    """
    with open_parquet(unit_file(folder, generation, unit), FORMAT) as (header, file):
        if (header.generation, header.unit) != (generation, unit):
            raise ValueError(f"unit {header.unit} of generation {header.generation}")
        if header.settings != settings:
            raise ValueError("other settings than the collection's")
        if not file.schema_arrow.equals(schema):
            raise ValueError("other columns than the collection's")
        table = file.read(use_threads=False)
        if not table["id"].equals(ids):
            raise ValueError("other items than the plan's")
        return table


def read_unit_header(folder: Path, generation: int, unit: int) -> UnitHeader:
    """The header of a finished unit.

    Raises:
        ValueError, OSError: as `read_unit`.
    """
    header, _ = read_header(unit_file(folder, generation, unit), FORMAT)
    assert isinstance(header, UnitHeader)
    return header


def finished_units(folder: Path) -> set[tuple[int, int]]:
    """The generation and number of every unit that has a file."""
    matches = (NAME.fullmatch(name) for name in os.listdir(folder / UNITS))
    return {(int(match[1]), int(match[2])) for match in matches if match}
