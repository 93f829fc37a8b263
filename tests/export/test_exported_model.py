"""Exported folders in the place of a model: classify, embed and search."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clipkernels as ck
from clipkernels.adapters import UnsupportedTower
from clipkernels.exporting.exported_model import load_exported
from clipkernels.fingerprint import fingerprint
from tests.cli.commands import error, run, succeed
from tests.export.hand_export import pictures, sign

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(written: Path) -> Path:
    """A folder with the three pictures."""
    folder = written.parent / "photos"
    folder.mkdir()
    for index, picture in enumerate(pictures()):
        picture.save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def host() -> tuple[Any, Any, Any]:
    """The model, the preprocessing and the tokenizer that were exported."""
    model, preprocess, tokenizer = ck.bundled()
    return ck.patch(model, ck.EViT(keep=0.7)), preprocess, tokenizer


@torch.no_grad()
def test_an_exported_model_is_encoded_as_its_model(written: Path, host: Any) -> None:
    model, preprocess, tokenizer = load_exported(written)
    pixels = torch.stack([preprocess(picture) for picture in pictures()])
    assert torch.equal(pixels, torch.stack([host[1](picture) for picture in pictures()]))
    expected = ck.encode_image(host[0], pixels).embedding
    assert torch.allclose(ck.encode_image(model, pixels).embedding, expected, atol=1e-4)
    ids = tokenizer(["a cat", "Ärger"])
    assert torch.equal(ids, host[2](["a cat", "Ärger"]))
    assert torch.allclose(model.encode_text(ids), host[0].encode_text(ids), atol=1e-4)
    assert fingerprint(model) == fingerprint(host[0]) and fingerprint(model, "text") == fingerprint(host[0], "text")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again.encode_image(pixels), model.encode_image(pixels))
    assert model.encode_image(pixels.double()).dtype == torch.float64
    assert "Runtime(" in repr(model) and "EViT(keep=0.7" in repr(model)


def test_an_exported_model_has_its_embedding_alone(written: Path) -> None:
    model, images = load_exported(written).model, torch.zeros(1, 3, 32, 32)
    with pytest.raises(UnsupportedTower, match="expected a model in PyTorch for more than the embedding"):
        ck.encode_image(model, images, tokens=True)
    with pytest.raises(UnsupportedTower, match="got an exported one, whose method is fixed"):
        ck.patch(model, ck.Dense())
    with pytest.raises(ValueError, match=r"images must be \(B,3,32,32\), got"):
        ck.encode_image(model, images[..., :16])


@torch.no_grad()
def test_a_classifier_takes_an_exported_model(written: Path, host: Any) -> None:
    model, preprocess, tokenizer = load_exported(written)
    pixels = torch.stack([preprocess(picture) for picture in pictures()])
    logits = ck.Classifier(model, tokenizer, ["cat", "dog"])(pixels)
    assert torch.allclose(logits, ck.Classifier(host[0], host[2], ["cat", "dog"])(pixels), atol=1e-3)


def test_classify_takes_an_exported_folder(written: Path, photos: Path, tmp_path: Path) -> None:
    options = ["--classes", "zero,one,two", "--format", "json"]
    result = succeed("classify", photos, "--model", written, *options)
    expected = json.loads(succeed("classify", photos, "--method", "evit:0.7", *options).stdout)
    actual = json.loads(result.stdout)
    assert len(actual) == 3 and ") in onnx, fp32" in result.stderr
    for row, right in zip(actual, expected, strict=True):
        assert row["class"] == right["class"] and row["probability"] == pytest.approx(right["probability"], abs=1e-4)


def test_embed_and_search_take_an_exported_folder(written: Path, photos: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    pytest.importorskip("faiss", reason="faiss is not installed")
    collections = {"exported": ["--model", written], "host": ["--method", "evit:0.7"]}
    rows = {}
    for name, options in collections.items():
        succeed("embed", photos, "--out", tmp_path / name, "--workers", 0, *options)
        table = parquet.read_table(tmp_path / name / "embeddings")
        rows[name] = np.stack(table.sort_by("id")["embedding"].to_numpy(zero_copy_only=False))
    assert np.allclose(rows["exported"], rows["host"], atol=1e-5)
    settings = json.loads((tmp_path / "exported" / "manifest.json").read_text())["settings"]
    other = json.loads((tmp_path / "host" / "manifest.json").read_text())["settings"]
    assert settings["model"] == str(written) and settings["library"] == "open_clip"
    different = {name for name in settings if settings[name] != other[name]}
    assert different == {"library", "model", "preprocess"}
    again = succeed("embed", photos, "--out", tmp_path / "exported", "--workers", 0, "--model", written)
    assert "0 images embedded" in again.stderr
    for query in (["--image", photos / "1.png"], ["a photo"]):
        hits = {
            name: json.loads(succeed("search", tmp_path / name, *query, "--format", "json").stdout)["hits"]
            for name in collections
        }
        assert [hit["id"] for hit in hits["exported"]] == [hit["id"] for hit in hits["host"]]
        scores = [[hit["score"] for hit in hits[name]] for name in collections]
        assert np.allclose(*scores, atol=1e-5)
    hits = ck.search(tmp_path / "exported", image=photos / "2.png", k=1)
    assert hits[0].id.endswith("2.png") and hits[0].score == pytest.approx(1, abs=1e-5)


def test_captions_are_embedded_by_an_exported_folder(written: Path, photos: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    shutil.copytree(photos, tmp_path / "photos")
    for index in range(3):
        (tmp_path / "photos" / f"{index}.txt").write_text(f"picture {index}")
    succeed(
        "embed", tmp_path / "photos", "--out", tmp_path / "out", "--model", written, "--text", "txt", "--workers", 0
    )
    table = parquet.read_table(tmp_path / "out" / "embeddings").sort_by("id")
    _, _, tokenizer = load_exported(written)
    with torch.no_grad():
        expected = load_exported(written).model.encode_text(tokenizer([f"picture {index}" for index in range(3)]))
    actual = np.stack(table["text_embedding"].to_numpy(zero_copy_only=False))
    assert np.allclose(actual, torch.nn.functional.normalize(expected), atol=1e-5)


def test_options_that_an_export_has_fixed_are_refused(written: Path, photos: Path, tmp_path: Path) -> None:
    classify = ["classify", photos, "--model", written, "--classes", "a,b"]
    assert "expected no --method with an exported model, which runs EViT(keep=0.7" in error(
        run(*classify, "--method", "none")
    )
    assert "expected no --precision with an exported model" in error(run(*classify, "--precision", "bf16"))
    assert "expected no --pretrained with" in error(run(*classify, "--pretrained", "openai"))
    assert "expected no --library with" in error(run(*classify, "--library", "timm"))
    shutil.copytree(written, tmp_path / "out")
    content = json.loads((written / "export.json").read_text(encoding="utf-8"))
    del content["sha256"]
    sign(tmp_path / "out", {**content, "text": None, "tokenizer": None})
    line = error(run("classify", photos, "--model", tmp_path / "out", "--classes", "a,b"))
    assert "expected an exported folder with a text tower, got" in line
    (tmp_path / "out" / "image.onnx").write_bytes(b"")
    line = error(run("embed", photos, "--out", tmp_path / "c", "--model", tmp_path / "out"))
    assert "got another image.onnx (its SHA-256 differs)" in line and not (tmp_path / "c").exists()
