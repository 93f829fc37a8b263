"""Preparation: the items of a batch as tensors, in loader processes.

A key (unit, start, stop) names a batch. Its content depends on the plan and on the files alone, so that an interrupted
run repeats it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clipkernels.collection.sources import Item, Source
from clipkernels.collection.store.plans import read_items
from clipkernels.images import Reader
from clipkernels.images.reader import preprocessed
from clipkernels.messages import reason_of

if TYPE_CHECKING:
    import pyarrow as pa

Key = tuple[int, int, int]
"""A unit, and the first and the last row of a batch, the last not included."""


class Prepared(NamedTuple):
    """A batch of items, in the order of the plan.

    key: its unit and rows.
    ids: of all items.
    images (n,3,S,S): of the items without a reason, or None if each has one.
    reasons: why an item has no image, or None.
    records: of each item, the columns sha256, width, height, size, modified and those that were asked for; null where
        they are unknown.
    """

    key: Key
    ids: list[str]
    images: Tensor | None
    reasons: list[str | None]
    records: list[dict[str, Any]]


class UnitItems(Dataset[Prepared]):
    """The batches of a generation's units, by key.

    Args:
        folder: the collection.
        generation: of the plan.
        sources: the sources, by their index in the plan.
        columns: the columns that are read with an item.
        preprocess: a callable from a PIL image to a tensor of `shape`.
        shape: (3,S,S).
        exif: turn an image as its EXIF orientation says.
    """

    def __init__(
        self,
        folder: Path,
        generation: int,
        sources: Sequence[Source],
        columns: Sequence[str],
        preprocess: Callable[[Image.Image], Tensor],
        shape: tuple[int, ...],
        exif: bool,
    ) -> None:
        self.folder, self.generation, self.sources, self.columns = folder, generation, sources, list(columns)
        self.preprocess, self.shape, self.reader = preprocess, shape, Reader(exif)
        self._unit: tuple[int, pa.Table] | None = None

    def __getitem__(self, key: Key) -> Prepared:
        unit, start, stop = key
        if self._unit is None or self._unit[0] != unit:
            self._unit = unit, read_items(self.folder, self.generation, unit)
        rows = self._unit[1].slice(start, stop - start)
        ids: list[str] = rows["id"].to_pylist()
        items = self._fetch(ids, rows["source"].to_pylist(), rows["place"].to_pylist())
        stamps = zip(rows["size"].to_pylist(), rows["modified"].to_pylist(), strict=True)
        images, reasons, records = [], [], []
        for item, (size, modified) in zip(items, stamps, strict=True):
            record: dict[str, Any] = {"size": size, "modified": modified}
            if isinstance(item, Item):
                record = {**item.values, "size": item.size, "modified": item.modified}
                image = self._image(item.content, record)
            else:
                image = item
            reasons.append(image if isinstance(image, str) else None)
            records.append(record)
            if isinstance(image, Tensor):
                images.append(image)
        return Prepared(key, ids, torch.stack(images) if images else None, reasons, records)

    def _fetch(self, ids: Sequence[str], sources: Sequence[int], places: Sequence[int]) -> list[Item | str]:
        """The content of items, or the reason why there is none; one call for each source."""
        items: list[Item | str] = [""] * len(ids)
        for index in dict.fromkeys(sources):
            rows = [row for row, source in enumerate(sources) if source == index]
            if index >= len(self.sources):
                fetched: Sequence[Item | str] = ["its source is not part of this run"] * len(rows)
            else:
                picked = [ids[row] for row in rows], [places[row] for row in rows]
                fetched = self.sources[index].fetch(*picked, self.columns)
            for row, item in zip(rows, fetched, strict=True):
                items[row] = item
        return items

    def _image(self, content: bytes, record: dict[str, Any]) -> Tensor | str:
        """The preprocessed image of a file's content, or the reason why there is none; adds to the item's record."""
        record["sha256"] = sha256(content).hexdigest()
        try:
            image = self.reader.decode(io.BytesIO(content))
        except Exception as error:
            return reason_of(error)
        record["width"], record["height"] = image.size
        return preprocessed(image, self.preprocess, self.shape)


def keys_of(units: Iterable[tuple[int, int]], batch_size: int) -> Iterator[Key]:
    """The keys of the batches of units, which are given with their number of rows."""
    for unit, rows in units:
        for start in range(0, rows, batch_size):
            yield unit, start, min(start + batch_size, rows)
