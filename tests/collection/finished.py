"""Finished collections, written file by file as `clipkernels embed` leaves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

import clipkernels as ck
from clipkernels.collection.layout import EMBEDDINGS, shard_schema, unit_schema
from clipkernels.collection.manifest import Manifest, Settings, write_manifest
from clipkernels.fingerprint import fingerprint

_BUNDLED: dict[str, Any] = {}


def bundled_fingerprints() -> tuple[dict[str, str], dict[str, str]]:
    """The fingerprints of the bundled model's towers."""
    if not _BUNDLED:
        model = ck.bundled()[0]
        _BUNDLED.update(image=fingerprint(model), text=fingerprint(model, "text"))
    return _BUNDLED["image"], _BUNDLED["text"]


def manifest_for(
    width: int, tower: nn.Module | None = None, sources: Sequence[str] = (), spec: str | None = None, **changes: Any
) -> Manifest:
    """A manifest of the bundled model, or of another one, with changes to its settings."""
    image, text = bundled_fingerprints()
    settings: dict[str, Any] = {
        **{"library": "clipkernels", "model": "bundled", "pretrained": None},
        **{"tower": image if tower is None else fingerprint(tower), "text_tower": None},
        **{"method": "host", "tokens": [65, 65], "precision": "float32", "preprocess": "", "reader": "1"},
        **{"width": width, "dtype": "float32", "normalised": True, "text": None, "columns": {}},
    }
    if changes.get("text") is not None and tower is None:
        settings["text_tower"] = text
    return Manifest(settings=Settings(**{**settings, **changes}), sources=list(sources), spec=spec, run={})


def write_shard(
    folder: Path,
    name: str,
    vectors: np.ndarray,
    ids: Sequence[str],
    contents: Sequence[bytes] | None = None,
    *,
    texts: Sequence[str | None] | None = None,
    text_vectors: Sequence[Any] | None = None,
    columns: Mapping[str, tuple[Any, Sequence[Any]]] | None = None,
    row_group_size: int = 7,
) -> Path:
    """Write one shard of vectors (n,E), in their dtype; the contents of the files determine the digests."""
    columns = columns or {}
    kinds = {key: kind for key, (kind, _) in columns.items()}
    width, dtype = vectors.shape[1], vectors.dtype.name
    schema = shard_schema(unit_schema(width, dtype, texts is not None, kinds))
    n = len(vectors)
    digests = [sha256(content).hexdigest() for content in contents or [id.encode() for id in ids]]
    data: dict[str, Any] = {"id": list(ids), "sha256": digests, "width": [32] * n, "height": [24] * n}
    data |= {"size": [1] * n, "modified": [0] * n, **{key: list(values) for key, (_, values) in columns.items()}}
    data["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
    if texts is not None:
        data |= {"text": list(texts), "text_embedding": list(text_vectors or [[0] * width] * n)}
    arrays = [
        data[field.name].cast(field.type)
        if isinstance(data[field.name], pa.Array)
        else pa.array(data[field.name], field.type)
        for field in schema
    ]
    (folder / EMBEDDINGS).mkdir(parents=True, exist_ok=True)
    file = folder / EMBEDDINGS / f"{name}.parquet"
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), file, row_group_size=row_group_size)
    return file


def write_collection(
    folder: Path, shards: Sequence[np.ndarray], manifest: Manifest | None = None, **options: Any
) -> Path:
    """Write shards of vectors and a manifest; the ids are 0.png, 1.png, …"""
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for number, vectors in enumerate(shards):
        write_shard(folder, f"{number:05}", vectors, [f"{start + row}.png" for row in range(len(vectors))], **options)
        start += len(vectors)
    write_manifest(folder, manifest or manifest_for(shards[0].shape[1] if shards else 8))
    return folder


def unit_vectors(n: int, width: int, seed: int = 0) -> np.ndarray:
    """Random vectors (n,E) fp32 of length one."""
    vectors = np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
