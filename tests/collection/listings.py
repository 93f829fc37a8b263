"""Sources of the tests: small images, and listings as plain lists."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from clipkernels.collection.sources import Answers, Listing, find_sources, list_items


def image_bytes(shade: int = 0, form: str = "PNG") -> bytes:
    """A small image of one shade of grey, as a file of a format."""
    stream = io.BytesIO()
    Image.new("L", (4, 4), shade).save(stream, form)
    return stream.getvalue()


def write_images(folder: Path, names: Iterable[str]) -> list[bytes]:
    """Write images, each of another shade, and return their bytes."""
    contents = []
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        contents.append(image_bytes(shade))
        (folder / name).write_bytes(contents[-1])
    return contents


def listing_of(*names: str | Path, columns: Sequence[str] = (), **options: Any) -> Listing:
    """The items of sources by name."""
    return list_items(find_sources([str(name) for name in names], **options), columns)


def ids_of(listing: Listing) -> list[str]:
    """The ids of a listing."""
    ids: list[str] = listing.table.column("id").to_pylist()
    return ids


def fetch_all(listing: Listing, columns: Sequence[str] = ()) -> dict[str, Any]:
    """The items of a listing, or the reasons why they cannot be read, by id."""
    answers: dict[str, Any] = {}
    for index, source in enumerate(listing.sources):
        rows = [row for row in listing.table.to_pylist() if row["source"] == index]
        items: Answers = source.fetch([row["id"] for row in rows], [row["place"] for row in rows], columns)
        answers |= {row["id"]: item for row, item in zip(rows, items, strict=True)}
    return answers


def contents_of(listing: Listing) -> list[Any]:
    """The contents of a listing's items in order, with the reason of one that cannot be read."""
    return [answer if isinstance(answer, str) else answer.content for answer in fetch_all(listing).values()]


def check_stamps(listing: Listing) -> None:
    """Check that items are fetched with the stamps that they are listed with, else each run finds them changed."""
    answers = fetch_all(listing)
    for row in listing.table.to_pylist():
        assert (answers[row["id"]].size, answers[row["id"]].modified) == (row["size"], row["modified"]), row
