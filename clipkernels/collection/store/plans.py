"""Plans: the items of a generation, cut into units, and the ids that leave the collection.

A plan is written before its first item is encoded and deleted when shards and errors hold all of it. Rows lie in this
order, a row group per unit:

    appended   items without a row in a shard: new ones, and errors that are tried again
    replacing  items whose row in a shard gives way to a new one, in the order of these rows
    dropped    ids whose row is removed, with unit -1
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from clipkernels.collection.layout import PLANS, listing_schema
from clipkernels.collection.packages import pyarrow
from clipkernels.collection.store.parquet_files import no_tensors, open_parquet, parquet_writer
from clipkernels.formats import Count, Format, Line

if TYPE_CHECKING:
    import pyarrow as pa

NAME = re.compile(r"(\d{6,})\.parquet")
DROPPED = -1
"""The unit of an id that leaves the collection."""
DROPPED_ROWS = 1 << 16
"""Dropped ids in a row group."""


class PlanHeader(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The content of a plan in numbers.

    units, appended: number of units, and of those whose rows are appended to the shards; they come first.
    sources: names of the sources that the items' `source` counts.
    new, changed, retried, dropped: number of items and ids.
    retry: the errors that were known are tried again.
    """

    generation: Count
    units: Count
    appended: Count
    sources: list[Line]
    new: Count
    changed: Count
    retried: Count
    dropped: Count
    retry: bool


FORMAT = Format("clipkernels.plan.1", "a plan of a collection", PlanHeader, no_tensors)


def plan_file(folder: str | os.PathLike[str], generation: int) -> Path:
    """The file of a generation's plan."""
    return Path(folder) / PLANS / f"{generation:06d}.parquet"


def plan_generations(folder: Path) -> list[int]:
    """The generations that have a plan, ascending."""
    matches = (NAME.fullmatch(name) for name in os.listdir(folder / PLANS))
    return sorted(int(match[1]) for match in matches if match)


def write_plan(
    folder: Path, header: PlanHeader, units: Iterator[pa.Table], dropped: Sequence[pa.Array | pa.ChunkedArray]
) -> None:
    """Write a plan: the items of each unit, of `layout.listing_schema`, and the ids to drop.

    Raises:
        OSError: the file cannot be written.
    """
    pa = pyarrow()
    schema = listing_schema().append(pa.field("unit", pa.int32(), nullable=False))
    with parquet_writer(plan_file(folder, header.generation), schema, FORMAT, header) as writer:
        for unit, items in enumerate(units):
            column = pa.repeat(pa.scalar(unit, pa.int32()), items.num_rows)
            table = pa.table([*items.columns, column], schema=schema)
            writer.write_table(table, row_group_size=items.num_rows)
        for ids in dropped:
            for start in range(0, len(ids), DROPPED_ROWS):
                part = ids.slice(start, DROPPED_ROWS)
                zeros = [pa.repeat(pa.scalar(0, kind), len(part)) for kind in schema.types[1:-1]]
                column = pa.repeat(pa.scalar(DROPPED, pa.int32()), len(part))
                table = pa.table([part, *zeros, column], schema=schema)
                writer.write_table(table, row_group_size=len(part))


def read_plan(folder: Path, generation: int) -> PlanHeader:
    """The header of a plan.

    Raises:
        ValueError: no plan, or not as it was written.
        OSError: the file cannot be read.
    """
    with open_parquet(plan_file(folder, generation), FORMAT) as (header, file):
        _check(header, generation, file)
        assert isinstance(header, PlanHeader)
        return header


def read_items(folder: str | os.PathLike[str], generation: int, unit: int) -> pa.Table:
    """The items of a unit: id, source, place, size and modified of `layout.listing_schema`, in the order of its rows.

    Raises:
        ValueError: no such unit, or a plan that is not as it was written.
        OSError: the plan cannot be read.
    """
    with open_parquet(plan_file(folder, generation), FORMAT) as (header, file):
        _check(header, generation, file)
        if not 0 <= unit < header.units:
            raise ValueError(f"{header.units} units and no unit {unit}")
        table = file.read_row_group(unit, use_threads=False)
        if table["unit"].unique().to_pylist() != [unit]:
            raise ValueError(f"other units than {unit} in its row group")
        return table.drop_columns(["unit"])


def unit_lengths(folder: Path, generation: int) -> list[int]:
    """The number of items of each unit of a plan.

    Raises:
        ValueError, OSError: as `read_items`.
    """
    with open_parquet(plan_file(folder, generation), FORMAT) as (header, file):
        _check(header, generation, file)
        return [file.metadata.row_group(unit).num_rows for unit in range(header.units)]


def read_ids(folder: Path, generation: int, first: int, last: int | None) -> pa.Table:
    """The columns id and unit of the row groups from `first` until before `last`, or to the end.

    Raises:
        ValueError, OSError: as `read_items`.
    """
    with open_parquet(plan_file(folder, generation), FORMAT) as (_, file):
        groups = range(first, file.num_row_groups if last is None else last)
        return file.read_row_groups(list(groups), columns=["id", "unit"], use_threads=False)


def _check(header: Any, generation: int, file: Any) -> None:
    if header.generation != generation or file.num_row_groups < header.units:
        raise ValueError(f"{file.num_row_groups} row groups of generation {header.generation}")
