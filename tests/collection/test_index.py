"""Search: hits against a sort of all cosines, the index in the folder, and queries that do not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipkernels as ck

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed")

from clipkernels.classifier import class_embeddings  # noqa: E402
from clipkernels.collection import index as index_module  # noqa: E402
from clipkernels.collection import search as search_module  # noqa: E402
from clipkernels.collection.layout import INDEX  # noqa: E402
from clipkernels.collection.manifest import read_manifest  # noqa: E402
from clipkernels.collection.rows import _vectors, list_shards, vector_batches  # noqa: E402
from clipkernels.collection.search import Hit, find_hits, search  # noqa: E402
from tests.collection.finished import manifest_for, unit_vectors, write_collection, write_shard  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH = 24


def hits_of(folder: Path, query: np.ndarray, k: int) -> list[Hit]:
    return find_hits(folder, read_manifest(folder).settings, torch.from_numpy(query), k)


def sorted_rows(vectors: np.ndarray, query: np.ndarray) -> tuple[list[str], list[float]]:
    """The ids by cosine, ties in the order of rows, and the cosines, of all rows."""
    rows = vectors.astype(np.float32).astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(query)
    cosines = rows @ query.astype(np.float64) / np.where(lengths == 0, 1, lengths)
    order = np.argsort(-cosines.round(7), kind="stable")
    return [f"{row}.png" for row in order], cosines[order].tolist()


def test_hits_are_the_most_similar_rows_of_all_shards(tmp_path: Path) -> None:
    vectors = unit_vectors(60, WIDTH)
    folder = write_collection(tmp_path, [vectors[:25], vectors[25:26], vectors[26:]])
    query = unit_vectors(1, WIDTH, seed=1)[0]
    names, cosines = sorted_rows(vectors, query)
    hits = hits_of(folder, query * 7, 10)
    assert [hit.id for hit in hits] == names[:10]
    assert [hit.rank for hit in hits] == list(range(1, 11))
    assert [hit.score for hit in hits] == pytest.approx(cosines[:10], abs=1e-6)
    assert hits[0].values.keys() == {"sha256", "width", "height"} and hits[0].values["height"] == 24


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_of_any_length_are_compared_by_their_cosine(tmp_path: Path, dtype: str) -> None:
    vectors = (unit_vectors(50, WIDTH) * np.linspace(0.1, 90, 50)[:, None]).astype(dtype)
    folder = write_collection(tmp_path, [vectors], manifest_for(WIDTH, normalised=False, dtype=dtype))
    query = unit_vectors(1, WIDTH, seed=1)[0]
    names, cosines = sorted_rows(vectors, query)
    hits = hits_of(folder, query, 50)
    assert [hit.id for hit in hits] == names
    assert [hit.score for hit in hits] == pytest.approx(cosines, abs=1e-6)


def test_a_zero_row_has_the_cosine_zero(tmp_path: Path) -> None:
    vectors = np.stack([np.zeros(WIDTH, np.float32), *unit_vectors(2, WIDTH)])
    folder = write_collection(tmp_path, [vectors], manifest_for(WIDTH, normalised=False))
    hits = hits_of(folder, vectors[1], 3)
    assert next(hit.score for hit in hits if hit.id == "0.png") == 0.0


def test_ties_go_to_the_earlier_row_at_any_k(tmp_path: Path) -> None:
    first, second = unit_vectors(2, WIDTH)
    vectors = np.stack([second, *[first] * 30, second, *[first] * 30])
    folder = write_collection(tmp_path, [vectors[:40], vectors[40:]])
    names, _ = sorted_rows(vectors, first)
    for k in (1, 3, 60, 61, 62):
        assert [hit.id for hit in hits_of(folder, first, k)] == names[:k]


def test_a_k_above_the_rows_gives_all_of_them(tmp_path: Path) -> None:
    folder = write_collection(tmp_path, [unit_vectors(1, WIDTH)])
    [hit] = hits_of(folder, unit_vectors(1, WIDTH)[0], 1000)
    assert (hit.rank, hit.id, hit.score) == (1, "0.png", pytest.approx(1, abs=1e-6))


def test_an_empty_collection_has_no_hits(tmp_path: Path) -> None:
    query = unit_vectors(1, 8)[0]
    assert hits_of(write_collection(tmp_path / "none", []), query, 5) == []
    folder = write_collection(tmp_path / "empty", [np.empty((0, 8), np.float32)])
    assert hits_of(folder, query, 5) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_a_query_that_has_no_direction_is_refused(tmp_path: Path, value: float) -> None:
    folder = write_collection(tmp_path, [unit_vectors(3, WIDTH)])
    with pytest.raises(ValueError, match="expected a query whose embedding is finite and not zero"):
        hits_of(folder, np.full(WIDTH, value, np.float32), 3)
    with pytest.raises(ValueError, match=r"expected a query of width 24, got \(5,\)"):
        hits_of(folder, np.ones(5, np.float32), 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    vectors = unit_vectors(9, WIDTH)
    vectors[5, 3] = value
    folder = write_collection(tmp_path, [unit_vectors(3, WIDTH), vectors])
    with pytest.raises(ValueError, match=r"00001.parquet, got an infinite value or NaN in row 5: delete it"):
        hits_of(folder, vectors[0], 3)
    assert not (folder / INDEX).exists()


def test_shards_of_another_width_and_other_files_are_refused(tmp_path: Path) -> None:
    folder = write_collection(tmp_path, [unit_vectors(3, WIDTH)])
    write_shard(folder, "00001", unit_vectors(3, 5), ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"expected .*00001.parquet to hold embedding, .*\[24\]"):
        hits_of(folder, unit_vectors(1, WIDTH)[0], 3)
    (folder / "embeddings" / "00001.parquet").write_bytes(b"no Parquet")
    with pytest.raises(ValueError, match=r"expected a shard of embeddings, got .*00001.parquet: "):
        hits_of(folder, unit_vectors(1, WIDTH)[0], 3)


def test_batches_are_the_rows_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit_vectors(50, WIDTH)
    folder = write_collection(tmp_path, [vectors])
    monkeypatch.setattr("clipkernels.collection.rows.BATCH_ROWS", 8)  # of other sizes than the row groups
    batches = list(vector_batches(folder, list_shards(folder)[0], WIDTH))
    assert max(map(len, batches)) <= 8 and np.array_equal(np.concatenate(batches), vectors)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_slice_of_a_column_is_its_own_rows(dtype: str) -> None:
    import pyarrow as pa

    vectors = unit_vectors(20, WIDTH).astype(dtype)
    flat, absent = pa.array(vectors.reshape(-1)), np.zeros(20, bool)
    column = pa.FixedSizeListArray.from_arrays(flat, WIDTH)
    actual, missing = _vectors(column[5:17], WIDTH)
    assert np.array_equal(actual, vectors[5:17]) and not missing.any()
    absent[[6, 16, 19]] = True
    column = pa.FixedSizeListArray.from_arrays(flat, type=column.type, mask=pa.array(absent))
    actual, missing = _vectors(column[5:17], WIDTH)
    assert missing.tolist() == absent[5:17].tolist()
    assert np.array_equal(actual, np.where(absent[:, None], 0, vectors)[5:17])
    half = pa.array([None if place == 7 else value for place, value in enumerate(vectors[:2].reshape(-1))], flat.type)
    actual, missing = _vectors(pa.FixedSizeListArray.from_arrays(half, WIDTH), WIDTH)
    assert missing.tolist() == [True, False] and np.array_equal(actual[1], vectors[1])


# The index in the folder.


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of the indices that are built."""
    rows: list[int] = []
    build = index_module._build

    def counted(faiss: Any, folder: Path, shards: Any, width: int) -> Any:
        index = build(faiss, folder, shards, width)
        rows.append(index.ntotal)
        return index

    monkeypatch.setattr(index_module, "_build", counted)
    return rows


def test_the_index_is_built_once_and_can_be_read_by_faiss(tmp_path: Path, builds: list[int]) -> None:
    vectors = unit_vectors(30, WIDTH)
    folder = write_collection(tmp_path, [vectors[:20], vectors[20:]])
    first = hits_of(folder, vectors[4], 5)
    assert hits_of(folder, vectors[4], 5) == first and builds == [30]
    [file] = (folder / INDEX).glob("*.faiss")
    assert {path.name for path in (folder / INDEX).iterdir()} == {file.name, "index.json"}
    index = faiss.read_index(str(file))
    assert np.abs(index.reconstruct_n(0, 30) - vectors).max() < 1e-6


def test_a_shard_that_changes_makes_the_index_stale(tmp_path: Path, builds: list[int]) -> None:
    vectors = unit_vectors(40, WIDTH)
    folder = write_collection(tmp_path, [vectors[:20], vectors[20:30]])

    def best(row: int) -> str:
        return hits_of(folder, vectors[row], 1)[0].id

    assert best(25) == "25.png"
    write_shard(folder, "00002", vectors[30:], [f"new/{row}.png" for row in range(10)])
    assert best(33) == "new/3.png"
    write_shard(folder, "00001", vectors[20:25], [f"{row}.png" for row in range(20, 25)])
    assert best(33) == "new/3.png" and best(25) != "25.png"
    (folder / "embeddings" / "00000.parquet").unlink()
    assert best(22) == "22.png" and best(3) != "3.png"
    os.utime(folder / "embeddings" / "00001.parquet", ns=(1, 1))
    assert best(22) == "22.png"
    assert builds == [30, 40, 35, 15, 15]
    assert len(list((folder / INDEX).glob("*.faiss"))) == 1


def tamper_rows(folder: Path) -> None:
    file = folder / INDEX / "index.json"
    header = json.loads(file.read_text())
    header["shards"][0][3] += 1
    file.write_text(json.dumps(header))


def tamper_field(folder: Path) -> None:
    file = folder / INDEX / "index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "more": 1}))


def cut_json(folder: Path) -> None:
    file = folder / INDEX / "index.json"
    file.write_bytes(file.read_bytes()[:40])


def binary_json(folder: Path) -> None:
    (folder / INDEX / "index.json").write_bytes(b"\xff\xfe\x00")


def cut_index(folder: Path) -> None:
    [file] = (folder / INDEX).glob("*.faiss")
    file.write_bytes(file.read_bytes()[:100])


def flip_index(folder: Path) -> None:
    [file] = (folder / INDEX).glob("*.faiss")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def remove_index(folder: Path) -> None:
    [file] = (folder / INDEX).glob("*.faiss")
    file.unlink()


@pytest.mark.parametrize(
    "damage", [tamper_rows, tamper_field, cut_json, binary_json, cut_index, flip_index, remove_index]
)
def test_a_damaged_index_is_built_again(tmp_path: Path, builds: list[int], damage: Callable[[Path], None]) -> None:
    vectors = unit_vectors(30, WIDTH)
    folder = write_collection(tmp_path, [vectors])
    expected = hits_of(folder, vectors[4], 5)
    damage(folder)
    assert hits_of(folder, vectors[4], 5) == expected and builds == [30, 30]
    assert hits_of(folder, vectors[4], 5) == expected and builds == [30, 30]


def test_a_signed_index_of_other_rows_is_built_again(tmp_path: Path, builds: list[int]) -> None:
    vectors = unit_vectors(30, WIDTH)
    folder = write_collection(tmp_path, [vectors])
    other = faiss.IndexFlatIP(WIDTH)
    other.add(vectors[:7])
    index_module._write(faiss, other, folder / INDEX, list_shards(folder), WIDTH)
    assert [hit.id for hit in hits_of(folder, vectors[20], 1)] == ["20.png"] and builds == [30]


def test_a_folder_that_cannot_be_written_is_searched_all_the_same(tmp_path: Path) -> None:
    vectors = unit_vectors(30, WIDTH)
    folder = write_collection(tmp_path, [vectors])
    (folder / INDEX).write_text("a file in place of the folder; permissions would not stop a superuser")
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"the index of .* is not kept, and is made again for each search: "):
            assert hits_of(folder, vectors[4], 1)[0].id == "4.png"


def test_a_temporary_file_that_cannot_be_written_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit_vectors(30, WIDTH)
    folder = write_collection(tmp_path, [vectors])
    write = faiss.write_index

    def fail(index: Any, target: Any) -> None:
        if isinstance(target, str):
            raise RuntimeError("No space left on device")
        write(index, target)

    monkeypatch.setattr(faiss, "write_index", fail)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert hits_of(folder, vectors[4], 1)[0].id == "4.png"
    assert list((folder / INDEX).iterdir()) == []


def test_two_processes_build_at_once(tmp_path: Path) -> None:
    vectors = unit_vectors(400, WIDTH)
    folder = write_collection(tmp_path, [vectors])
    np.save(tmp_path / "query.npy", vectors[123])
    code = (
        "import sys, numpy as np; from pathlib import Path; from tests.collection.test_index import hits_of;"
        "query = np.load(sys.argv[1] + '/query.npy');"
        "print(*(hits_of(Path(sys.argv[1]), query, 1)[0].id for _ in range(5)))"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, str(folder)]
    root = Path(__file__).parents[2]
    processes = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].split() for process in processes] == [["123.png"] * 5] * 2
    assert len(list((folder / INDEX).iterdir())) == 2


def test_a_collection_that_changes_during_a_search_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = unit_vectors(20, WIDTH)
    folder = write_collection(tmp_path, [vectors[:10], vectors[10:]])
    take, calls = search_module.take_rows, []

    def take_after_change(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) <= changes:
            rows = [f"{row}.png" for row in range(9, -1, -1)]
            write_shard(folder, "00000", vectors[:10][::-1].copy(), rows)
            os.utime(folder / "embeddings" / "00000.parquet", ns=(len(calls), len(calls)))
        return take(*arguments)

    monkeypatch.setattr(search_module, "take_rows", take_after_change)
    changes = 1
    assert hits_of(folder, vectors[2], 1)[0].id == "2.png" and len(calls) == 2
    changes = 9
    with pytest.raises(ValueError, match="which has changed 3 times"):
        hits_of(folder, vectors[2], 1)


def test_many_rows_are_said_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_collection(tmp_path, [unit_vectors(30, WIDTH)])
    monkeypatch.setattr(index_module, "MANY_ROWS", 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hits_of(folder, unit_vectors(1, WIDTH)[0], 1)
    monkeypatch.setattr(index_module, "MANY_ROWS", 29)
    with pytest.warns(UserWarning, match="the search reads all 30 rows, because the index is flat: "):
        hits_of(folder, unit_vectors(1, WIDTH)[0], 1)


# Queries.


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Random images of 40 × 30 pixels."""
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)) for _ in range(6)]


def embed(model: torch.nn.Module, preprocess: Any, pictures: list[Image.Image]) -> np.ndarray:
    with torch.no_grad():
        embeddings = ck.encode_image(model, torch.stack([preprocess(picture) for picture in pictures])).embedding
    return torch.nn.functional.normalize(embeddings.float()).numpy()


def test_an_image_finds_itself_with_the_bundled_model(tmp_path: Path, pictures: list[Image.Image]) -> None:
    model, preprocess, _ = ck.bundled()
    folder = write_collection(tmp_path, [embed(model, preprocess, pictures)])
    pictures[3].save(tmp_path / "query.png")
    for query in (
        tmp_path / "query.png",
        str(tmp_path / "query.png"),
        (tmp_path / "query.png").read_bytes(),
        pictures[3],
    ):
        hit = search(folder, image=query, k=1)[0]
        assert (hit.id, hit.score) == ("3.png", pytest.approx(1, abs=1e-5))


def test_a_text_finds_the_images_by_the_class_embedding(tmp_path: Path, pictures: list[Image.Image]) -> None:
    model, preprocess, tokenizer = ck.bundled()
    vectors = embed(model, preprocess, pictures)
    folder = write_collection(tmp_path, [vectors])
    text = class_embeddings(model, tokenizer, {"x": ["a red square"]})[0].numpy()
    names, cosines = sorted_rows(vectors, text)
    hits = search(folder, "a red square", k=6)
    assert [hit.id for hit in hits] == names
    assert [hit.score for hit in hits] == pytest.approx(cosines, abs=1e-5)
    training = model.train()
    assert search(folder, "a red square", k=6, model=training, tokenizer=tokenizer) == hits and training.training


def test_a_tower_other_than_the_collections_is_refused(tmp_path: Path, registered: str) -> None:
    import open_clip

    folder = write_collection(tmp_path, [unit_vectors(4, 128)])
    other = open_clip.create_model(registered)
    tokenizer = ck.bundled()[2]
    with pytest.raises(ValueError, match=r"expected the tower of .* \(bundled, no tag; .*got another tower"):
        search(folder, "a text", model=other, tokenizer=tokenizer)
    assert not (folder / INDEX).exists()
    _, text = "", manifest_for(128, text="caption", text_tower=manifest_for(128, other).settings.tower)
    folder = write_collection(tmp_path / "captions", [unit_vectors(4, 128)], text)
    with pytest.raises(ValueError, match=r"expected the text tower of .*, got another one"):
        search(folder, "a text")


def test_a_tower_of_another_precision_is_the_same_tower(tmp_path: Path) -> None:
    model, _, tokenizer = ck.bundled()
    folder = write_collection(tmp_path, [unit_vectors(4, 128)])
    precise = search(folder, "a text")
    rounded = search(folder, "a text", model=model.bfloat16(), tokenizer=tokenizer)
    assert {hit.id: hit.score for hit in rounded} == pytest.approx({hit.id: hit.score for hit in precise}, abs=0.02)


def test_a_tower_without_texts_is_searched_with_images(tmp_path: Path, pictures: list[Image.Image]) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=16).eval()
    preprocess = ck.bundled()[1]
    vectors = embed(model, preprocess, pictures)
    manifest = manifest_for(16, model, library="timm", model="vit_tiny_patch16_224")
    folder = write_collection(tmp_path, [vectors], manifest)
    assert search(folder, image=pictures[2], model=model, preprocess=preprocess)[0].id == "2.png"
    with pytest.raises(ValueError, match="expected a model with a text tower for a text, got VisionTransformer, which"):
        search(folder, "a text", model=model, tokenizer=ck.bundled()[2])
    with pytest.raises(ValueError, match="expected a model for a collection of vit_tiny_patch16_224, got none"):
        search(folder, "a text")


def test_another_method_than_the_collections_is_a_warning(tmp_path: Path, pictures: list[Image.Image]) -> None:
    model, preprocess, _ = ck.bundled()
    ck.patch(model, ck.ToMe(8))
    vectors = embed(model, preprocess, pictures)
    folder = write_collection(tmp_path, [vectors], manifest_for(128, method=repr(ck.ToMe(8)), spec="tome:8"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hit = search(folder, image=pictures[2], k=1, model=model, preprocess=preprocess)[0]
        search(folder, "a text")  # no method reduces a text
    assert (hit.id, hit.score) == ("2.png", pytest.approx(1, abs=1e-5))
    with pytest.warns(UserWarning, match=r"the query is encoded with host, the images of .* with ToMe\(r=8"):
        dense = search(folder, image=pictures[2], k=1)[0]
    assert dense.score < 0.9999


def test_dense_is_the_hosts_own_method(tmp_path: Path, pictures: list[Image.Image]) -> None:
    model, preprocess, _ = ck.bundled()
    folder = write_collection(tmp_path, [embed(model, preprocess, pictures)], manifest_for(128, method="Dense()"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert search(folder, image=pictures[1], k=1)[0].id == "1.png"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected a text or an image, got neither"),
        ({"text": "a", "image": b"b"}, "expected a text or an image, got both"),
        ({"text": "  "}, "expected a text that is not empty"),
        ({"text": "a", "k": 0}, "k must be an int of at least 1"),
        ({"image": b"no image"}, "expected an image that can be read, got one: not an image"),
        ({"image": "missing.png"}, "expected an image that can be read, got missing.png: No such file"),
    ],
)
def test_queries_that_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    folder = write_collection(tmp_path, [unit_vectors(4, 128)])
    with pytest.raises(ValueError, match=message):
        search(folder, **arguments)


def test_a_model_needs_its_tokenizer_or_its_preprocessing(tmp_path: Path) -> None:
    folder = write_collection(tmp_path, [unit_vectors(4, 128)])
    model = ck.bundled()[0]
    with pytest.raises(TypeError, match="tokenizer must be callable"):
        search(folder, "a text", model=model)
    with pytest.raises(TypeError, match="preprocess must be callable"):
        search(folder, image=b"", model=model)
    with pytest.raises(ValueError, match="expected no device with a model"):
        search(folder, "a text", model=model, tokenizer=ck.bundled()[2], device="cpu")


def test_a_folder_that_is_no_collection_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a collection that clipkernels embed made"):
        search(tmp_path, "a text")


def test_hits_have_the_columns_of_the_source(tmp_path: Path) -> None:
    import pyarrow as pa

    vectors = unit_vectors(20, WIDTH)
    captions = [f"picture {row}" if row % 3 else None for row in range(20)]
    columns = {"licence": (pa.string(), [f"L{row}" for row in range(20)])}
    folder = write_collection(tmp_path, [vectors], texts=captions, columns=columns)
    for row in (19, 3):
        values = hits_of(folder, vectors[row], 1)[0].values
        assert (values["text"], values["licence"]) == (captions[row], f"L{row}")
        assert values.keys() == {"text", "sha256", "width", "height", "licence"}
