"""The verbs on folders of `ck.save`: the folder's model, tokenizer and method."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import clipkernels as ck
from clipkernels.cli.parts import demo_images
from clipkernels.cli.parts.demo_images import QUICK
from clipkernels.data import digits
from clipkernels.testing import randomized, timm_tower
from clipkernels.testing.towers import patch_ranking
from tests.cli.commands import error, run, save_a_digit_per_class, succeed
from tests.local_transformers import clip_model, image_processor, save_clip_tokenizer

DIGITS = ",".join(digits.CLASSES)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten of the quick demo's digits, one per class, in a folder per class."""
    return save_a_digit_per_class(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundled model, whose weights are changed a little, and a method with a predictor."""
    model, preprocess, tokenizer = ck.bundled()
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.mul_(1.01)
    ck.patch(model, patch_ranking(model))
    folder = tmp_path_factory.mktemp("models") / "tower"
    ck.save(model, folder, preprocess=preprocess, tokenizer=tokenizer)
    return folder


def embeddings_of(folder: Path, pictures: Path, method: Any) -> torch.Tensor:
    model, preprocess, _ = ck.load(folder)
    images = torch.stack([preprocess(Image.open(path).convert("RGB")) for path in sorted(pictures.rglob("*.png"))])
    model = ck.unpatch(model) if method is None else ck.patch(model, method)
    with torch.inference_mode():
        return torch.nn.functional.normalize(ck.encode_image(model, images).embedding)


@pytest.mark.parametrize("spec", [None, "none", "evit:0.5"])
def test_classify_takes_the_method_of_the_folder(spec: str | None, tower: Path, pictures: Path) -> None:
    options = ("--classes", DIGITS, "--model", tower, "--format", "jsonl")
    result = succeed("classify", pictures, *options, *(() if spec is None else ("--method", spec)))
    model, preprocess, tokenizer = ck.load(tower)
    own = ck.method_of(model)
    classifier = ck.Classifier(model, tokenizer, digits.CLASSES, method=ck.EViT(0.5) if spec == "evit:0.5" else own)
    if spec == "none":
        ck.unpatch(model)
    names = {None: "PatchRanking(keep=0.5)", "none": "the host library, dense", "evit:0.5": "EViT(keep=0.5)"}
    assert names[spec] in result.stderr
    for row in map(json.loads, result.stdout.splitlines()):
        with torch.inference_mode():
            logits = classifier(preprocess(Image.open(row["path"]).convert("RGB"))[None])
        assert row["probability"] == pytest.approx(logits.softmax(1).max().item(), abs=1e-4)


@pytest.mark.parametrize("spec", [None, "none", "tome:4"])
def test_a_collection_names_the_folder(
    spec: str | None, tower: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as parquet

    monkeypatch.chdir(tower.parent)
    method = () if spec is None else ("--method", spec)
    out = tmp_path / "out"
    result = succeed("embed", pictures, "--out", out, "--model", tower.name, "--workers", 0, *method)
    assert ("note: PatchRanking(keep=0.5) changes" in result.stderr) is (spec is None)
    manifest = json.loads((out / "manifest.json").read_text())
    settings = manifest["settings"]
    assert [settings[key] for key in ("library", "model", "pretrained")] == ["open_clip", str(tower), None]
    assert manifest["spec"] == spec
    chosen = {None: ck.method_of(ck.load(tower).model), "none": None, "tome:4": ck.ToMe(4)}[spec]
    expected = embeddings_of(tower, pictures, chosen)
    table = parquet.read_table(out / "embeddings")
    rows = torch.tensor(table.sort_by("id")["embedding"].to_pylist())
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)
    monkeypatch.chdir(tmp_path)
    path = min(pictures.rglob("*.png"))
    found = succeed("search", out, "--image", path, "--format", "json")
    assert json.loads(found.stdout)["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert "warning" not in found.stderr
    if spec != "tome:4":  # whose spelling only the command line reads
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert ck.search(out, image=path, k=1)[0].score == pytest.approx(1, abs=1e-5)
    hits = json.loads(succeed("search", out, "a digit", "--format", "json").stdout)["hits"]
    assert [hit["id"] for hit in hits] == [hit.id for hit in ck.search(out, "a digit")] and len(hits) == 10


def test_bench_has_a_row_of_the_method_of_the_folder(tower: Path, pictures: Path) -> None:
    options = ("--model", tower, "--rounds", 1, "--format", "json", "--limit", 4)
    rows = json.loads(succeed("bench", pictures, *options).stdout)["rows"]
    assert [row["variant"] for row in rows] == ["dense (host)", "Dense()", "PatchRanking(keep=0.5)"]
    assert rows[0]["cosine_min"] > 0.99999 > rows[2]["cosine_min"]
    assert rows[0]["weights"] == "saved" and rows[0]["tokens"][-1] == 65


def test_show_and_demo_take_a_folder(
    tower: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_images, "QUICK", QUICK._replace(digits=6, scenes=1, unseen=1))
    options = ("--out", tmp_path / "kept.png", "--model", tower, "--format", "json")
    rows = json.loads(succeed("show", pictures, "--limit", 2, "--method", "tome:8", *options).stdout)["rows"]
    path = Path(rows[0]["path"])
    expected = ck.load(tower)
    image = expected.preprocess(Image.open(path).convert("RGB"))[None]
    dense = ck.encode_image(ck.unpatch(expected.model), image).embedding
    merged = ck.encode_image(ck.patch(expected.model, ck.ToMe(8)), image).embedding
    assert rows[0]["cosine"] == pytest.approx(torch.cosine_similarity(dense, merged).item(), abs=1e-5)
    own = json.loads(succeed("show", path, *options).stdout)["rows"]
    assert [row["method"] for row in own] == ["PatchRanking(keep=0.5)"]
    demo = succeed("demo", "--quick", "--model", tower)
    assert f"Timing the bundled CLIP and {tower}, dense" in demo.stderr
    table = demo.stdout.partition(f"{tower}, saved weights")[2]
    assert "PatchRanking(keep=0.5)" in table and "EViT" not in table.partition("dense (host) is")[0]


def test_rank_and_support_build_take_a_folder(tower: Path, pictures: Path, tmp_path: Path) -> None:
    fast = ("--window", 4, "--stride", 4, "--step", 32, "--device", "cpu")
    common = ("--folder-labels", "--block", 1, *fast, "--model", tower)
    succeed("rank", pictures, *common, "--output", tmp_path / "ranks.safetensors")
    succeed("train-predictor", tmp_path / "ranks.safetensors", "--epochs", 1, "--output", tmp_path / "predictor",
            "--device", "cpu")  # fmt: skip
    result = succeed("classify", pictures, "--classes", DIGITS, "--model", tower, "--method", "patch-ranking:0.9",
                     "--predictor", tmp_path / "predictor")  # fmt: skip
    assert "PatchRanking(keep=0.9)" in result.stderr
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    source = ("--from-folder", pictures, "--cache", tmp_path / "cache", "--per-class", 1, "--classes", DIGITS)
    succeed("support", "build", tmp_path / "set", *source, "--shared", "--model", tower)
    about = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert "PatchRanking" in about["method"] and about["model"] == str(tower)


def test_a_folder_of_transformers_needs_no_library(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, tokenizer = ck.patch(clip_model(), ck.EViT(0.5)), save_clip_tokenizer(tmp_path / "tokenizer")
    ck.save(model, tmp_path / "tower", tokenizer=tokenizer, preprocess=image_processor())
    common = ("classify", pictures, "--classes", "a,b", "--model", tmp_path / "tower")
    result = succeed(*common)
    assert "EViT(keep=0.5)" in result.stderr and "warning" not in result.stderr and "Loading" not in result.stderr
    assert succeed(*common, "--library", "transformers", "--pretrained", "local").stdout == result.stdout
    ck.save(model, tmp_path / "bare")
    line = error(run("classify", pictures, "--classes", "a", "--model", tmp_path / "bare"))
    assert line.endswith("bare to hold a tokenizer, got none: pass tokenizer= to ck.save")
    result = succeed("rank", pictures, "--score", "feature", "--model", tmp_path / "bare", "--output",
                     tmp_path / "ranks", "--block", 1, "--window", 2, "--stride", 2, "--step", 8)  # fmt: skip
    assert "has no image processor" in result.stderr


def test_options_that_a_folder_does_not_take_are_one_line(tower: Path, pictures: Path, tmp_path: Path) -> None:
    common = ("classify", pictures, "--classes", "a", "--model")
    line = error(run(*common, tower, "--pretrained", "openai"))
    assert line == f"error: expected no --pretrained with {tower}, which holds its weights, got openai"
    line = error(run(*common, tower, "--library", "timm"))
    assert line == f"error: expected no --library with {tower}, a model of open_clip, got timm"
    ck.save(randomized(timm_tower("test_vit", 2)), tmp_path / "timm")
    line = error(run(*common, tmp_path / "timm"))
    assert line.startswith(f"error: expected a model with a text tower, got {tmp_path / 'timm'}: timm's VisionTransf")
    header = tmp_path / "timm" / "clipkernels.json"
    header.write_text(header.read_text().replace("float32", "float16"))
    assert "another header than was written" in error(run("bench", pictures, "--model", tmp_path / "timm"))
