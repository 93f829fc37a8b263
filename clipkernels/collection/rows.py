"""Rows of finished shards, for readers of a whole collection: stamps, vectors batch by batch, columns of some rows."""

from __future__ import annotations

import os
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clipkernels.collection.layout import EMBEDDINGS, PLANS
from clipkernels.collection.packages import pyarrow
from clipkernels.files import naming, open_regular
from clipkernels.messages import first_line

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 2048
REMEDY = "delete it, then run clipkernels embed again"


class Shard(NamedTuple):
    """A finished shard: its name, its size in bytes, its time of change in ns since 1970, and its number of rows."""

    name: str
    size: int
    modified: int
    rows: int


def warn_of_unfinished(folder: Path) -> None:
    """Warn if a run has not ended, because readers of the shards do not see its units."""
    plans = folder / PLANS
    if plans.is_dir() and any(name.endswith(".parquet") for name in os.listdir(plans)):
        warnings.warn(
            f"a run of clipkernels embed has not ended in {folder}, and its last images are not in {EMBEDDINGS} yet: "
            "repeat its command to finish it",
            stacklevel=3,
        )


def list_shards(folder: Path) -> list[Shard]:
    """The finished shards of a collection, by name. Equal lists stand for equal rows.

    Raises:
        ValueError: a file that is no Parquet file.
        OSError: a file cannot be read.
    """
    below = folder / EMBEDDINGS
    names = sorted(os.listdir(below)) if below.is_dir() else []
    shards = []
    for name in names:
        if name.endswith(".parquet") and not name.startswith("."):
            with open_shard(folder, name) as parquet:
                status = os.stat(below / name)
                shards.append(Shard(name, status.st_size, status.st_mtime_ns, parquet.metadata.num_rows))
    return shards


@contextmanager
def open_shard(folder: Path, name: str) -> Iterator[Any]:
    """Open a shard as a pyarrow.parquet.ParquetFile; errors name the file.

    Raises:
        ValueError: no Parquet file, or a damaged one.
        OSError: the file cannot be read.
    """
    pa, file = pyarrow(), folder / EMBEDDINGS / name
    with naming(file):
        try:
            with open_regular(file) as stream, pa.parquet.ParquetFile(stream) as parquet:
                yield parquet
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"expected a shard of embeddings, got {file}: {first_line(error).rstrip('.')}: {REMEDY}"
            ) from error


def vector_batches(
    folder: Path, shard: Shard, width: int, column: str = "embedding", *, nulls: bool = False
) -> Iterator[np.ndarray]:
    """The vectors (n,E) of a shard in batches of rows, in the dtype of the file.

    Args:
        folder: the collection.
        shard: the shard.
        width: E.
        column: embedding or text_embedding.
        nulls: rows may be null; they become zeros.
    Raises:
        ValueError: another column, a null, values that are not finite, or other rows than those of the stamp.
        OSError: the file cannot be read.
    """
    pa, file, rows = pyarrow(), folder / EMBEDDINGS / shard.name, 0
    with open_shard(folder, shard.name) as parquet:
        schema = parquet.schema_arrow
        kind = schema.field(column).type if column in schema.names else None
        floats = (pa.list_(pa.float32(), width), pa.list_(pa.float16(), width))
        if kind not in floats:
            raise ValueError(f"expected {file} to hold {column}, {floats[0]} or {floats[1]}, got {kind}: {REMEDY}")
        for batch in parquet.iter_batches(BATCH_ROWS, columns=[column]):
            vectors, missing = _vectors(batch.column(0), width)
            if missing.any() and not nulls:
                raise ValueError(f"expected an {column} in each row of {file}, got none in row {_first(missing, rows)}")
            wrong = ~np.isfinite(vectors).all(1)
            if wrong.any():
                actual = f"an infinite value or NaN in row {_first(wrong, rows)}"
                raise ValueError(f"expected finite embeddings in {file}, got {actual}: {REMEDY}")
            rows += len(vectors)
            yield vectors
    if rows != shard.rows:
        raise ValueError(f"expected {shard.rows} rows in {file}, got {rows}: another process writes, try again")


def _first(mask: np.ndarray, offset: int) -> int:
    return int(mask.argmax()) + offset


def _vectors(column: pa.FixedSizeListArray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An Arrow column as vectors (n,E), with zeros for nulls, and a mask of the nulls."""
    values = column.values  # of all slots, those of nulls and those before an offset included
    dtype = np.dtype(values.type.to_pandas_dtype())
    start, count = values.offset + column.offset * width, len(column) * width
    if not count:
        return np.empty((0, width), dtype), np.zeros(0, bool)
    buffer = np.frombuffer(values.buffers()[1], dtype, count, start * dtype.itemsize)
    vectors, missing = buffer.reshape(-1, width), np.zeros(len(column), bool)
    if column.null_count or values.null_count:
        missing = ~column.is_valid().to_numpy(zero_copy_only=False)
        absent = ~values.slice(column.offset * width, count).is_valid().to_numpy(zero_copy_only=False)
        missing |= absent.reshape(-1, width).any(1)
        vectors = np.where(missing[:, None], dtype.type(0), vectors)
    return vectors, missing


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Vectors (n,E) in fp32, of length one; zeros stay zeros."""
    vectors = vectors.astype(np.float32)
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    return (vectors / np.where(lengths == 0, 1, lengths)[:, None]).astype(np.float32)


def take_rows(
    folder: Path, shards: Sequence[Shard], rows: Sequence[int], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """Columns of some rows, numbered over all shards, in the order of `rows`.

    Raises:
        ValueError, OSError: as `open_shard`.
    """
    starts = [0, *accumulate(shard.rows for shard in shards)]
    by_shard: dict[int, list[int]] = {}
    for row in sorted(set(rows)):
        by_shard.setdefault(bisect_right(starts, row) - 1, []).append(row)
    records: dict[int, Mapping[str, Any]] = {}
    for number, wanted in by_shard.items():
        with open_shard(folder, shards[number].name) as parquet:
            metadata = parquet.metadata
            groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            ends = [starts[number] + end for end in accumulate(groups)]
            by_group: dict[int, list[int]] = {}
            for row in wanted:
                by_group.setdefault(bisect_right(ends, row), []).append(row)
            for group, members in by_group.items():
                start = ends[group] - groups[group]
                table = parquet.read_row_group(group, columns=list(columns))
                taken = table.take([row - start for row in members]).to_pylist()
                records.update(zip(members, taken, strict=True))
    return [dict(records[row]) for row in rows]


def value_columns(folder: Path, shards: Sequence[Shard]) -> list[str]:
    """The columns of the shards but embeddings and stamps: captions, digests, sizes of images, and the source's."""
    if not shards:
        return []
    with open_shard(folder, shards[0].name) as parquet:
        names: list[str] = parquet.schema_arrow.names
    return [name for name in names if name not in ("id", "embedding", "text_embedding", "size", "modified")]
