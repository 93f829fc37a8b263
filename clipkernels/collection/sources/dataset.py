"""Hugging Face datasets on disk as a source: folders that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` made."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from clipkernels.collection.open_files import stamped
from clipkernels.collection.sources.containers import CHANGED, checksum_of, place_of, row_of
from clipkernels.collection.sources.image_columns import (
    ImageColumn,
    check_id_column,
    find_image_column,
    ids_of,
    plain_types,
    read_cell,
    row_keys,
)
from clipkernels.collection.sources.items import BATCH_ROWS, Answers, Item, known_stamp, make_batch
from clipkernels.messages import first_line, printable, reason_of

if TYPE_CHECKING:
    import pyarrow as pa

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
READ_ROWS = 16
"""Rows that are read together."""


def is_dataset(folder: str) -> bool:
    """Return true for a folder that `save_to_disk` made."""

    def exists(name: str) -> bool:
        return os.path.exists(os.path.join(folder, name))

    return exists(SPLITS) or (exists(STATE) and exists(INFO))


class Split(NamedTuple):
    """A split of a dataset: its rows as Arrow tables, its column of images, and the stamp of its files."""

    rows: Any
    image: ImageColumn
    size: int
    modified: int


@dataclass
class DatasetSource:
    """The rows of a Hugging Face dataset on disk.

    An id is that of the column of ids, else "split/row"; a dataset without a split has the name of its folder. All
    rows of a split are stamped by its Arrow files.
    """

    name: str
    root: str
    image_column: str | None = None
    id_column: str | None = None
    note: str | None = None

    def list(self, columns: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        """Yield the rows, split by split."""
        empty = True
        for name, split in self._splits().items():
            for row in range(0, len(split.rows), BATCH_ROWS):
                empty = False
                count = min(BATCH_ROWS, len(split.rows) - row)
                places = [place_of(name, row + index) for index in range(count)]
                keys = row_keys(name, row, count)
                if self.id_column is not None:
                    view = split.rows.with_format("arrow", columns=[self.id_column])
                    keys = ids_of(view[row : row + count].column(self.id_column), self.id_column, self.name, row)
                yield make_batch(keys, places, [split.size] * count, [split.modified] * count)
        if empty:
            raise ValueError(f"expected rows, got none in {printable(self.name)}")

    def columns(self) -> dict[str, pa.DataType]:
        """The columns beside the images; a column of several splits has the type that it has in the first."""
        types: dict[str, pa.DataType] = {}
        for split in self._splits().values():
            types = {**plain_types(split.rows.features.arrow_schema, [split.image.name]), **types}
        return types

    def fetch(self, ids: Sequence[str], places: Sequence[int], columns: Sequence[str]) -> Answers:
        """Read rows, in the order of the splits."""
        try:
            splits = self._splits()
        except Exception as error:
            return [reason_of(error)] * len(ids)
        answers: Answers = [CHANGED] * len(ids)
        for name, split in splits.items():
            checksum = checksum_of(place_of(name, 0))
            at = [index for index, place in enumerate(places) if checksum_of(place) == checksum]
            at = sorted((index for index in at if row_of(places[index]) < len(split.rows)), key=places.__getitem__)
            for start in range(0, len(at), READ_ROWS):
                chunk = at[start : start + READ_ROWS]
                rows = [row_of(places[index]) for index in chunk]
                for index, (key, answer) in zip(chunk, self._read(name, split, rows, columns), strict=True):
                    if key in (ids[index], None):
                        answers[index] = answer
        return answers

    def _read(
        self, name: str, split: Split, rows: Sequence[int], columns: Sequence[str]
    ) -> Iterator[tuple[str | None, Item | str]]:
        """Rows with their ids; an id is None if the rows cannot be read."""
        names = [column for column in columns if column in split.rows.column_names]
        ids = [self.id_column] if self.id_column else []
        try:
            view = split.rows.with_format("arrow", columns=sorted({split.image.name, *names, *ids}))
            table = view[list(rows)]
            cells = {column: table.column(column).to_pylist() for column in {split.image.name, *names}}
            keys = [row_keys(name, row, 1)[0] for row in rows]
            if self.id_column:
                keys = ids_of(table.column(self.id_column), self.id_column, self.name, rows[0])
        except Exception as error:
            yield from [(None, reason_of(error))] * len(rows)
            return
        for index, key in enumerate(keys):
            item = read_cell(cells[split.image.name][index], split.image, self.root, (split.size, split.modified))
            values = {**dict.fromkeys(columns), **{column: cells[column][index] for column in names}}
            yield key, item if isinstance(item, str) else item._replace(values=values)

    def _splits(self) -> dict[str, Split]:
        """The splits by name, read again after the folder was written again.

        Raises:
            ValueError: the folder cannot be read; no column of images or ids.
        """
        head = next(name for name in (SPLITS, STATE) if name == STATE or os.path.exists(os.path.join(self.root, name)))
        key = (self.image_column, self.id_column)
        splits: dict[str, Split] = stamped(os.path.join(self.root, head), STATE, lambda stream: self._load(), key)[0]
        return splits

    def _load(self) -> dict[str, Split]:
        try:
            datasets = import_module("datasets")
        except ImportError as error:
            raise ImportError(f"expected datasets to be installed (pip install datasets), got: {error}") from error
        try:
            loaded = datasets.load_from_disk(self.root)
        except Exception as error:  # of many kinds, for a folder that is not whole
            raise ValueError(
                f"expected a dataset that save_to_disk wrote, got {printable(self.name)}: {first_line(error)}"
            ) from error
        if not isinstance(loaded, dict):
            loaded = {str(loaded.split or os.path.basename(self.root)): loaded}
        return {name: self._split(name, rows) for name, rows in loaded.items()}

    def _split(self, name: str, rows: Any) -> Split:
        where, schema = f"{self.name}, split {name}", rows.features.arrow_schema
        plain = rows.with_format("arrow")

        def first_text(column: str) -> str | None:
            batches = plain.select_columns([column]).iter(BATCH_ROWS)
            return next(
                (text for batch in batches for text in batch.column(column).to_pylist() if text is not None), None
            )

        if self.id_column is not None:
            check_id_column(where, schema, self.id_column)
        image = find_image_column(where, schema, self.image_column, first_text)
        stamps = [known_stamp(file["filename"]) for file in rows.cache_files]
        return Split(plain, image, sum(size for size, _ in stamps), max((time for _, time in stamps), default=0))
