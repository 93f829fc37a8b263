"""Parquet files as a source: a row is an item, whose image is in a column of bytes, of paths or of structs of both."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from clipkernels.collection.packages import pyarrow
from clipkernels.collection.sources.containers import (
    CHANGED,
    PARQUET,
    containers_of,
    forget,
    names_at,
    place_of,
    row_of,
    stamped,
)
from clipkernels.collection.sources.image_columns import plain_types, read_cell
from clipkernels.collection.sources.items import Answers, Item, make_batch
from clipkernels.collection.sources.parquet_rows import ParquetRows
from clipkernels.messages import first_line, printable, reason_of

if TYPE_CHECKING:
    import pyarrow as pa

KIND = "a Parquet file"


@dataclass
class ParquetSource:
    """The rows of a Parquet file, or of the Parquet files below a folder or of a glob.

    An id is that of the column of ids, else the path of the image, else "file.parquet/row". Images in a Parquet file
    are stamped by that file; images that it names, by their own.
    """

    name: str
    files: dict[str, str]
    image_column: str | None = None
    id_column: str | None = None
    note: str | None = None

    @classmethod
    def of(cls, name: str, image_column: str | None, id_column: str | None) -> ParquetSource:
        """The source that a file, a folder or a glob names."""
        return cls(name, containers_of(name, PARQUET), image_column, id_column)

    def list(self, columns: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        """Yield the rows, file by file."""
        arrow = pyarrow()
        empty = True
        for name, path in self.files.items():
            rows, size, modified = self._open(name)
            try:
                for row, keys, paths in rows.listing():
                    empty = False
                    places = [place_of(name, row + index) for index in range(len(keys))]
                    stamps = [(size, modified)] * len(keys) if paths is None else rows.stamps(paths)
                    yield make_batch(keys, places, [size for size, _ in stamps], [time for _, time in stamps])
            except (arrow.ArrowException, OSError) as error:
                raise _unreadable(path, error) from error
        if empty:
            raise ValueError(f"expected rows, got none in {printable(self.name)}")

    def columns(self) -> dict[str, pa.DataType]:
        """The columns beside the images; a column of several files has the type that it has in the first."""
        types: dict[str, pa.DataType] = {}
        for name in self.files:
            rows = self._open(name)[0]
            types = {**plain_types(rows.schema, [rows.image.name]), **types}
        return types

    def fetch(self, ids: Sequence[str], places: Sequence[int], columns: Sequence[str]) -> Answers:
        """Read rows, in the order of the files."""
        answers: Answers = [CHANGED] * len(ids)
        broken: dict[tuple[str, int], str] = {}  # row groups
        for index in sorted(range(len(ids)), key=places.__getitem__):
            for name in names_at(places[index], self.files):
                answer = self._fetch_row(name, ids[index], row_of(places[index]), columns, broken)
                if answer is not None:
                    answers[index] = answer
        return answers

    def _fetch_row(
        self, name: str, key: str, row: int, columns: Sequence[str], broken: dict[tuple[str, int], str]
    ) -> Item | str | None:
        """An item, or the reason why it cannot be read; None if the row has another id."""
        path = self.files[name]
        try:
            rows, size, modified = self._open(name, tuple(columns))
        except Exception as error:
            return reason_of(error)
        if row >= len(rows):
            return None
        group = name, rows.group_of(row)
        if group in broken:
            return broken[group]
        try:
            actual, cell, values = rows.read(row)
        except Exception as error:
            forget(path)
            broken[group] = reason_of(error)
            return broken[group]
        if actual != key:
            return None
        item = read_cell(cell, rows.image, os.path.dirname(path), (size, modified))
        return item if isinstance(item, str) else item._replace(values={**dict.fromkeys(columns), **values})

    def _open(self, name: str, columns: Sequence[str] = ()) -> tuple[ParquetRows, int, int]:
        """An open file, its size and the time of its last change."""
        path = self.files[name]

        def make(stream: IO[bytes]) -> ParquetRows:
            try:
                return ParquetRows(stream, name, path, self.image_column, self.id_column, columns)
            except (pyarrow().ArrowException, OSError) as error:
                raise _unreadable(path, error) from error

        return stamped(path, KIND, make, (self.image_column, self.id_column, *columns))


def _unreadable(path: str, error: Exception) -> ValueError:
    return ValueError(f"expected {KIND}, got {printable(path)}, which cannot be read: {first_line(error)}")
