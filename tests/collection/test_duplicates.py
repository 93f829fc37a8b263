"""Duplicates: groups against the connected components of all pairs, files with equal content, memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

import pyarrow.parquet as pq
import torch

from clipkernels.collection import duplicates as module
from clipkernels.collection.duplicates import DUPLICATES, Forest, find_duplicates
from tests.collection.finished import manifest_for, unit_vectors, write_collection, write_shard

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH = 16


def components(vectors: np.ndarray, contents: list[bytes], threshold: float) -> list[list[int]]:
    """The groups of more than one row, by a walk through all pairs in fp64."""
    rows = vectors.astype(np.float32).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    linked = rows @ rows.T >= threshold - 1e-7
    same = np.array([[a == b for b in contents] for a in contents])
    linked |= same
    groups, seen = [], set()
    for start in range(len(rows)):
        if start in seen:
            continue
        group, queue = {start}, [start]
        while queue:
            for other in linked[queue.pop()].nonzero()[0].tolist():
                if other not in group:
                    group.add(other)
                    queue.append(other)
        seen |= group
        if len(group) > 1:
            groups.append(sorted(group))
    return groups


def planted(n: int, seed: int) -> tuple[np.ndarray, list[bytes]]:
    """Vectors (n,E) fp32 with equal rows, near rows and chains at random places, and contents with copies."""
    draw = np.random.default_rng(seed)
    vectors = unit_vectors(n, WIDTH, seed)
    contents = [b"%d" % row for row in range(n)]
    for _ in range(n // 4):
        source, target = draw.integers(0, n, 2)
        near = vectors[source] + draw.choice([0, 0.02, 0.06]) * draw.standard_normal(WIDTH).astype(np.float32)
        vectors[target] = near / np.linalg.norm(near)
    for _ in range(n // 8):
        source, target = draw.integers(0, n, 2)
        contents[target] = contents[source]
        if draw.random() < 0.5:  # else equal content with another embedding, as another model version gives it
            vectors[target] = vectors[source]
    return vectors, contents


def groups_of(table: Any) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for record in table.to_pylist():
        groups.setdefault(record["group"], []).append(int(record["id"].removesuffix(".png")))
    return list(groups.values())


def write(folder: Path, vectors: np.ndarray, contents: list[bytes], bounds: list[int], **settings: Any) -> Path:
    write_collection(folder, [], manifest_for(vectors.shape[1], **settings))
    for number, (start, end) in enumerate(zip([0, *bounds], [*bounds, len(vectors)], strict=True)):
        names = [f"{row}.png" for row in range(start, end)]
        write_shard(folder, f"{number:05}", vectors[start:end], names, contents[start:end])
    return folder


@pytest.mark.parametrize("threshold", [0.8, 0.96, 1.0])
@pytest.mark.parametrize("tile", [7, 64, 200, 1024])
@pytest.mark.parametrize("seed", [0, 1])
def test_groups_are_the_components_of_all_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float, tile: int, seed: int
) -> None:
    monkeypatch.setattr(module, "TILE_ROWS", tile)
    vectors, contents = planted(200, seed)
    folder = write(tmp_path, vectors, contents, [50, 51, 120])
    duplicates = find_duplicates(folder, threshold)
    expected = components(vectors, contents, threshold)
    assert groups_of(duplicates.table) == expected and len(expected) > 10
    assert duplicates.groups == len(expected) and duplicates.images == 200
    assert duplicates.extra == sum(map(len, expected)) - len(expected)
    assert duplicates.exact == 200 - len(set(contents))
    for record in duplicates.table.to_pylist():
        rows = vectors.astype(np.float64)
        row, first = (int(name.removesuffix(".png")) for name in (record["id"], f"{expected[record['group']][0]}.png"))
        cosine = rows[row] @ rows[first] / np.linalg.norm(rows[row]) / np.linalg.norm(rows[first])
        assert record["similarity"] == pytest.approx(cosine, abs=1e-6)


def test_the_file_has_the_groups_and_is_deterministic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, contents = planted(150, 3)
    folder = write(tmp_path, vectors, contents, [70])
    table = find_duplicates(folder, 0.96).table
    file = folder / DUPLICATES
    assert pq.read_table(file).equals(table)
    assert table.column_names == ["group", "id", "sha256", "similarity"]
    assert pq.read_metadata(file).metadata[b"clipkernels.threshold"] == b"0.96"
    content = file.read_bytes()
    monkeypatch.setattr(module, "TILE_ROWS", 11)
    find_duplicates(folder, 0.96)
    assert file.read_bytes() == content
    assert {path.name for path in folder.iterdir()} == {"embeddings", "manifest.json", DUPLICATES}


def test_pairs_across_the_borders_of_tiles_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_ROWS", 8)
    vectors = unit_vectors(32, WIDTH)
    for source, target in ((7, 8), (15, 24), (0, 31)):
        vectors[target] = vectors[source]
    folder = write_collection(tmp_path, [vectors])
    assert groups_of(find_duplicates(folder, 0.99).table) == [[0, 31], [7, 8], [15, 24]]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_equal_rows_are_similar_at_the_threshold_one(tmp_path: Path, dtype: str) -> None:
    """In fp32 the cosine of a row with itself may be below one."""
    vectors = (unit_vectors(300, 96) * 3.7).astype(dtype)
    vectors[150:] = vectors[:150]
    nearly = vectors[0].astype(np.float32)
    nearly[0] += 0.02
    vectors[299] = nearly.astype(dtype)
    manifest = manifest_for(96, dtype=dtype, normalised=False)
    duplicates = find_duplicates(write_collection(tmp_path, [vectors], manifest), 1.0)
    assert groups_of(duplicates.table) == [[row, row + 150] for row in range(149)]
    assert duplicates.table.column("similarity").to_pylist() == [1.0] * 298


def test_a_chain_of_a_thousand_rows_is_one_group(tmp_path: Path) -> None:
    angles = np.random.default_rng(0).permutation(1000) * 0.001  # neighbours have the cosine 0.9999995
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    duplicates = find_duplicates(write_collection(tmp_path, [vectors]), 0.9999990)
    assert groups_of(duplicates.table) == [list(range(1000))]
    assert min(duplicates.table.column("similarity").to_pylist()) == pytest.approx(
        np.cos(np.abs(angles - angles[0]).max()), abs=1e-6
    )


def test_zero_rows_are_similar_to_nothing(tmp_path: Path) -> None:
    vectors = np.zeros((4, WIDTH), np.float32)
    folder = write(tmp_path, vectors, [b"a", b"b", b"a", b"c"], [])
    assert groups_of(find_duplicates(folder, 0.5).table) == [[0, 2]]


@pytest.mark.parametrize("rows", [0, 1])
def test_a_collection_without_pairs_has_no_groups(tmp_path: Path, rows: int) -> None:
    folder = write_collection(tmp_path, [unit_vectors(rows, WIDTH)])
    duplicates = find_duplicates(folder)
    assert (duplicates.groups, duplicates.extra, duplicates.images, duplicates.exact) == (0, 0, rows, 0)
    assert pq.read_table(folder / DUPLICATES).num_rows == 0


def test_rows_without_a_digest_are_compared_by_embedding(tmp_path: Path) -> None:
    import pyarrow as pa

    vectors = unit_vectors(4, WIDTH)
    vectors[3] = vectors[1]
    folder = write_collection(tmp_path, [vectors])
    file = folder / "embeddings" / "00000.parquet"
    table = pq.read_table(file)
    place = table.schema.get_field_index("sha256")
    pq.write_table(table.set_column(place, "sha256", pa.nulls(4, pa.string())), file)
    duplicates = find_duplicates(folder, 0.99)
    assert groups_of(duplicates.table) == [[1, 3]] and duplicates.exact == 0


def test_a_thousand_joins_in_one_call_are_those_of_a_walk() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(0, 2000, (2, 1500), generator=generator)
    forest = Forest(2000)
    forest.join(first, second)
    lowest = list(range(2000))
    for _ in range(2000):
        before = list(lowest)
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            lowest[a] = lowest[b] = min(lowest[a], lowest[b])
        if before == lowest:
            break
    assert forest.roots(torch.arange(2000)).tolist() == lowest


def test_twenty_thousand_equal_rows_take_little_memory(tmp_path: Path) -> None:
    """Their 200 million pairs would take gigabytes. Contents differ, so that none is set aside by its digest."""
    row = unit_vectors(1, WIDTH)
    folder = write_collection(tmp_path, [np.repeat(row, 20_000, 0)], row_group_size=5000)
    code = (
        "import resource, sys, torch; torch.set_num_threads(1);"
        "from clipkernels.collection.duplicates import find_duplicates;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024;"
        "import tests.collection.finished;"
        "find_duplicates(sys.argv[2]); before = peak();"
        "found = find_duplicates(sys.argv[1], 1.0);"
        "print(found.groups, found.extra, peak() - before)"
    )
    small = write_collection(tmp_path / "small", [unit_vectors(10, WIDTH)])
    command = [sys.executable, "-c", code, str(folder), str(small)]
    root = Path(__file__).parents[2]
    groups, extra, growth = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.split()
    assert (int(groups), int(extra)) == (1, 19_999)
    assert float(growth) < 150  # MiB


@pytest.mark.parametrize("threshold", [1.1, -2, float("nan")])
def test_thresholds_that_no_cosine_has_are_refused(tmp_path: Path, threshold: float) -> None:
    folder = write_collection(tmp_path, [unit_vectors(3, WIDTH)])
    with pytest.raises(ValueError, match="threshold must be"):
        find_duplicates(folder, threshold)
    assert not (folder / DUPLICATES).exists()


def test_progress_counts_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_ROWS", 10)
    calls: list[tuple[int, int]] = []
    find_duplicates(
        write_collection(tmp_path, [unit_vectors(35, WIDTH)]), progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(done, 10) for done in range(1, 11)]
