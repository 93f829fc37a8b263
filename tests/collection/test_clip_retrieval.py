"""The layout of clip-retrieval: aligned files, in the order that its readers sort names."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

import pyarrow as pa
import pyarrow.parquet as pq

from clipkernels.collection.clip_retrieval import export_clip_retrieval
from tests.collection.finished import manifest_for, unit_vectors, write_collection, write_shard

WIDTH = 12


def read(folder: Path, part: str) -> list[np.ndarray]:
    """The arrays of a part in the order of names, each with a header that embedding_reader understands."""
    arrays = []
    for file in sorted((folder / part).rglob("*.npy")):
        line = file.read_bytes()[:300].split(b"\n")[0]
        shape = re.search(r"'shape': \(([0-9]+), ([0-9]+)\)", str(line))
        dtype = re.search(r"'descr': '([<f0-9]+)'", str(line))
        assert shape is not None and dtype is not None
        array = np.load(file)
        assert array.shape == (int(shape[1]), int(shape[2])) and array.dtype.str == dtype[1]
        values = np.frombuffer(file.read_bytes()[len(line) + 1 :], dtype[1]).reshape(array.shape)
        assert np.array_equal(values, array)
        arrays.append(array)
    return arrays


def metadata(folder: Path) -> list[pa.Table]:
    return [pq.read_table(file) for file in sorted((folder / "metadata").glob("*.parquet"))]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_files_of_one_number_hold_the_same_rows(tmp_path: Path, dtype: str) -> None:
    vectors = unit_vectors(30, WIDTH).astype(dtype)
    columns = {"licence": (pa.string(), ["CC"] * 10)}
    folder = write_collection(
        tmp_path / "in", [vectors[:10], vectors[10:20], vectors[20:]], manifest_for(WIDTH, dtype=dtype), columns=columns
    )
    assert export_clip_retrieval(folder, tmp_path / "out") == 30
    arrays, tables = read(tmp_path / "out", "img_emb"), metadata(tmp_path / "out")
    assert [array.dtype.name for array in arrays] == [dtype] * 3
    assert np.array_equal(np.concatenate(arrays), vectors)
    assert [len(table) for table in tables] == [len(array) for array in arrays]
    assert pa.concat_tables(tables).column("image_path").to_pylist() == [f"{row}.png" for row in range(30)]
    assert tables[0].column("licence").to_pylist() == ["CC"] * 10
    assert not {"id", "embedding"} & set(tables[0].column_names)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["img_emb", "metadata"]
    assert (tmp_path / "out" / "img_emb" / "img_emb_0.npy").is_file()
    assert (tmp_path / "out" / "metadata" / "metadata_0.parquet").is_file()


def test_captions_have_their_own_folder_and_column(tmp_path: Path) -> None:
    vectors, captions = unit_vectors(20, WIDTH), unit_vectors(20, WIDTH, seed=1)
    texts = [None if row % 4 == 0 else f"text {row}" for row in range(20)]
    rows = [
        [0.0] * captions.shape[1] if text is None else vector
        for text, vector in zip(texts, captions.tolist(), strict=True)
    ]
    folder = write_collection(
        tmp_path / "in", [vectors], manifest_for(WIDTH, text="caption"), texts=texts, text_vectors=rows
    )
    export_clip_retrieval(folder, tmp_path / "out")
    [array], [table] = read(tmp_path / "out", "text_emb"), metadata(tmp_path / "out")
    captions[::4] = 0
    assert np.array_equal(array, captions)
    assert table.column("caption").to_pylist() == texts and "text" not in table.column_names
    assert np.array_equal(read(tmp_path / "out", "img_emb")[0], vectors)


def test_the_numbers_of_twelve_shards_sort_as_text(tmp_path: Path) -> None:
    vectors = unit_vectors(24, WIDTH)
    folder = write_collection(tmp_path / "in", list(vectors.reshape(12, 2, WIDTH)))
    export_clip_retrieval(folder, tmp_path / "out")
    names = sorted(file.name for file in (tmp_path / "out" / "img_emb").iterdir())
    assert names == [f"img_emb_{number:02}.npy" for number in range(12)]
    assert np.array_equal(np.concatenate(read(tmp_path / "out", "img_emb")), vectors)
    ids = pa.concat_tables(metadata(tmp_path / "out")).column("image_path").to_pylist()
    assert ids == [f"{row}.png" for row in range(24)]


def test_raw_embeddings_are_normalised(tmp_path: Path) -> None:
    vectors = unit_vectors(9, WIDTH)
    folder = write_collection(tmp_path / "in", [vectors * 5], manifest_for(WIDTH, normalised=False))
    export_clip_retrieval(folder, tmp_path / "out")
    assert np.abs(read(tmp_path / "out", "img_emb")[0] - vectors).max() < 1e-6


def test_an_earlier_export_leaves_no_files(tmp_path: Path) -> None:
    vectors = unit_vectors(24, WIDTH)
    many = write_collection(
        tmp_path / "many",
        list(vectors.reshape(12, 2, WIDTH)),
        manifest_for(WIDTH, text="caption"),
        texts=["a", "b"],
        text_vectors=unit_vectors(2, WIDTH).tolist(),
    )
    export_clip_retrieval(many, many)
    few = write_collection(tmp_path / "few", [vectors[:3]])
    export_clip_retrieval(few, many)
    names = sorted(str(file.relative_to(many)) for file in many.rglob("*_*.*"))
    assert names == ["img_emb/img_emb_0.npy", "metadata/metadata_0.parquet"]


def test_an_empty_shard_has_no_files(tmp_path: Path) -> None:
    """A reader would skip its embeddings, but not its metadata."""
    vectors = unit_vectors(4, WIDTH)
    folder = write_collection(tmp_path / "in", [vectors[:2], vectors[:0], vectors[2:]])
    assert export_clip_retrieval(folder, tmp_path / "out") == 4
    assert [len(array) for array in read(tmp_path / "out", "img_emb")] == [2, 2]
    assert export_clip_retrieval(write_collection(tmp_path / "none", []), tmp_path / "empty") == 0
    assert not list((tmp_path / "empty").rglob("*.*"))


def test_other_files_that_a_reader_would_take_are_refused(tmp_path: Path) -> None:
    folder = write_collection(tmp_path / "in", [unit_vectors(4, WIDTH)])
    other = tmp_path / "out" / "img_emb" / "more" / "mine.npy"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected files of an export in .*, got .*mine.npy: choose another folder"):
        export_clip_retrieval(folder, tmp_path / "out")
    assert other.exists() and not (tmp_path / "out" / "metadata").exists()


def test_a_source_column_of_clip_retrievals_name_gives_way(tmp_path: Path) -> None:
    columns = {"image_path": (pa.string(), ["/x"] * 3), "caption": (pa.string(), ["kept"] * 3)}
    folder = write_collection(tmp_path / "in", [unit_vectors(3, WIDTH)], columns=columns)
    export_clip_retrieval(folder, tmp_path / "out")
    [table] = metadata(tmp_path / "out")
    assert table.column("image_path").to_pylist() == ["0.png", "1.png", "2.png"]
    assert table.column("caption").to_pylist() == ["kept"] * 3


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = write_collection(tmp_path / "in", [unit_vectors(3, WIDTH)])
    bad = unit_vectors(3, WIDTH)
    bad[1, 1] = np.nan
    write_shard(folder, "00001", bad, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"00001.parquet, got an infinite value or NaN in row 1"):
        export_clip_retrieval(folder, tmp_path / "out")
    assert not [file for file in (tmp_path / "out").rglob(".*") if file.is_file()]
