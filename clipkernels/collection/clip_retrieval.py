"""Finished shards in the layout of clip-retrieval, for its index, its back end and autofaiss.

img_emb/img_emb_0.npy        embeddings (n,E) of the first shard
text_emb/text_emb_0.npy      embeddings (n,E) of its captions, zeros where there is none
metadata/metadata_0.parquet  image_path (the id), caption, and the other columns

Rows are in the same order in the files of one number. Numbers have equally many digits, because readers sort names.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from clipkernels.arguments import check_path
from clipkernels.collection.manifest import Settings, read_manifest
from clipkernels.collection.packages import pyarrow
from clipkernels.collection.rows import BATCH_ROWS, Shard, list_shards, normalised, open_shard, vector_batches
from clipkernels.files import atomic_write

IMAGES, TEXTS, METADATA = "img_emb", "text_emb", "metadata"
SUFFIXES = {IMAGES: ".npy", TEXTS: ".npy", METADATA: ".parquet"}
RENAMED = {"id": "image_path", "text": "caption"}


def export_clip_retrieval(folder: str | os.PathLike[str], output: str | os.PathLike[str]) -> int:
    """Write the finished shards of a collection in clip-retrieval's layout; return the number of rows.

    Embeddings keep their dtype and have length one, as clip-retrieval's. Files of an earlier export are replaced or
    removed.

    Args:
        folder: the folder that `clipkernels embed` made.
        output: the folder to write; it may be the same.
    Raises:
        ValueError: no collection, a damaged one, one that is written at the same time, or an output with other files
            that a reader would take for a part of the export.
        OSError: a file cannot be read or written.
        ImportError: pyarrow is not installed.
    """
    check_path(folder=folder, output=output)
    folder, output = Path(folder), Path(output)
    settings = read_manifest(folder).settings
    shards = [shard for shard in list_shards(folder) if shard.rows]  # a reader skips an empty .npy, but not its rows
    parts = [IMAGES, METADATA] if settings.text is None else [IMAGES, TEXTS, METADATA]
    digits = len(str(len(shards)))
    names = {part: [f"{part}_{k:0{digits}}{SUFFIXES[part]}" for k in range(len(shards))] for part in parts}
    for part in SUFFIXES:
        _remove_stale(output / part, part, names.get(part, []))
    for part in parts:
        (output / part).mkdir(parents=True, exist_ok=True)
    for k, shard in enumerate(shards):
        _write_vectors(output / IMAGES / names[IMAGES][k], folder, shard, settings, "embedding")
        if settings.text is not None:
            _write_vectors(output / TEXTS / names[TEXTS][k], folder, shard, settings, "text_embedding")
        _write_metadata(output / METADATA / names[METADATA][k], folder, shard)
    if [shard for shard in list_shards(folder) if shard.rows] != shards:
        raise ValueError(f"expected a collection that nobody writes, got {folder}, which has changed: export it again")
    return sum(shard.rows for shard in shards)


def _remove_stale(below: Path, part: str, names: list[str]) -> None:
    """Remove the files of an earlier export; raise ValueError if there are others that readers would take."""
    suffix = SUFFIXES[part]
    stale = []
    for file in sorted(below.rglob(f"*{suffix}")):
        if file.parent != below or not re.fullmatch(rf"{part}_\d+{re.escape(suffix)}", file.name):
            raise ValueError(f"expected files of an export in {below}, got {file}: choose another folder")
        if file.name not in names:
            stale.append(file)
    for file in stale:
        file.unlink()


def _write_vectors(file: Path, folder: Path, shard: Shard, settings: Settings, column: str) -> None:
    """Write a column of embeddings as .npy, batch by batch."""
    dtype = np.dtype(settings.dtype).newbyteorder("<")
    header = {"descr": dtype.str, "fortran_order": False, "shape": (shard.rows, settings.width)}
    with atomic_write(file) as temporary, open(temporary, "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for vectors in vector_batches(folder, shard, settings.width, column, nulls=column == "text_embedding"):
            rows = vectors if settings.normalised else normalised(vectors)
            stream.write(rows.astype(dtype).tobytes())


def _write_metadata(file: Path, folder: Path, shard: Shard) -> None:
    """Write the columns of a shard but its embeddings, under clip-retrieval's names."""
    pa = pyarrow()
    with open_shard(folder, shard.name) as parquet:
        schema = parquet.schema_arrow
        dropped = {"embedding", "text_embedding", *(new for old, new in RENAMED.items() if old in schema.names)}
        names = [name for name in schema.names if name not in dropped]
        fields = [pa.field(RENAMED.get(name, name), schema.field(name).type) for name in names]
        with atomic_write(file) as temporary, pa.parquet.ParquetWriter(temporary, pa.schema(fields)) as writer:
            for batch in parquet.iter_batches(BATCH_ROWS, columns=names):
                columns = [batch.column(name) for name in names]
                writer.write_table(pa.Table.from_arrays(columns, schema=pa.schema(fields)))
