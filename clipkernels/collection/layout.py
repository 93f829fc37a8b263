"""The folder of an embedded collection: its files, and the columns of its tables.

manifest.json            the settings that every row is made with, and the sources
embeddings/00000.parquet finished shards: a row per item that has an embedding
errors/00000.parquet     a row per item that has none, with the reason
index/                   a search index that is made again when it is stale
plans/000000.parquet     the items of a generation, cut into units, until they are encoded
units/000000-00000.parquet  a finished unit, until a shard holds it
.lock                    the process that writes

A reader needs embeddings/ alone. A row enters it once, with the shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clipkernels.collection.packages import pyarrow

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "manifest.json"
EMBEDDINGS, ERRORS, INDEX, PLANS, UNITS = "embeddings", "errors", "index", "plans", "units"
SHARD_ROWS = 50_000
"""The rows from which on a shard is complete."""
OWN_COLUMNS = ("id", "embedding", "text", "text_embedding", "sha256", "width", "height", "size", "modified", "reason")
"""The columns that a source may not add."""


def listing_schema() -> pa.Schema:
    """The columns of a listing: an item's id, its source and place there, and its stamp.

    id: unique over all sources.
    source: index of the source.
    place: a number that the source finds the item by, such as a row or an offset.
    size, modified: bytes, and nanoseconds since 1970, of the file that holds the item. They change with its content.
    """
    pa = pyarrow()
    types = {"id": pa.string(), "source": pa.int16(), "place": pa.int64(), "size": pa.int64(), "modified": pa.int64()}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])


def unit_schema(width: int, dtype: str, texts: bool, columns: Mapping[str, Any]) -> pa.Schema:
    """The columns of a unit: those of the shards, and the reason why an item has no embedding, else null.

    Embeddings are never null: zeros stand for a missing one, beside a reason or beside a text that is null or empty.

    Args:
        width: E, the width of an embedding.
        dtype: "float32" or "float16", of the embeddings.
        texts: captions are embedded, too.
        columns: Arrow types of the source's columns that are kept.
    """
    pa = pyarrow()
    embedding = pa.list_(pa.float16() if dtype == "float16" else pa.float32(), width)
    types = {"id": pa.string(), "embedding": embedding}
    if texts:
        types |= {"text": pa.string(), "text_embedding": embedding}
    types |= {"sha256": pa.string(), "width": pa.int32(), "height": pa.int32(), "size": pa.int64()}
    types |= {"modified": pa.int64(), **columns, "reason": pa.string()}
    return pa.schema([pa.field(name, kind, nullable=name != "id") for name, kind in types.items()])


def shard_schema(unit: pa.Schema) -> pa.Schema:
    """The columns of a shard of embeddings, by those of its units."""
    pa = pyarrow()
    return pa.schema([field for field in unit if field.name != "reason"])


def error_schema() -> pa.Schema:
    """The columns of errors; the digest is null if the content could not be read."""
    pa = pyarrow()
    types = {"id": pa.string(), "reason": pa.string(), "sha256": pa.string()}
    types |= {"size": pa.int64(), "modified": pa.int64()}
    return pa.schema([pa.field(name, kind, nullable=name == "sha256") for name, kind in types.items()])
