"""Comparison of a listing with the rows of a collection: new, changed, failed and vanished items."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clipkernels.collection.packages import pyarrow

if TYPE_CHECKING:
    import pyarrow as pa

Changed = Callable[[Any], Any]
"""From a table of items (id, source, place, size, modified, and the sha256 of their row) to those that changed."""
NEW, KNOWN, CHANGED, FAILED, RETRIED = range(5)


class Comparison(NamedTuple):
    """Positions in a listing, and ids that it does not list.

    appended: items without a row in a shard that are to be encoded, ascending.
    replacing: items with another content than their row, in the order of these rows.
    new, retried, failed, unchanged: number of items; the failed ones are not tried again.
    vanished: ids of the rows that are not listed, if they are asked for; `num_vanished` is their number anyway.
    """

    appended: np.ndarray
    replacing: np.ndarray
    new: int
    retried: int
    failed: int
    unchanged: int
    num_vanished: int
    vanished: list[Any]


def compare(
    listing: pa.Table,
    rows: Iterable[pa.Table],
    errors: pa.Table,
    *,
    retry: bool = False,
    keep_vanished: bool = True,
    changed: Changed | None = None,
) -> Comparison:
    """Compare a listing with the rows of the shards and the errors.

    Args:
        listing: items of `layout.listing_schema`.
        rows: columns id, size and modified of the shards, some rows at a time; with `changed`, also sha256.
        errors: the same columns of the errors.
        retry: errors are tried again; one whose file changed is tried again anyway.
        keep_vanished: do not collect the ids of vanished rows.
        changed: tells the items that changed from those that have a row; by default they have another size or time, as
            always those among the errors.
    Raises:
        ValueError: an id is there twice, in the listing or in the rows.
    """
    state = np.full(len(listing), NEW, np.int8)
    stamps = [listing["size"].to_numpy(), listing["modified"].to_numpy()]
    replacing: list[np.ndarray] = []
    vanished: list[Any] = []
    num_vanished = 0
    for table in chain(rows, [errors]):
        places, index, absent = _match(listing["id"], table["id"], state)
        if changed is None or table is errors:
            differs = _other_stamps(stamps, places, table, index)
        else:
            differs = _changed(changed, listing, places, table, index)
        if table is errors:
            state[places] = np.where(differs | retry, RETRIED, FAILED)
        else:
            state[places] = np.where(differs, CHANGED, KNOWN)
            order = np.argsort(index[differs])
            replacing.append(places[differs][order])
        num_vanished += len(absent)
        if not keep_vanished and len(absent):
            vanished.append(table["id"].take(pyarrow().array(absent)))
    counts = np.bincount(state, minlength=5)
    _refuse_duplicates(listing["id"], np.flatnonzero(state == NEW))
    return Comparison(
        np.flatnonzero((state == NEW) | (state == RETRIED)),
        np.concatenate([*replacing, np.zeros(0, np.int64)]).astype(np.int64),
        new=int(counts[NEW]),
        retried=int(counts[RETRIED]),
        failed=int(counts[FAILED]),
        unchanged=int(counts[KNOWN]),
        num_vanished=num_vanished,
        vanished=vanished,
    )


def _match(listed: Any, known: Any, state: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions in the listing with their index among the known ids, and the known ids that are not listed."""
    index = pyarrow().compute.index_in(listed, value_set=known).fill_null(-1).to_numpy()
    places = np.flatnonzero(index >= 0)
    index = index[places]
    present = np.zeros(len(known), bool)
    present[index] = True
    if present.sum() != len(index):
        raise ValueError(_listed_twice(listed, places))
    again = places[state[places] != NEW]
    if len(again):
        name = listed[int(again[0])].as_py()
        raise ValueError(f"expected each id once in a collection, got {name!r} in two of its files: delete one of them")
    return places, index, np.flatnonzero(~present)


def _listed_twice(listed: Any, places: np.ndarray) -> str:
    ids = listed.take(pyarrow().array(places))
    counts = ids.value_counts()
    name = counts.filter(pyarrow().compute.greater(counts.field("counts"), 1))[0]["values"].as_py()
    return f"expected ids that are listed once, got {name!r} twice"


def _refuse_duplicates(listed: Any, places: np.ndarray) -> None:
    ids = listed if len(places) == len(listed) else listed.take(pyarrow().array(places))
    if pyarrow().compute.count_distinct(ids).as_py() != len(places):
        raise ValueError(_listed_twice(listed, places))


def _other_stamps(stamps: list[np.ndarray], places: np.ndarray, table: Any, index: np.ndarray) -> np.ndarray:
    size, modified = (table[name].to_numpy()[index] for name in ("size", "modified"))
    return np.asarray((stamps[0][places] != size) | (stamps[1][places] != modified))


def _changed(changed: Changed, listing: Any, places: np.ndarray, table: Any, index: np.ndarray) -> np.ndarray:
    """True for the items that the caller reports as changed."""
    pa = pyarrow()
    items = listing.take(pa.array(places))
    items = items.append_column("sha256", table["sha256"].take(pa.array(index)))
    names = changed(items)["id"] if len(items) else items["id"]
    return np.asarray(pa.compute.is_in(items["id"], value_set=names).to_numpy())
