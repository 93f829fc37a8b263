"""An open Parquet file: its ids, for a listing, and its rows one by one."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import IO, TYPE_CHECKING, Any

from clipkernels.collection.packages import pyarrow
from clipkernels.collection.sources.image_columns import (
    ImageColumn,
    check_id_column,
    find_image_column,
    ids_of,
    row_keys,
)
from clipkernels.collection.sources.items import BATCH_ROWS, known_stamp

if TYPE_CHECKING:
    import pyarrow as pa

READ_ROWS = 16
"""Rows that are decoded together, so that a row group of any size fits in memory."""


class ParquetRows:
    """The rows of an open Parquet file. Reading rows in order decodes each page once.

    stream: the open file.
    name, path: its name in the source, and its path.
    image_column, id_column: the columns of images and ids, if the user names them.
    columns: other columns that `read` returns, where the file has them.
    """

    def __init__(
        self,
        stream: IO[bytes],
        name: str,
        path: str,
        image_column: str | None,
        id_column: str | None,
        columns: Sequence[str] = (),
    ) -> None:
        parquet = pyarrow().parquet
        self.file = parquet.ParquetFile(stream, buffer_size=1 << 20, page_checksum_verification=True)
        self.name, self.path, self.id_column = name, path, id_column
        self.schema: pa.Schema = self.file.schema_arrow
        self.image: ImageColumn = find_image_column(path, self.schema, image_column, self._first_text)
        if id_column is not None:
            check_id_column(path, self.schema, id_column)
        self.columns = [column for column in columns if column in self.schema.names]
        metadata = self.file.metadata
        sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self.starts = list(accumulate(sizes, initial=0))
        self.batches: Iterator[pa.RecordBatch] = iter(())
        self.batch: pa.RecordBatch | None = None
        self.start = self.stop = 0  # the rows of the batch

    def __len__(self) -> int:
        return self.starts[-1]

    def group_of(self, row: int) -> int:
        """The row group of a row."""
        return bisect_right(self.starts, row) - 1

    def listing(self) -> Iterator[tuple[int, list[str], list[str | None] | None]]:
        """Yield the first row of a batch, the batch's ids and, if the images are outside of the file, their paths."""
        outside = self.image.form == "path"
        leaves = {
            leaf for leaf in (self.id_column or self.image.path_leaf, self.image.name if outside else None) if leaf
        }
        if not leaves:
            for row in range(0, len(self), BATCH_ROWS):
                yield row, row_keys(self.name, row, min(BATCH_ROWS, len(self) - row)), None
            return
        row = 0
        for batch in self.file.iter_batches(BATCH_ROWS, columns=sorted(leaves), use_threads=False):
            paths = self._paths(batch) if outside or self.id_column is None else None
            yield row, self._keys(batch, row, paths), paths if outside else None
            row += len(batch)

    def stamps(self, paths: Sequence[str | None]) -> list[tuple[int, int]]:
        """The stamps of the images that the file names."""
        folder = os.path.dirname(self.path)
        return [known_stamp(os.path.join(folder, path or "\0")) for path in paths]

    def read(self, row: int) -> tuple[str, Any, dict[str, Any]]:
        """The id, the image's cell and the other columns' values of a row."""
        batch, index = self._batch_of(row)
        one = batch.slice(index, 1)
        key = self._keys(one, row, self._paths(one) if self.image.path_leaf else None)[0]
        return (
            key,
            _column(one, self.image.name).to_pylist()[0],
            {name: _column(one, name).to_pylist()[0] for name in self.columns},
        )

    def _batch_of(self, row: int) -> tuple[pa.RecordBatch, int]:
        """The batch that holds a row, and its index there."""
        group = self.group_of(row)
        if self.batch is None or row < self.start or self.stop <= self.starts[group]:
            leaves = {*self.image.leaves, *self.columns, *([self.id_column] if self.id_column else [])}
            self.batches = self.file.iter_batches(
                READ_ROWS, row_groups=[group], columns=sorted(leaves), use_threads=False
            )
            self.start = self.stop = self.starts[group]
        while row >= self.stop:
            self.batch = next(self.batches)
            self.start, self.stop = self.stop, self.stop + len(self.batch)
        assert self.batch is not None
        return self.batch, row - self.start

    def _keys(self, batch: pa.RecordBatch, row: int, paths: Sequence[str | None] | None) -> list[str]:
        if self.id_column is not None:
            return ids_of(_column(batch, self.id_column), self.id_column, self.path, row)
        numbered = row_keys(self.name, row, len(batch))
        if paths is None:
            return numbered
        return [key if name is None else name for name, key in zip(paths, numbered, strict=True)]

    def _paths(self, batch: pa.RecordBatch) -> list[str | None]:
        if self.image.form == "path":
            return _column(batch, self.image.name).to_pylist()
        return pyarrow().compute.struct_field(_column(batch, self.image.name), "path").to_pylist()

    def _first_text(self, column: str) -> str | None:
        for batch in self.file.iter_batches(BATCH_ROWS, columns=[column], use_threads=False):
            for text in _column(batch, column).to_pylist():
                if text is not None:
                    return str(text)
        return None


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    return batch.column(batch.schema.get_field_index(name))
