"""Small collections whose rows follow from the ids and stamps of their items, and runs that embed them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipkernels.collection.layout import listing_schema, unit_schema
from clipkernels.collection.manifest import Manifest, Settings
from clipkernels.collection.store import Diff, Store
from clipkernels.collection.store.plans import read_items
from clipkernels.collection.store.units import write_unit

WIDTH = 4


def settings(**changes: Any) -> Settings:
    values: dict[str, Any] = {"library": "open_clip", "model": "ViT-B-32", "pretrained": None}
    values |= {"tower": {"float32": "ab" * 32}, "text_tower": None, "method": "host", "tokens": [5, 5]}
    values |= {"precision": "float32", "preprocess": "resize", "reader": "1", "width": WIDTH, "dtype": "float16"}
    values |= {"normalised": True, "text": None, "columns": {"label": "string"}}
    return Settings(**(values | changes))


DIGEST = settings().digest


def manifest(**changes: Any) -> Manifest:
    return Manifest(settings=settings(**changes), sources=["photos"], spec=None, run={"threads": 1})


def schema(dtype: str = "float16") -> pa.Schema:
    return unit_schema(WIDTH, dtype, False, {"label": pa.string()})


def listing(items: Mapping[str, int] | Sequence[str]) -> pa.Table:
    """Items by id, with their modification time; an item whose time is odd and whose id ends in "?" is an error."""
    stamps = items if isinstance(items, Mapping) else dict.fromkeys(items, 0)
    number = len(stamps)
    columns = [list(stamps), [0] * number, list(range(number)), [7] * number, list(stamps.values())]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, listing_schema().types, strict=True)]
    return pa.table(arrays, schema=listing_schema())


def is_error(name: str, modified: int) -> bool:
    return name.endswith("?") and modified % 2 == 1


def rows_of(items: pa.Table, dtype: str = "float16") -> pa.Table:
    """The rows of a unit; those of an item follow from its id and stamp."""
    rows = []
    for item in items.to_pylist():
        digest = sha256(f"{item['id']} {item['modified']}".encode()).digest()
        failed = is_error(item["id"], item["modified"])
        vector = (np.frombuffer(digest[: 2 * WIDTH], np.uint16) / 65536).astype(dtype)
        rows.append(
            {
                "id": item["id"],
                "embedding": vector * 0 if failed else vector,
                "sha256": digest.hex(),
                "width": None if failed else 3,
                "height": None if failed else 2,
                "size": item["size"],
                "modified": item["modified"],
                "label": f"label of {item['id']}" if digest[0] % 2 else None,
                "reason": f"broken at {item['modified']}" if failed else None,
            }
        )
    columns = {field.name: pa.array([row[field.name] for row in rows], field.type) for field in schema(dtype)}
    return pa.table(columns, schema=schema(dtype))


def open_store(folder: Path, **changes: Any) -> Store:
    options = {"unit_rows": 4, "shard_rows": 10, **changes}
    return Store(folder, manifest(), schema(), options["unit_rows"], shard_rows=options["shard_rows"])


def encode(folder: Path, diff: Diff, unit: int) -> None:
    assert diff.generation is not None
    write_unit(folder, DIGEST, diff.generation, unit, rows_of(read_items(folder, diff.generation, unit)))


def run(
    folder: Path, items: Mapping[str, int] | Sequence[str], seed: int = 0, *, unit_rows: int = 4, **options: Any
) -> list[Diff]:
    """Embed a listing to the end, its units in a random order; return the plans."""
    order, diffs = random.Random(seed), []
    with open_store(folder, unit_rows=unit_rows) as store:
        while (diff := store.plan(listing(items), **options)).generation is not None:
            diffs.append(diff)
            pending = store.pending()
            for unit in order.sample(pending, len(pending)):
                encode(folder, diff, unit)
                store.compact(final=False)
            store.compact(final=True)
        diffs.append(diff)
    return diffs


def tables(folder: Path) -> dict[str, bytes]:
    """The content of the shards and of the errors, and the names of all files that are there besides."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".lock"]
    kept = {"embeddings", "errors"}
    return {str(file.relative_to(folder)): file.read_bytes() if file.parent.name in kept else b"" for file in files}


def embedded(folder: Path) -> dict[str, int]:
    """The modification time of each embedded id; fails if an id is there twice."""
    return _stamps(folder / "embeddings")


def failed(folder: Path) -> dict[str, int]:
    """The modification time of each error; fails if an id is there twice."""
    return _stamps(folder / "errors")


def _stamps(folder: Path) -> dict[str, int]:
    pairs: list[tuple[str, int]] = []
    for file in sorted(folder.glob("*.parquet")):
        table = pq.read_table(file, columns=["id", "modified"], use_threads=False)
        pairs += zip(table["id"].to_pylist(), table["modified"].to_pylist(), strict=True)
    assert len(dict(pairs)) == len(pairs), "an id is there twice"
    return dict(pairs)


def expected(items: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """The items that are embedded and those that fail."""
    good = {name: time for name, time in items.items() if not is_error(name, time)}
    return good, {name: time for name, time in items.items() if name not in good}
