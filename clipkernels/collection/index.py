"""The search index of a collection: a flat FAISS index, kept in the folder and made again when it is stale.

index/index.json       the shards that the index was made of, the index's name by its digest
index/<digest>.faiss   IndexFlatIP of all embeddings in fp32, normalised, in the order of the shards

The JSON replaces the one before when the index is complete, so that of two processes that build at once the last one
counts. An index is used if its shards and its SHA-256 are those that the JSON names, and made again otherwise.
"""

from __future__ import annotations

import os
import warnings
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from torch import Tensor
from torch.nn.functional import normalize

from clipkernels.collection.layout import INDEX
from clipkernels.collection.packages import required
from clipkernels.collection.rows import Shard, normalised, vector_batches
from clipkernels.files import atomic_write, hash_of, sweep
from clipkernels.formats import Count, Digest, Format, Line, Size
from clipkernels.messages import reason_of
from clipkernels.state_files import read_json, write_json

JSON, SUFFIX = "index.json", ".faiss"
MAX_BYTES = 1 << 24
MANY_ROWS = 1_000_000
"""The rows above which a search says that it reads all of them."""
COSINE_ROUNDING = 1e-5
"""Above the rounding error of a cosine in fp32."""
Nanoseconds = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of index.json: shards as (name, size, modified, rows), the width of the index, and its SHA-256."""

    shards: list[tuple[Line, Count, Nanoseconds, Count]]
    width: Size
    index: Digest


FORMAT = Format("clipkernels.collection_index.1", "the description of a search index", Header, lambda header: {})


def nearest(folder: Path, shards: list[Shard], query: Tensor, k: int, width: int) -> tuple[list[int], list[float]]:
    """The k rows of a collection that are most similar to a query, and their cosines; ties go to the earlier row.

    Args:
        folder: the collection.
        shards: its shards.
        query: (E,), on the CPU.
        k: rows, at least one; fewer, if the collection has fewer.
        width: E.
    Raises:
        ValueError: a damaged shard.
        OSError: a shard cannot be read.
        ImportError: FAISS is not installed.
    """
    faiss = required("faiss", "embed")
    total = sum(shard.rows for shard in shards)
    if not total:
        return [], []
    if total > MANY_ROWS:
        warnings.warn(
            f"the search reads all {total} rows, because the index is flat: for an approximate index, export the "
            "collection with clipkernels embed --format clip-retrieval and build one with autofaiss",
            stacklevel=3,
        )
    index = _cached(faiss, folder, shards, width) or _build(faiss, folder, shards, width)
    query = normalize(query.float(), dim=0)
    k = min(k, total)
    wanted = min(total, 2 * k)
    while True:
        scores, found = index.search(query[None].numpy(), wanted)
        # If the last score is not clearly worse than the k-th, rows beyond it may tie.
        if wanted == total or scores[0, -1] < scores[0, k - 1] - COSINE_ROUNDING:
            break
        wanted = min(total, 4 * wanted)
    candidates = torch.from_numpy(found[0]).sort().values
    vectors = torch.from_numpy(index.reconstruct_batch(candidates.numpy()))
    cosines = torch.cat([part.double() @ query.double() for part in vectors.split(8192)]).float()
    best, order = cosines.sort(descending=True, stable=True)
    return candidates[order[:k]].tolist(), best[:k].tolist()


def _cached(faiss: Any, folder: Path, shards: list[Shard], width: int) -> Any | None:
    """The index in the folder, or None if it is not of these shards or not as it was written."""
    try:
        header: Header = read_json(folder / INDEX / JSON, FORMAT, MAX_BYTES)
        if header.shards != [tuple(shard) for shard in shards] or header.width != width:
            return None
        file = folder / INDEX / f"{header.index}{SUFFIX}"
        if hash_of(file) != header.index:  # before FAISS reads it, because a damaged file may crash it
            return None
        index = faiss.read_index(os.fspath(file))
    except (OSError, ValueError, RuntimeError):
        return None
    rows = sum(shard.rows for shard in shards)
    fits = isinstance(index, faiss.IndexFlat) and index.metric_type == faiss.METRIC_INNER_PRODUCT
    return index if fits and (index.ntotal, index.d) == (rows, width) else None


def _build(faiss: Any, folder: Path, shards: list[Shard], width: int) -> Any:
    """The index of shards; it is written to the folder if that can be written to."""
    index = faiss.IndexFlatIP(width)
    # A vector keeps its capacity when it shrinks; one that grows takes twice its size.
    index.codes.resize(sum(shard.rows for shard in shards) * index.code_size)
    index.codes.resize(0)
    for shard in shards:
        for vectors in vector_batches(folder, shard, width):
            index.add(normalised(vectors))
    try:
        _write(faiss, index, folder / INDEX, shards, width)
    except (OSError, RuntimeError) as error:  # FAISS raises RuntimeError
        reason = reason_of(error)
        warnings.warn(f"the index of {folder} is not kept, and is made again for each search: {reason}", stacklevel=4)
    return index


def _write(faiss: Any, index: Any, below: Path, shards: list[Shard], width: int) -> None:
    """Write an index under its digest, then the description that names it, then remove the indices before it."""
    digest = sha256()

    def update(content: bytes) -> int:
        digest.update(content)
        return len(content)

    faiss.write_index(index, faiss.PyCallbackIOWriter(update, 1 << 20))
    below.mkdir(exist_ok=True)
    sweep(below)
    file = below / f"{digest.hexdigest()}{SUFFIX}"
    with atomic_write(file) as temporary:
        faiss.write_index(index, temporary)
    header = Header(shards=[(*shard,) for shard in shards], width=width, index=digest.hexdigest())
    write_json(below / JSON, FORMAT, header, MAX_BYTES)
    for other in below.glob(f"*{SUFFIX}"):
        if other != file:
            other.unlink(missing_ok=True)
