"""Changes of content: items are read again and compared by their SHA-256."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import TYPE_CHECKING

from clipkernels.collection.packages import pyarrow
from clipkernels.collection.sources.items import Source
from clipkernels.support.features import THREADS

if TYPE_CHECKING:
    import pyarrow as pa


def changed_content(sources: Sequence[Source], items: pa.Table) -> pa.Table:
    """The items whose content has another SHA-256 than their row, or cannot be read."""

    def differs(part: pa.RecordBatch) -> list[bool]:
        ids, places, digests = (part.column(name).to_pylist() for name in ("id", "place", "sha256"))
        changed = []
        for index, key, place, digest in zip(part.column("source").to_pylist(), ids, places, digests, strict=True):
            [item] = sources[index].fetch([key], [place], [])
            changed.append(isinstance(item, str) or sha256(item.content).hexdigest() != digest)
        return changed

    with ThreadPoolExecutor(THREADS) as pool:
        flags = [flag for part in pool.map(differs, items.to_batches(max_chunksize=64)) for flag in part]
    return items.filter(pyarrow().array(flags, pyarrow().bool_()))
