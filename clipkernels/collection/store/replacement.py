"""New rows of items that have a row in a shard, from their units, and the ids that are dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from clipkernels.collection.packages import pyarrow
from clipkernels.collection.store.plans import DROPPED

if TYPE_CHECKING:
    import pyarrow as pa


class Replacement:
    """The rows that replace those of some ids.

    Args:
        plan: columns id and unit of the replacing units, in order, then of the dropped ids.
        read_unit: reads the rows of a unit.
    """

    def __init__(self, plan: pa.Table, read_unit: Callable[[int], pa.Table]) -> None:
        self.ids: pa.ChunkedArray = plan["id"]
        self.units = plan["unit"].to_numpy()
        self.read_unit = read_unit
        starts = np.flatnonzero(np.diff(self.units, prepend=DROPPED - 1))
        self.starts = dict(zip(self.units[starts].tolist(), starts.tolist(), strict=True))
        self._unit = DROPPED
        self._table: pa.Table | None = None

    def apply(self, table: pa.Table, index: np.ndarray) -> pa.Table:
        """Rows of a shard with new ones in place of some; those of dropped ids and of new errors are removed.

        Units follow the order of the rows in the shards, so each is read about once.

        Args:
            table: rows of a shard.
            index: of each row among `ids`; -1 for a row that stays.
        """
        pa = pyarrow()
        order, parts = np.where(index < 0, np.arange(len(table)), -1), [table]
        units = np.where(index < 0, DROPPED, self.units[index])
        rows = len(table)
        for unit in dict.fromkeys(units[units != DROPPED].tolist()):
            places = np.flatnonzero(units == unit)
            rows_of_unit = self._rows(unit).take(pa.array(index[places] - self.starts[unit]))
            failed = rows_of_unit["reason"].is_valid().to_numpy()
            parts.append(rows_of_unit.drop_columns(["reason"]))
            order[places] = np.where(failed, -1, rows + np.arange(len(places)))
            rows += len(places)
        return pa.concat_tables(parts).combine_chunks().take(pa.array(order[order >= 0]))

    def _rows(self, unit: int) -> pa.Table:
        if self._table is None or self._unit != unit:
            self._unit, self._table = unit, self.read_unit(unit)
        return self._table

    def errors(self, units: Iterable[int]) -> pa.Table | None:
        """The rows without an embedding of the replacing units."""
        tables = (self._rows(unit) for unit in units)
        failed = [table.filter(table["reason"].is_valid()) for table in tables]
        return pyarrow().concat_tables(failed) if failed else None
