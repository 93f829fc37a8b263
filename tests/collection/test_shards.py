"""The shards of a collection: their metadata, readers without code of ours, columns of sources, memory and time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow")

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from clipkernels.collection.layout import unit_schema
from clipkernels.collection.store import Store
from clipkernels.collection.store.units import write_unit
from tests.collection.collections import embedded, listing, manifest, rows_of, run, schema, settings

NAMES = [f"{index:02d}.jpg" for index in range(23)]


def embed(folder: Path, dtype: str) -> np.ndarray:
    """Embed a listing with an error and a temporary file beside the shards; return the embeddings."""
    with Store(folder, manifest(dtype=dtype), schema(dtype), 8, shard_rows=16) as store:
        items = listing({**dict.fromkeys(NAMES, 0), "z?": 1})
        diff = store.plan(items)
        assert diff.generation is not None
        for unit in store.pending():
            write_unit(folder, settings(dtype=dtype).digest, diff.generation, unit, rows_of(store.items(unit), dtype))
        store.compact(final=True)
    (folder / "embeddings" / ".00001.parquet.abcd1234").write_bytes(b"PAR1 half")
    return np.stack(rows_of(items.slice(0, 23), dtype)["embedding"].to_pylist()).astype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_pandas_reads_the_folder(tmp_path: Path, dtype: str) -> None:
    pandas = pytest.importorskip("pandas")
    values = embed(tmp_path, dtype)
    frame = pandas.read_parquet(tmp_path / "embeddings")
    assert frame["id"].tolist() == NAMES
    rows = np.stack(frame["embedding"].tolist())
    assert rows.dtype == dtype and np.array_equal(rows, values)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("pattern", ["embeddings/*.parquet", "**/embeddings/*.parquet"])
def test_duckdb_reads_the_folder(tmp_path: Path, dtype: str, pattern: str) -> None:
    duckdb = pytest.importorskip("duckdb")
    values = embed(tmp_path, dtype)
    query = f"select id, embedding from read_parquet('{tmp_path}/{pattern}') order by id"
    rows = duckdb.connect().execute(query).fetchall()
    assert [name for name, _ in rows] == NAMES
    assert np.array_equal(np.array([vector for _, vector in rows], dtype), values)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("by", ["folder", "pattern"])
def test_datasets_reads_the_folder(tmp_path: Path, dtype: str, by: str) -> None:
    datasets = pytest.importorskip("datasets")
    values = embed(tmp_path / "collection", dtype)
    folder = str(tmp_path / "collection" / "embeddings")
    where: dict[str, Any] = {"data_dir": folder} if by == "folder" else {"data_files": f"{folder}/*.parquet"}
    rows = datasets.load_dataset("parquet", **where, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["id"][:] == NAMES
    assert np.array_equal(np.array(rows["embedding"][:], dtype), values)


def test_a_shard_names_its_settings_and_units(tmp_path: Path) -> None:
    embed(tmp_path, "float16")
    header = json.loads(pq.read_metadata(tmp_path / "embeddings" / "00000.parquet").metadata[b"clipkernels"])
    assert header["format"] == "clipkernels.shard.1" and header["units"] == [[1, 0, 1]]
    assert header["settings"] == msgspec.to_builtins(settings())


def test_null_and_nested_columns_keep_their_values(tmp_path: Path) -> None:
    kinds = {"tags": pa.list_(pa.string()), "box": pa.struct({"x": pa.float64(), "n": pa.int8()}), "raw": pa.binary()}
    kinds |= {"when": pa.timestamp("us"), "kind": pa.dictionary(pa.int32(), pa.string())}
    columns = unit_schema(4, "float32", True, kinds)
    items = listing(NAMES[:12])
    values: dict[str, list[Any]] = {"id": NAMES[:12], "embedding": [[i, 0, 0, 1] for i in range(12)]}
    values |= {"text": [None, "a"] * 6, "text_embedding": [[0] * 4, [0, 1, 2, 3]] * 6, "sha256": ["0" * 64] * 12}
    values |= {"width": [1] * 12, "height": [1] * 12, "size": [7] * 12, "modified": [0] * 12, "reason": [None] * 12}
    values |= {"tags": [None, [], ["x", None]] * 4, "box": [{"x": 0.5, "n": None}, None] * 6, "raw": [b"\0", None] * 6}
    values |= {"when": [None, 5, 6] * 4, "kind": ["b", None, "a"] * 4}
    table = pa.table({field.name: pa.array(values[field.name], field.type) for field in columns}, schema=columns)
    for folder, steps in ((tmp_path / "a", ((0, 1, 2),)), (tmp_path / "b", ((1, 0), (2,)))):
        for step in steps:
            with Store(folder, manifest(dtype="float32"), columns, 4, shard_rows=100) as store:
                store.plan(items)
                for unit in step:
                    write_unit(folder, settings(dtype="float32").digest, 1, unit, table.slice(4 * unit, 4))
                store.compact(final=True)
    contents = [(tmp_path / name / "embeddings" / "00000.parquet").read_bytes() for name in ("a", "b")]
    assert contents[0] == contents[1]
    read = pq.read_table(tmp_path / "a" / "embeddings" / "00000.parquet")
    assert read.to_pylist() == table.drop_columns(["reason"]).to_pylist()
    changed = table.slice(1, 2)
    with Store(tmp_path / "a", manifest(dtype="float32"), columns, 4, shard_rows=100) as store:
        store.plan(listing({**dict.fromkeys(NAMES[:12], 0), NAMES[1]: 1, NAMES[2]: 1}))
        changed = changed.set_column(0, columns.field("id"), pa.array(NAMES[1:3]))
        write_unit(tmp_path / "a", settings(dtype="float32").digest, 2, 0, changed)
        store.compact(final=True)
    assert pq.read_table(tmp_path / "a" / "embeddings" / "00000.parquet").to_pylist() == read.to_pylist()


def test_replacing_reads_each_unit_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = {f"{index:03d}": 0 for index in range(200)}
    run(tmp_path, items)
    reads = []
    from clipkernels.collection.store import units

    read_unit = units.read_unit
    monkeypatch.setattr(units, "read_unit", lambda *arguments: (reads.append(arguments[3]), read_unit(*arguments))[1])
    later = {name: int(name) % 3 for name in reversed(items)}
    run(tmp_path, later)
    assert embedded(tmp_path) == later and [*embedded(tmp_path)] == [*items]
    number = len(set(reads))
    assert number == 34 and len(reads) <= 3 * number


SCALE = """
import os, resource, sys, time
from pathlib import Path
import numpy as np, pyarrow as pa
from clipkernels.collection.layout import listing_schema, shard_schema
from clipkernels.collection.store import shards
from clipkernels.collection.store.parquet_files import parquet_writer
from tests.collection.collections import *
folder, number = Path(sys.argv[1]), int(sys.argv[2])
with open_store(folder): pass
def items(start, stop):
    ids = pa.array([f"photographs/{i % 1000:04d}/IMG_{i:08d}.jpg" for i in range(start, stop)])
    place = pa.array(np.arange(start, stop))
    size = pa.array(np.arange(start, stop) % 9999)
    return pa.RecordBatch.from_arrays(
        [ids, pa.array(np.zeros(stop - start, np.int16)), place, size, size], schema=listing_schema())
columns = shard_schema(schema())
for shard, start in enumerate(range(0, number, 50_000)):
    stop = min(start + 50_000, number)
    header = shards.ShardHeader(settings(), 1, [(1, start // 1000, (stop - 1) // 1000)], [])
    with parquet_writer(shards.shard_file(folder, shard), columns, shards.FORMAT, header) as writer:
        for first in range(start, stop, 1000):
            batch = items(first, first + 1000)
            values = {"id": batch["id"], "size": batch["size"], "modified": batch["modified"]}
            values["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4000, np.float16)), 4)
            values["sha256"] = pa.array(["ab" * 32] * 1000)
            arrays = [values.get(f.name, pa.nulls(1000, f.type)) for f in columns]
            writer.write_table(pa.table(arrays, schema=columns), row_group_size=1000)
batches = [items(start, start + 10_000) for start in range(0, number, 10_000)]
listing = pa.Table.from_batches(batches)
del batches
pa.default_memory_pool().release_unused()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
Path("/proc/self/clear_refs").write_text("5")
before, start = resident(), time.process_time()
with open_store(folder) as store:
    diff = store.plan(listing)
    seconds = time.process_time() - start
assert (diff.generation, diff.unchanged) == (None, number), diff
peak = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(seconds, peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell the peak of memory")
def test_a_million_rows_are_compared_in_little_time_and_memory(tmp_path: Path) -> None:
    results = {}
    for number in (10_000, 1_000_000):
        command = [sys.executable, "-c", SCALE, str(tmp_path / str(number)), str(number)]
        root = Path(__file__).parents[2]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, cwd=root).stdout
        results[number] = [float(word) for word in output.split()]
    print(results)
    assert results[1_000_000][0] < 2.5
    assert results[1_000_000][1] - results[10_000][1] < 120e6
