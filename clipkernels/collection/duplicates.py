"""Duplicates in a collection: groups of images that are connected by a similarity of at least a threshold.

Rows with the SHA-256 and the embedding of an earlier row join it without being compared. Of the others each pair is
compared, in tiles of the matrix of similarities. A tile adds its pairs to a forest of rows, of which a component is a
group. Pairs that one component holds already are left out, so a tile never costs more memory than its own matrix.

The fp32 product of a tile decides about a pair unless that is close to the threshold. If any is, the tile is computed
again in fp64, so that groups do not depend on tiles, threads or rounding, and equal embeddings have similarity one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipkernels.arguments import check_callable, check_path, check_range
from clipkernels.collection.manifest import read_manifest
from clipkernels.collection.packages import pyarrow
from clipkernels.collection.rows import Shard, list_shards, normalised, open_shard, vector_batches, warn_of_unfinished
from clipkernels.files import atomic_write

if TYPE_CHECKING:
    import pyarrow as pa

DUPLICATES = "duplicates.parquet"
TILE_ROWS = 1024
FP32_ROUNDING = 5e-5
"""Above the rounding error of a cosine in fp32 at widths of up to 1,024."""
FP64_ROUNDING = 1e-12
Progress = Callable[[int, int], None]


class Duplicates(NamedTuple):
    """The duplicates of a collection.

    table: a row per image of a group: group (from 0, by first image), id, sha256 and similarity, the cosine with the
        first image of the group. Images are in the order of the collection.
    images: rows of the collection.
    exact: images whose content equals that of an earlier image.
    """

    table: pa.Table
    images: int
    exact: int

    @property
    def groups(self) -> int:
        """The number of groups."""
        last = self.table.column("group")[-1].as_py() if len(self.table) else -1
        return int(last) + 1

    @property
    def extra(self) -> int:
        """The number of images that are not the first of their group."""
        return len(self.table) - self.groups


def find_duplicates(
    folder: str | os.PathLike[str],
    threshold: float = 0.96,
    *,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Duplicates:
    """The groups of images that are connected by pairs with a cosine of at least a threshold, or with equal content.

    Two images of a group may be less similar than the threshold, if others connect them. The groups are written to
    duplicates.parquet in the folder. They depend on the rows and the threshold alone.

    Args:
        folder: the folder that `clipkernels embed` made.
        threshold: the lowest cosine of a pair; 1 joins equal embeddings.
        device: where tiles are computed, with the embeddings in fp32; None is the CPU.
        progress: called with the number of finished tiles and the number of all tiles.
    Raises:
        ValueError: no collection, a damaged one, one that is written at the same time, or a threshold outside -1 to 1.
        OSError: a shard cannot be read, or duplicates.parquet cannot be written.
        ImportError: pyarrow is not installed.
    """
    check_path(folder=folder)
    check_range("threshold", threshold, -1, 1)
    check_callable(progress=progress)
    folder, settings = Path(folder), read_manifest(folder).settings
    warn_of_unfinished(folder)
    shards = list_shards(folder)
    vectors = _read_vectors(folder, shards, settings.width)
    names = _read_names(folder, shards)
    if list_shards(folder) != shards:
        raise ValueError(f"expected a collection that nobody writes, got {folder}, which has changed: try again")
    earlier = _first_of_content(names)
    exact = earlier != np.arange(len(earlier))
    known = torch.from_numpy(exact.copy())
    for rows in torch.arange(len(vectors)).split(TILE_ROWS):
        known[rows] &= (vectors[rows] == vectors[torch.from_numpy(earlier)[rows]]).all(1)
    forest = Forest(len(vectors))
    forest.join(torch.from_numpy(earlier), torch.arange(len(vectors)))
    compared = (~known).nonzero()[:, 0]
    _join_similar(forest, vectors, compared, threshold, device, progress)
    table = _table(forest.roots(torch.arange(len(vectors))), vectors, names)
    table = table.replace_schema_metadata({"clipkernels.threshold": repr(float(threshold))})
    with atomic_write(folder / DUPLICATES) as temporary:
        pyarrow().parquet.write_table(table, temporary)
    return Duplicates(table, len(vectors), int(exact.sum()))


class Forest:
    """Disjoint sets of n items; the root of a set is its lowest item."""

    def __init__(self, n: int) -> None:
        self.parent = torch.arange(n)

    def roots(self, items: Tensor) -> Tensor:
        """The root of each item; the ways to the roots become shorter."""
        roots = self.parent[items]
        while not torch.equal(above := self.parent[roots], roots):
            roots = above
        self.parent[items] = roots
        return roots

    def join(self, first: Tensor, second: Tensor) -> None:
        """Join the sets of each pair, all pairs at once: roots are hung below the lowest root that a pair joins to."""
        while True:
            first, second = self.roots(first), self.roots(second)
            apart = first != second
            if not apart.any():
                return
            first, second = first[apart], second[apart]
            low, high = torch.minimum(first, second), torch.maximum(first, second)
            self.parent.scatter_reduce_(0, high, low, "amin")


def _read_vectors(folder: Path, shards: list[Shard], width: int) -> Tensor:
    """The embeddings (n,E) of a collection in fp32, of length one."""
    vectors, start = torch.empty(sum(shard.rows for shard in shards), width), 0
    for shard in shards:
        for batch in vector_batches(folder, shard, width):
            vectors[start : start + len(batch)] = torch.from_numpy(normalised(batch))
            start += len(batch)
    return vectors


def _read_names(folder: Path, shards: list[Shard]) -> pa.Table:
    """The ids and the digests of all rows."""
    pa = pyarrow()
    tables = [pa.table({"id": pa.array([], pa.string()), "sha256": pa.array([], pa.string())})]
    for shard in shards:
        with open_shard(folder, shard.name) as parquet:
            tables.append(parquet.read(columns=["id", "sha256"]).replace_schema_metadata(None).cast(tables[0].schema))
    return pa.concat_tables(tables)


def _first_of_content(names: pa.Table) -> np.ndarray:
    """The first row (n,) that has the digest of each row; a row without a digest is its own."""
    column = names.column("sha256").combine_chunks()
    rows = np.arange(len(column))
    codes = column.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    return np.where(codes < 0, rows, first[inverse.reshape(-1)])


def _join_similar(
    forest: Forest,
    vectors: Tensor,
    rows: Tensor,
    threshold: float,
    device: torch.device | str | None,
    progress: Progress | None,
) -> None:
    """Join those of the rows (m,) that have a cosine of at least the threshold, by the vectors (n,E) of all rows.

    Only the rows of a tile are copied, because the vectors may take half of the memory.
    """
    vectors = vectors.to(device or "cpu")
    parts = rows.split(TILE_ROWS) if len(rows) else ()
    done, total = 0, len(parts) * (len(parts) + 1) // 2
    for above, left_rows in enumerate(parts):
        left = vectors[left_rows.to(vectors.device)]
        for right_rows in parts[above:]:
            _join_tile(forest, left, left_rows, vectors[right_rows.to(vectors.device)], right_rows, threshold)
            done += 1
            if progress is not None:
                progress(done, total)


def _join_tile(
    forest: Forest, left: Tensor, left_rows: Tensor, right: Tensor, right_rows: Tensor, threshold: float
) -> None:
    """Join the rows of the pairs of one tile."""
    left_roots, right_roots = forest.roots(left_rows), forest.roots(right_rows)
    if bool((left_roots == left_roots[0]).all()) and bool((right_roots == left_roots[0]).all()):
        return  # one component
    cosines = left @ right.T
    if cosines.max() < threshold - FP32_ROUNDING:
        return
    apart = (left_roots[:, None] != right_roots[None]).to(cosines.device)
    similar = (cosines >= threshold - FP32_ROUNDING) & apart
    if (similar & (cosines < threshold + FP32_ROUNDING)).any():
        similar &= _cosines(left, right) >= threshold - FP64_ROUNDING
    first, second = similar.nonzero(as_tuple=True)
    forest.join(left_roots[first.cpu()], right_roots[second.cpu()])


def _cosines(left: Tensor, right: Tensor) -> Tensor:
    """The cosines (m,n) fp64 of vectors (m,E) and (n,E)."""
    left, right = left.double(), right.double()
    lengths = left.norm(dim=1)[:, None] * right.norm(dim=1)
    return left @ right.T / lengths.clamp_min(torch.finfo(torch.float64).tiny)


def _table(roots: Tensor, vectors: Tensor, names: pa.Table) -> pa.Table:
    """The rows of the groups with more than one image, by group."""
    pa = pyarrow()
    sizes = torch.bincount(roots, minlength=len(roots))
    members = (sizes[roots] > 1).nonzero()[:, 0] if len(roots) else roots
    members = members[roots[members].sort(stable=True).indices]
    firsts, groups = roots[members].unique_consecutive(return_inverse=True)
    similarity = torch.cat([_pair_cosines(vectors[a], vectors[b]) for a, b in _pairs(firsts[groups], members)])
    columns: dict[str, Any] = {"group": pa.array(groups.numpy(), pa.int64())}
    taken = names.take(pa.array(members.numpy()))
    columns |= {"id": taken.column("id"), "sha256": taken.column("sha256")}
    return pa.table(columns | {"similarity": pa.array(similarity.numpy(), pa.float32())})


def _pairs(first: Tensor, second: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(first.split(TILE_ROWS), second.split(TILE_ROWS), strict=True))


def _pair_cosines(left: Tensor, right: Tensor) -> Tensor:
    """The cosines (n,) of the rows of two matrices (n,E), computed in fp64."""
    left, right = left.double(), right.double()
    lengths = left.norm(dim=1) * right.norm(dim=1)
    return ((left * right).sum(1) / lengths.clamp_min(torch.finfo(torch.float64).tiny)).clamp(-1, 1).float()
