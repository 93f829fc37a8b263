"""Embedding a collection from Python: values, files that cannot be embedded, and later runs on the same folder."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import clipkernels as ck
from clipkernels.collection import encoder, run
from clipkernels.collection.engines import Progress
from clipkernels.collection.manifest import read_manifest
from clipkernels.collection.run import Embedded
from clipkernels.collection.store import Store
from clipkernels.images import Reader
from tests.collection.pictures import broken_files, draw_pictures, folder_bytes, read_rows

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
STILL = {"unit_rows": 8, "batch_size": 4}


@pytest.fixture(scope="module")
def bundled() -> tuple[nn.Module, Any, Any]:
    """The bundled model, its preprocessing and its tokenizer."""
    return ck.bundled()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of ten pictures, with captions beside six of them, one of which is empty."""
    return draw_pictures(tmp_path / "photos", 10)


@pytest.fixture
def embed(bundled: tuple[nn.Module, Any, Any], photos: Path, tmp_path: Path) -> Callable[..., Embedded]:
    """A run of `ck.embed` over the pictures into DIR, in units of 8 and batches of 4."""

    def call(sources: Any = photos, out: Path = tmp_path / "DIR", model: Any = bundled[0], **options: Any) -> Embedded:
        return ck.embed(model, sources, out, **{"preprocess": bundled[1], **STILL, **options})

    return call


def refused(call: Callable[[], object], folder: Path, kind: type[Exception] = ValueError) -> str:
    """The message of a call that is refused, which leaves a folder as it was."""
    before = folder_bytes(folder)
    with pytest.raises(kind) as caught:
        call()
    assert folder_bytes(folder) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def expected_batches(model: nn.Module, preprocess: Any, files: list[Path], batch: int, exif: bool = True) -> Any:
    """Embeddings as the model gives them for batches of files."""
    reader, shape = Reader(exif), (3, 32, 32)
    images = [reader.prepare(file, preprocess, shape) for file in files]
    with torch.inference_mode():
        parts = [
            ck.encode_image(model, torch.stack(images[start : start + batch])).embedding
            for start in range(0, len(images), batch)
        ]
    return torch.cat(parts).float()


def test_rows_are_those_of_encode_image(bundled: Any, photos: Path, embed: Any, tmp_path: Path) -> None:
    result = embed()
    files = sorted(photos.glob("*.png"))
    assert result == Embedded(10, 0, 10, 0, 0, result.notes, False)
    assert result.notes == (f"{photos}: skipped 6 .txt: not images",)
    rows = read_rows(tmp_path / "DIR")
    embeddings = torch.nn.functional.normalize(expected_batches(*bundled[:2], files, 4)).numpy()
    assert [row["id"] for row in rows] == [file.name for file in files]
    assert np.array_equal(np.array([row["embedding"] for row in rows], np.float32), embeddings)
    for row, file in zip(rows, files, strict=True):
        status = file.stat()
        assert row["sha256"] == sha256(file.read_bytes()).hexdigest()
        assert (row["width"], row["height"]) == Image.open(file).size
        assert (row["size"], row["modified"]) == (status.st_size, status.st_mtime_ns)
    assert list(rows[0]) == ["id", "embedding", "sha256", "width", "height", "size", "modified"]


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_embeddings_keep_their_length_or_not(
    raw: bool, dtype: str, bundled: Any, photos: Path, embed: Any, tmp_path: Path
) -> None:
    embed(raw=raw, dtype=dtype)
    embeddings = expected_batches(*bundled[:2], sorted(photos.glob("*.png")), 4)
    embeddings = (embeddings if raw else torch.nn.functional.normalize(embeddings)).to(getattr(torch, dtype)).numpy()
    table = pa.parquet.read_table(tmp_path / "DIR" / "embeddings")
    assert table.schema.field("embedding").type == pa.list_(getattr(pa, dtype)(), 128)
    assert np.array_equal(np.array(table["embedding"].to_pylist(), dtype), embeddings)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_kept_in_float16(precision: torch.dtype, embed: Any, tiny: Any, tmp_path: Path) -> None:
    result = embed(model=tiny.to(precision))
    kind = pa.parquet.read_schema(tmp_path / "DIR" / "embeddings" / "00000.parquet").field("embedding").type
    assert kind.value_type == (pa.float32() if precision == torch.float64 else pa.float16())
    norms = [np.linalg.norm(np.array(row["embedding"], np.float64)) for row in read_rows(tmp_path / "DIR")]
    assert result.embeddings == 10 and np.allclose(norms, 1, atol=1e-3)


def test_sizes_are_those_of_the_upright_image(bundled: Any, tmp_path: Path, embed: Any) -> None:
    (tmp_path / "turned").mkdir()
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.tile(np.arange(60, dtype=np.uint8), (20, 1))).save(tmp_path / "turned" / "a.jpg", exif=exif)
    for flag, size in ((True, (20, 60)), (False, (60, 20))):
        out = tmp_path / f"DIR{flag}"
        embed(tmp_path / "turned", out, exif=flag)
        [row] = read_rows(out)
        assert (row["width"], row["height"]) == size
        expected = expected_batches(*bundled[:2], [tmp_path / "turned" / "a.jpg"], 1, flag)
        assert np.array_equal(np.float32(row["embedding"]), torch.nn.functional.normalize(expected)[0].numpy())


def test_captions_are_embedded_beside_the_images(bundled: Any, photos: Path, embed: Any, tmp_path: Path) -> None:
    model, _, tokenizer = bundled
    (photos / "00.txt").write_text("word " * 100)
    result = embed(text="txt", tokenizer=tokenizer)
    assert result.notes == ("the tokenizer cut 1 caption, too long for the text tower",)
    rows = read_rows(tmp_path / "DIR")
    captions = [file.read_text() if (file := photos / f"{n:02}.txt").exists() else None for n in range(10)]
    assert [row["text"] for row in rows] == captions and captions.count(None) == 4 and captions[5] == ""
    for row in rows:
        if not row["text"]:
            assert not any(row["text_embedding"])
            continue
        with torch.inference_mode():
            expected = torch.nn.functional.normalize(model.encode_text(tokenizer([row["text"]])).float())[0]
        torch.testing.assert_close(torch.tensor(row["text_embedding"]), expected, rtol=0, atol=2e-7)


def test_columns_keep_their_types(embed: Any, photos: Path, tmp_path: Path) -> None:
    paths = [str(file) for file in sorted(photos.glob("*.png"))]
    columns = {
        "label": pa.array([None, *range(9)], pa.int16()),
        "tags": pa.array([["a", None]] * 5 + [None] * 5, pa.list_(pa.string())),
        "taken": pa.array([10**15 + n for n in range(10)], pa.timestamp("us", "UTC")),
        "about": pa.array([{"x": n, "y": "é"} for n in range(10)]),
        "price": pa.array([n / 3 for n in range(10)], pa.float32()),
        "kind": pa.array(["a", "b"] * 5).dictionary_encode(),
    }
    pa.parquet.write_table(pa.table({"path": paths, **columns}), tmp_path / "list.parquet")
    embed(tmp_path / "list.parquet", columns=list(columns))
    table = pa.parquet.read_table(tmp_path / "DIR" / "embeddings" / "00000.parquet")
    for name, values in columns.items():
        assert table[name].to_pylist() == values.to_pylist(), name
        assert table[name].type == (values.type if name != "kind" else pa.string()), name
    message = refused(lambda: embed(tmp_path / "list.parquet", columns=["label"]), tmp_path / "DIR")
    assert "columns: {" in message


def test_a_column_that_one_source_lacks_is_null(embed: Any, photos: Path, tmp_path: Path) -> None:
    paths = [str(photos / "00.png"), str(photos / "01.png")]
    other = draw_pictures(tmp_path / "other", 3)
    pa.parquet.write_table(pa.table({"path": paths, "label": [3, 4]}), tmp_path / "list.parquet")
    embed([other, tmp_path / "list.parquet"], columns=["label"])
    rows = read_rows(tmp_path / "DIR")
    assert [row["label"] for row in rows] == [None, None, None, 3, 4]
    assert "expected columns of the sources ('txt'), got 'label'" in refused(
        lambda: embed(other, tmp_path / "new", columns=["label"]), tmp_path
    )


@pytest.mark.parametrize("name", ["id", "embedding", "sha256", "size", "reason", "text"])
def test_names_of_a_collection_are_refused_as_columns(
    name: str, bundled: Any, embed: Any, photos: Path, tmp_path: Path
) -> None:
    paths = [str(photos / "00.png"), str(photos / "01.png")]
    pa.parquet.write_table(pa.table({"path": paths, name: ["a", "b"]}), tmp_path / "list.parquet")
    list_file, out = tmp_path / "list.parquet", tmp_path / "DIR"
    assert repr(name) in refused(lambda: embed(list_file, columns=[name]), tmp_path)
    if name == "text":
        embed(list_file, text="text", tokenizer=bundled[2])
        assert [row["text"] for row in read_rows(out)] == ["a", "b"]
    else:
        assert repr(name) in refused(lambda: embed(list_file, text=name, tokenizer=bundled[2]), tmp_path)


@pytest.mark.parametrize("kind", ["int64", "list<string>", "binary"])
def test_captions_must_be_strings(kind: str, bundled: Any, embed: Any, photos: Path, tmp_path: Path) -> None:
    values = {"int64": pa.array([1, 2]), "list<string>": pa.array([["a"], ["b"]]), "binary": pa.array([b"a", b"b"])}
    paths = [str(photos / "00.png"), str(photos / "01.png")]
    pa.parquet.write_table(pa.table({"path": paths, "caption": values[kind]}), tmp_path / "list.parquet")
    message = refused(
        lambda: embed(tmp_path / "list.parquet", text="caption", tokenizer=bundled[2], image_column="path"), tmp_path
    )
    assert message.startswith("expected text of strings, got 'caption' of ")


def test_files_that_cannot_be_embedded_have_a_reason(bundled: Any, embed: Any, photos: Path, tmp_path: Path) -> None:
    reasons = broken_files(photos)
    result = embed()
    errors = {row["id"]: row for row in read_rows(tmp_path / "DIR", "errors")}
    assert set(errors) == set(reasons) and (result.errors, result.all_errors) == (len(reasons), len(reasons))
    for name, expected in reasons.items():
        assert expected in errors[name]["reason"] and "\n" not in errors[name]["reason"], errors[name]
    assert errors["empty.png"]["sha256"] == sha256(b"").hexdigest() and errors["fifo.png"]["sha256"] is None
    rows = read_rows(tmp_path / "DIR")
    files = sorted([file for file in photos.iterdir() if file.suffix != ".txt"])
    assert [row["id"] for row in rows] == [file.name for file in files if file.name not in reasons]
    # The readable ones have the values of their own batch, whose other files are left out.
    embeddings = {row["id"]: row["embedding"] for row in rows}
    reader = Reader()
    for start in range(0, len(files), 4):
        batch = [file for file in files[start : start + 4] if file.name not in reasons]
        if not batch:
            continue
        images = torch.stack([reader.prepare(file, bundled[1], (3, 32, 32)) for file in batch])
        with torch.inference_mode():
            expected = torch.nn.functional.normalize(ck.encode_image(bundled[0], images).embedding).numpy()
        assert np.array_equal(np.float32([embeddings[file.name] for file in batch]), expected)


def poison_white(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply the embeddings of images of one colour by a value."""

    def encode(model: nn.Module, images: torch.Tensor) -> ck.Encoded:
        result = ck.encode_image(model, images)
        plain = (images == images[..., :1, :1]).flatten(1).all(1)
        return result._replace(embedding=torch.where(plain[:, None], result.embedding * value, result.embedding))

    monkeypatch.setattr(encoder, "encode_image", encode)


@pytest.mark.parametrize(
    ("value", "options", "reason"),
    [
        (float("nan"), {}, "not finite"),
        (float("inf"), {}, "not finite"),
        (0.0, {}, "zero"),
        (0.0, {"raw": True}, "zero"),
        (1e7, {"raw": True, "dtype": "float16"}, "float16"),
        (1e-12, {"raw": True, "dtype": "float16"}, "zero"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_embeddings_that_are_of_no_use_are_errors(
    value: float,
    options: dict[str, Any],
    reason: str,
    embed: Any,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Image.new("RGB", (32, 32), "white").save(photos / "white.png")
    states: list[Progress] = []
    poison_white(value, monkeypatch)
    result = embed(progress=states.append, **options)
    assert (result.encoded, result.errors, result.embeddings, result.all_errors) == (10, 1, 10, 1)
    [error] = read_rows(tmp_path / "DIR", "errors")
    assert error["id"] == "white.png" and reason in error["reason"]
    assert error["sha256"] == sha256((photos / "white.png").read_bytes()).hexdigest()
    assert states == [Progress(4, 11, 0), Progress(8, 11, 0), Progress(11, 11, 1)]


def test_a_broken_preprocess_is_an_error_of_each_image(bundled: Any, embed: Any, tmp_path: Path) -> None:
    calls = []

    def preprocess(image: Image.Image) -> torch.Tensor:
        calls.append(image)
        if image.size == (24, 24) and np.asarray(image).sum() % 2:
            raise RuntimeError("odd\nsum")
        return bundled[1](image)

    result = embed(preprocess=preprocess)
    errors = read_rows(tmp_path / "DIR", "errors")
    assert result.errors == len(errors) > 0 and result.encoded == 10 - len(errors) > 0
    assert all(row["reason"].startswith("preprocessing failed (odd") and "\n" not in row["reason"] for row in errors)


def test_a_rerun_encodes_nothing_and_changes_no_byte(embed: Any, photos: Path, tmp_path: Path) -> None:
    broken_files(photos)
    embed()
    before = folder_bytes(tmp_path / "DIR", times=True)
    states: list[Progress] = []
    result = embed(progress=states.append)
    assert (result.encoded, result.errors, states) == (0, 0, [])
    assert folder_bytes(tmp_path / "DIR", times=True) == before


def test_new_and_changed_files_alone_are_encoded(embed: Any, photos: Path, tmp_path: Path, bundled: Any) -> None:
    embed()
    before = {row["id"]: row for row in read_rows(tmp_path / "DIR")}
    Image.new("RGB", (30, 20), "red").save(photos / "04.png")
    Image.new("RGB", (20, 30), "blue").save(photos / "zz.png")
    (photos / "01.png").unlink()
    states: list[Progress] = []
    result = embed(progress=states.append)
    assert states[-1] == Progress(2, 2, 0)
    assert (result.encoded, result.embeddings, result.vanished) == (2, 11, 1)
    after = {row["id"]: row for row in read_rows(tmp_path / "DIR")}
    assert set(after) == {*before, "zz.png"} and len(read_rows(tmp_path / "DIR")) == 11
    assert {key for key in before if before[key] != after[key]} == {"04.png"}
    for name, size in (("04.png", (30, 20)), ("zz.png", (20, 30))):
        expected = torch.nn.functional.normalize(expected_batches(*bundled[:2], [photos / name], 1))[0].numpy()
        assert np.array_equal(np.float32(after[name]["embedding"]), expected)
        assert (after[name]["width"], after[name]["height"]) == size
    assert embed(prune=True)[2:5] == (10, 0, 0)
    assert "01.png" not in {row["id"] for row in read_rows(tmp_path / "DIR")}


def test_a_changed_file_may_become_an_error_and_recover(embed: Any, photos: Path, tmp_path: Path) -> None:
    embed()
    good = (photos / "04.png").read_bytes()
    (photos / "04.png").write_bytes(good[:40])
    assert embed()[:4] == (0, 1, 9, 1)
    assert [row["id"] for row in read_rows(tmp_path / "DIR", "errors")] == ["04.png"]
    assert embed()[:4] == (0, 0, 9, 1)  # not tried again
    assert embed(retry=True)[:4] == (0, 1, 9, 1)
    (photos / "04.png").write_bytes(good)
    assert embed()[:4] == (1, 0, 10, 0)
    assert read_rows(tmp_path / "DIR", "errors") == []
    assert sorted(row["id"] for row in read_rows(tmp_path / "DIR")) == [f"{n:02}.png" for n in range(10)]


def test_by_content_a_touched_file_is_not_encoded_again(embed: Any, photos: Path, tmp_path: Path) -> None:
    embed()
    before = folder_bytes(tmp_path / "DIR", times=True)
    status = (photos / "02.png").stat()
    os.utime(photos / "02.png", ns=(0, status.st_mtime_ns + 10**9))
    assert embed(by_content=True).encoded == 0
    assert folder_bytes(tmp_path / "DIR", times=True) == before
    # Other content of the same size and time is found by content alone.
    content = (photos / "03.png").read_bytes()
    status = (photos / "03.png").stat()
    (photos / "03.png").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(photos / "03.png", ns=(0, status.st_mtime_ns))
    assert embed(by_content=True)[:4] in ((1, 0, 10, 0), (0, 1, 9, 1))
    digests = {
        row["id"]: row["sha256"] for kind in ("embeddings", "errors") for row in read_rows(tmp_path / "DIR", kind)
    }
    assert digests["03.png"] == sha256((photos / "03.png").read_bytes()).hexdigest()
    assert embed().encoded == 1  # the touched one


def test_prune_needs_all_sources(embed: Any, photos: Path, tmp_path: Path) -> None:
    other = draw_pictures(tmp_path / "other", 2, seed=5).rename(tmp_path / "others")
    for file in list(other.iterdir()):
        file.rename(other / f"other-{file.name}")
    assert embed([photos]).embeddings == 10
    result = embed([other])
    assert (result.embeddings, result.vanished) == (12, 0)  # the rows of the source that is not named have not vanished
    (photos / "03.png").unlink()
    message = refused(lambda: embed([other], prune=True), tmp_path / "DIR")
    assert str(photos) in message and "prune" in message
    assert embed([other, photos]).vanished == 1
    result = embed([other, photos], prune=True)
    assert (result.encoded, result.embeddings, result.vanished) == (0, 11, 0)


def test_a_source_that_is_not_there_is_forgotten(embed: Any, photos: Path, tmp_path: Path) -> None:
    other = draw_pictures(tmp_path / "other", 12, seed=5)
    for name in range(10):
        (other / f"{name:02}.png").unlink()
    assert embed([photos, other]).embeddings == 12
    shutil.rmtree(other)
    out, gone = tmp_path / "DIR", str(other)
    assert "forget those that are not there any more" in refused(lambda: embed(prune=True), out)
    for options, expected in (
        ({"forget": [gone]}, "expected prune with forget"),
        ({"forget": [photos], "prune": True}, "in both"),
        ({"forget": [tmp_path / "elsewhere"], "prune": True}, f"to forget ('{photos}', '{gone}'), got "),
    ):
        assert expected in refused(lambda options=options: embed(**options), out)
    result = embed(prune=True, forget=[gone])
    assert (result.encoded, result.embeddings, result.removed) == (0, 10, 2)
    assert read_manifest(out).sources == [str(photos)]
    assert embed(prune=True).removed == 0


def test_a_refused_prune_leaves_the_sources(embed: Any, photos: Path, tmp_path: Path) -> None:
    embed()
    other = draw_pictures(tmp_path / "other", 1).rename(tmp_path / "others")
    refused(lambda: embed([other], prune=True), tmp_path / "DIR")


@pytest.mark.parametrize("argument", ["sources", "out", "forget"])
def test_an_empty_path_is_refused(argument: str, embed: Any, tmp_path: Path) -> None:
    options = {"prune": True, argument: "" if argument == "out" else [""]}
    assert f"expected a path for {argument}, got an empty text" in refused(lambda: embed(**options), tmp_path)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": "another"}, "tower: "),
    "method": ({"model": "patched"}, "method: "),
    "precision": ({"model": "half"}, "precision: "),
    "exif": ({"exif": False}, "reader: "),
    "raw": ({"raw": True}, "normalised: true became false"),
    "dtype": ({"dtype": "float16"}, 'dtype: "float32" became "float16"'),
    "text": ({"text": "txt"}, 'text: null became "txt"'),
    "columns": ({"columns": ["txt"]}, "columns: {} became "),
    "preprocess": ({"preprocess": lambda image: torch.zeros(3, 32, 32)}, "preprocess: "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_are_refused(change: str, embed: Any, bundled: Any, tiny: Any, tmp_path: Path) -> None:
    embed()
    options, expected = dict(CHANGES[change][0]), CHANGES[change][1]
    kind = options.pop("model", None)
    if kind == "another":
        tiny.visual.proj.data.neg_()
    elif kind == "patched":
        ck.patch(tiny, ck.EViT(0.5))
    elif kind == "half":
        tiny.half()
    if kind:
        options["model"] = tiny
    if "text" in options:
        options["tokenizer"] = bundled[2]
    message = refused(lambda: embed(**options), tmp_path)
    assert expected in message and message.endswith("choose another folder")
    assert message.count(" became ") == 1


def test_an_id_column_is_a_setting(embed: Any, photos: Path, tmp_path: Path) -> None:
    paths = [str(photos / "00.png"), str(photos / "01.png")]
    pa.parquet.write_table(pa.table({"path": paths, "key": ["x", "y"]}), tmp_path / "list.parquet")
    embed(tmp_path / "list.parquet", id_column="key")
    assert [row["id"] for row in read_rows(tmp_path / "DIR")] == ["x", "y"]
    assert 'id_column: "key" became null' in refused(lambda: embed(tmp_path / "list.parquet"), tmp_path)


def test_batch_and_unit_may_differ_between_runs(embed: Any, photos: Path, tmp_path: Path) -> None:
    embed()
    assert embed(batch_size=3, unit_rows=5, workers=1).encoded == 0
    Image.new("RGB", (30, 20), "red").save(photos / "zz.png")
    assert embed(batch_size=3, unit_rows=5).encoded == 1


def test_units_are_whole_batches(embed: Any, tmp_path: Path) -> None:
    units = tmp_path / "DIR" / "units"
    stops = [Progress(4, 10, 0), Progress(8, 10, 0)]
    result = embed(unit_rows=5, progress=lambda state: state == stops[1])
    assert result.stopped and (result.encoded, result.embeddings) == (8, 8) and not list(units.iterdir())
    [file] = (tmp_path / "DIR" / "plans").iterdir()
    assert pa.parquet.read_table(file)["unit"].to_pylist() == [0] * 8 + [1] * 2


SHARED = ("embeddings", "errors")


def rows_bytes(folder: Path) -> dict[str, Any]:
    """The bytes of the embeddings and the errors of a collection."""
    return {name: content for name, content in folder_bytes(folder).items() if name.startswith(SHARED)}


@pytest.mark.parametrize(
    "options", [{"workers": 2}, {"devices": ("cpu", "cpu")}, {"devices": ["cpu"] * 3, "workers": 1}], ids=str
)
def test_loaders_and_devices_do_not_change_a_byte(
    options: dict[str, Any], embed: Any, photos: Path, tmp_path: Path
) -> None:
    broken_files(photos)
    embed(out=tmp_path / "one")
    embed(out=tmp_path / "other", **options)
    assert rows_bytes(tmp_path / "one") == rows_bytes(tmp_path / "other")


@pytest.mark.parametrize("batches", [1, 2, 3, 5])
def test_a_stopped_run_goes_on_with_the_same_bytes(batches: int, embed: Any, photos: Path, tmp_path: Path) -> None:
    broken_files(photos)
    total = embed(out=tmp_path / "one")
    stops = 0
    while True:
        seen: list[Progress] = []
        result = embed(progress=lambda state, seen=seen: seen.append(state) or len(seen) == batches)
        if not result.stopped:
            break
        stops += 1
        assert len(seen) == batches and stops < 10
        if batches == 1:  # a unit of two batches is never complete
            break
    if batches > 1:
        assert stops >= 1 and result[2:4] == total[2:4]
    else:
        assert embed()[2:4] == total[2:4]
    assert rows_bytes(tmp_path / "one") == rows_bytes(tmp_path / "DIR")


def test_the_order_of_units_does_not_change_a_byte(
    embed: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_files(photos)
    embed(out=tmp_path / "one", unit_rows=4)
    pending = Store.pending
    monkeypatch.setattr(Store, "pending", lambda self: pending(self)[::-1])
    embed(out=tmp_path / "DIR", unit_rows=4)
    assert rows_bytes(tmp_path / "one") == rows_bytes(tmp_path / "DIR")


def test_small_shards_are_written_on_the_way(
    embed: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "Store", partial(Store, shard_rows=4))
    seen: list[int] = []

    def progress(state: Progress) -> None:
        seen.append(len(list((tmp_path / "DIR" / "embeddings").iterdir())))

    assert embed(unit_rows=2, batch_size=2, progress=progress).embeddings == 10
    assert seen == [0, 1, 1, 2, 2]
    rows = [len(pa.parquet.read_table(file)) for file in sorted((tmp_path / "DIR" / "embeddings").iterdir())]
    assert rows == [4, 4, 2] and [row["id"] for row in read_rows(tmp_path / "DIR")] == [
        f"{n:02}.png" for n in range(10)
    ]


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines", b"[a-z]*", "日本".encode(), b"%s {x} \\"])
def test_sources_of_odd_names(name: bytes, embed: Any, photos: Path, tmp_path: Path) -> None:
    source = os.fsdecode(os.path.join(os.fsencode(tmp_path), name))
    photos.rename(source)
    assert embed(source, progress=lambda state: True).stopped
    assert embed(source).embeddings == 10
    assert embed(source, prune=True).encoded == 0
    os.unlink(os.path.join(source, "00.png"))
    assert embed(source, prune=True).embeddings == 9


def test_an_error_of_one_device_stops_the_others(embed: Any, photos: Path, tmp_path: Path, bundled: Any) -> None:
    before = threading.active_count()

    def progress(state: Progress) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        embed(devices=("cpu", "cpu"), unit_rows=4, progress=progress)
    assert threading.active_count() == before and not (tmp_path / "DIR" / ".lock").exists()
    assert embed().embeddings == 10


def test_the_model_is_left_as_it_was(embed: Any, tiny: Any) -> None:
    ck.patch(tiny, ck.EViT(0.5))
    tiny.train()
    tiny.visual.ln_post.eval()
    modes = [module.training for module in tiny.modules()]
    state = {name: value.clone() for name, value in tiny.state_dict().items()}
    random = torch.random.get_rng_state()
    for options in ({}, {"devices": ["cpu", "cpu"]}):
        embed(model=tiny, retry=True, **options)
        assert [module.training for module in tiny.modules()] == modes
        assert ck.method_of(tiny) == ck.EViT(0.5)
        assert all(value.requires_grad and value.grad is None for value in tiny.parameters())
        assert all(torch.equal(value, state[name]) for name, value in tiny.state_dict().items())
    assert torch.is_grad_enabled() and torch.equal(torch.random.get_rng_state(), random)


def test_a_reducing_method_is_the_models_own(embed: Any, tiny: Any, bundled: Any, photos: Path, tmp_path: Path) -> None:
    ck.patch(tiny, ck.ToMe(4))
    embed(model=tiny)
    expected = torch.nn.functional.normalize(expected_batches(tiny, bundled[1], sorted(photos.glob("*.png")), 4))
    rows = np.float32([row["embedding"] for row in read_rows(tmp_path / "DIR")])
    assert np.array_equal(rows, expected.numpy())
    manifest = json.loads((tmp_path / "DIR" / "manifest.json").read_text())
    assert manifest["settings"]["method"] == repr(ck.ToMe(4)) and manifest["settings"]["tokens"][-1] == 65 - 24


def test_sources_may_be_a_path_or_a_generator(embed: Any, photos: Path, tmp_path: Path) -> None:
    for number, sources in enumerate((str(photos), photos, (path for path in [photos]), (photos,))):
        assert embed(sources, tmp_path / f"out{number}").embeddings == 10
    assert embed([str(photos / "0[0-4].png"), photos / "09.png"], tmp_path / "glob").embeddings == 6
    assert "expected 1 to" in refused(lambda: embed([]), tmp_path)
    assert "'00.png' in" in refused(lambda: embed([photos, photos / "00.png"]), tmp_path)


def test_a_relative_and_an_absolute_source_are_one(
    embed: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(str(photos))
    before = folder_bytes(tmp_path / "DIR", times=True)
    monkeypatch.chdir(photos.parent)
    embed("photos", Path("DIR"))
    assert folder_bytes(tmp_path / "DIR", times=True) == before


@pytest.mark.parametrize("name", ["photos", "photos/DIR", "photos/a/b/DIR", "linked/DIR"])
def test_a_collection_beside_its_sources_alone(name: str, embed: Any, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(photos)
    message = refused(lambda: embed(out=tmp_path / name), tmp_path)
    assert "overlaps with the source" in message and str(photos) in message
    # A glob that can match nothing of the collection is another matter.
    assert embed(str(photos / "*.png"), photos / "DIR").embeddings == 10
    assert embed(str(photos / "*.png"), photos / "DIR").encoded == 0
    for pattern in ("**/*.png", "*", "D*/**", "*/embeddings/*"):
        assert "overlaps" in refused(lambda pattern=pattern: embed(str(photos / pattern), photos / "DIR"), tmp_path)
    for inside in ("DIR/embeddings", "DIR/embeddings/00000.parquet"):
        assert "overlaps" in refused(lambda inside=inside: embed(photos / inside, photos / "DIR"), tmp_path)


def test_a_plan_goes_on_without_a_source_that_is_gone(embed: Any, photos: Path, tmp_path: Path) -> None:
    other = draw_pictures(tmp_path / "other", 3, seed=5)
    for file in list(other.iterdir()):
        file.rename(other / f"other-{file.name}")
    assert embed([other, photos], progress=lambda state: True).stopped
    for file in list(other.iterdir()):
        file.unlink()
    other.rmdir()
    result = embed()
    assert (result.embeddings, result.all_errors, result.stopped) == (10, 3, False)
    assert all("its source cannot be read" in row["reason"] for row in read_rows(tmp_path / "DIR", "errors"))


def test_a_folder_of_something_else_is_refused(embed: Any, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "DIR").mkdir()
    (tmp_path / "DIR" / "thesis.txt").write_text("do not touch")
    assert "thesis.txt" in refused(embed, tmp_path)
    refused(lambda: embed(out=photos / "00.png"), tmp_path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model": "clip"}, "model must be a torch.nn.Module"),
        ({"sources": 3}, "sources must be paths, got 3"),
        ({"sources": [b"photos"]}, "sources must be paths, got bytes"),
        ({"out": None}, "out must be a path"),
        ({"preprocess": None}, "preprocess must be callable"),
        ({"batch_size": 0}, "batch_size must be an int of at least 1, got 0"),
        ({"unit_rows": 1.5}, "unit_rows must be an int"),
        ({"workers": -1}, "workers must be an int of at least 0"),
        ({"raw": 1}, "raw must be True or False"),
        ({"dtype": "bfloat16"}, 'dtype must be "float32", "float16" or None'),
        ({"engine": "spark"}, 'engine must be "local" or "ray"'),
        ({"columns": "label"}, "columns must be a list of names, got 'label'"),
        ({"text": 3}, "text must be text or None"),
        ({"text": "txt"}, "text needs a tokenizer"),
        ({"devices": "cpu"}, "devices must be a list"),
        ({"devices": []}, "devices must be a list"),
        ({"devices": ["nowhere"]}, "devices must be a list of devices, in which each device must be"),
        ({"name": "me"}, "name must be a tuple of 4 names or None"),
        ({"name": (1, 2)}, "name's library must be text or None, got 1"),
        ({"progress": 3}, "progress must be callable"),
        ({"report": None}, "report must be callable"),
    ],
)
def test_a_wrong_argument_is_one_line(options: dict[str, Any], expected: str, embed: Any, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        embed(**options)
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)
    assert not (tmp_path / "DIR").exists()


def test_a_model_without_a_text_tower_is_refused_for_captions(
    embed: Any, tiny: Any, bundled: Any, tmp_path: Path
) -> None:
    assert embed(model=tiny.visual).embeddings == 10
    with pytest.raises(ValueError, match="text"):
        embed(model=tiny.visual, text="txt", tokenizer=bundled[2], out=tmp_path / "other")
    assert not (tmp_path / "other").exists()
