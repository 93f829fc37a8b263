"""The verbs on models of transformers and timm: the library's own answers, sigmoids, and models without text."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import clipkernels as ck
from clipkernels import support
from clipkernels.data import digits
from clipkernels.learn.patch_ranking import Rankings
from tests.cli.commands import error, run, save_a_digit_per_class, succeed
from tests.local_transformers import image_processor, save_clip, save_clip_tokenizer, save_siglip

DIGITS = ",".join(digits.CLASSES)
LOCAL = ("--library", "transformers", "--pretrained", "local", "--model")
FAST = ("--window", 2, "--stride", 2, "--step", 8, "--device", "cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten of the quick demo's digits, one per class, in a folder per class."""
    return save_a_digit_per_class(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP of transformers."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("models") / "clip"
    save_clip(folder)
    return folder


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a SigLIP of transformers."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("models") / "siglip"
    save_siglip(folder)
    return folder


def load(folder: Path) -> tuple[Any, Any]:
    """The model and the tokenizer of a folder."""
    from transformers import AutoModel, AutoTokenizer

    where = {"local_files_only": True}
    return AutoModel.from_pretrained(folder, **where).eval(), AutoTokenizer.from_pretrained(folder, **where)


def logits_of(pictures: Path, classifier: ck.Classifier) -> tuple[list[str], torch.Tensor]:
    """The files in order, and their logits (n,K)."""
    files = sorted(pictures.rglob("*.png"))
    images = [Image.open(file).convert("RGB") for file in files]
    with torch.inference_mode():
        return [str(file) for file in files], classifier(image_processor()(images, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("method", ["dense", "evit:0.5"])
def test_classify_takes_a_clip_of_transformers(method: str, clip: Path, pictures: Path) -> None:
    result = succeed("classify", pictures, "--classes", DIGITS, *LOCAL, clip, "--method", method, "--format", "jsonl")
    model, tokenizer = load(clip)
    chosen = ck.Dense() if method == "dense" else ck.EViT(0.5)
    files, logits = logits_of(pictures, ck.Classifier(model, tokenizer, digits.CLASSES, method=chosen))
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["path"] for row in rows] == files
    for row, probabilities in zip(rows, logits.softmax(1), strict=True):
        assert row["class"] == digits.CLASSES[int(probabilities.argmax())]
        assert row["probability"] == pytest.approx(probabilities.max().item(), abs=1e-4)
    assert "probabilities" not in rows[0] and "sigmoid" not in result.stderr


def test_probabilities_of_a_siglip_are_sigmoids(siglip: Path, pictures: Path) -> None:
    common = ("classify", pictures, "--classes", DIGITS, *LOCAL, siglip, "--method", "none", "--format")
    result = succeed(*common, "json")
    model, tokenizer = load(siglip)
    files, logits = logits_of(pictures, ck.Classifier(model, tokenizer, digits.CLASSES))
    cosines = (logits + 5) / 10
    assert cosines.abs().max() <= 1
    rows = json.loads(result.stdout)
    assert [row["path"] for row in rows] == files
    for row, values in zip(rows, (10 * cosines - 5).sigmoid(), strict=True):
        top = values.topk(2)
        assert [row["class"], row["second_class"]] == [digits.CLASSES[k] for k in top.indices]
        assert [row["probability"], row["second_probability"]] == pytest.approx(top.values.tolist(), rel=1e-3)
        assert row["probabilities"] == "sigmoid"
    assert "; probabilities are sigmoids, one for each class by itself" in result.stderr
    [first, *_] = csv.DictReader(io.StringIO(succeed(*common, "csv").stdout))
    assert {key: first[key] for key in ("path", "probabilities")} == {"path": files[0], "probabilities": "sigmoid"}
    heading = succeed(*common, "table").stdout.splitlines()[1]
    assert heading.count("sigmoid") == 2 and "prob." not in heading


def test_an_open_clip_model_with_a_bias_has_sigmoids(
    registered: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = open_clip.factory._MODEL_CONFIGS
    monkeypatch.setitem(configs, registered, {**configs[registered], "init_logit_bias": -5.0})
    torch.manual_seed(1)
    model, _, preprocess = open_clip.create_model_and_transforms(registered)
    model.logit_scale.data.fill_(math.log(10))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    path = min(pictures.rglob("*.png"))
    options = ("--model", registered, "--pretrained", tmp_path / "model.safetensors", "--format", "jsonl")
    for precision in ("fp32", "bf16"):
        result = succeed("classify", path, "--classes", DIGITS, *options, "--precision", precision)
        classifier = ck.Classifier(model.eval(), open_clip.get_tokenizer(registered), digits.CLASSES)
        with torch.inference_mode():
            probabilities = classifier(preprocess(Image.open(path))[None]).sigmoid()
        row = json.loads(result.stdout)
        assert row["probability"] == pytest.approx(probabilities.max().item(), rel=1e-3 if precision == "fp32" else 0.1)


def test_a_published_head_keeps_its_softmax_on_a_siglip(siglip: Path, pictures: Path) -> None:
    options = ("--classes", DIGITS, *LOCAL, siglip, "--head", "calip", "--format", "jsonl")
    result = succeed("classify", pictures, *options)
    assert "sigmoid" not in result.stdout + result.stderr


def test_scale_and_bias_keep_their_precision(tiny: Any) -> None:
    from clipkernels.cli.parts.models import cast_towers

    tiny.logit_scale.data.fill_(math.log(10))
    model: Any = cast_towers(tiny, torch.device("cpu"), torch.bfloat16)
    assert model.logit_scale.exp().item() == pytest.approx(10, abs=1e-5)
    assert model.visual.conv1.weight.dtype == model.token_embedding.weight.dtype == torch.bfloat16
    assert model.logit_bias is None


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_predictor_is_ranked_trained_and_used(
    family: str, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(family)
    ranks, predictor = tmp_path / "ranks.safetensors", tmp_path / "predictor.safetensors"
    succeed("rank", pictures, "--folder-labels", "--block", 1, *FAST, *LOCAL, folder, "--output", ranks)
    rankings = Rankings.load(ranks)
    model, tokenizer = load(folder)
    names = sorted(path.name for path in pictures.iterdir())
    text = support.class_embeddings(model, tokenizer, support.photo(names))
    files = sorted(pictures.rglob("*.png"))
    images = torch.cat([logits_of(file.parent, lambda pixels: pixels)[1] for file in files])
    expected = ck.learn.patch_ranking.golden_ranking(
        model, images, text=text, labels=[names.index(file.parent.name) for file in files],
        block=1, window=2, stride=2, step=8,
    )  # fmt: skip
    assert torch.equal(rankings.ranks, expected.ranks)
    succeed("train-predictor", ranks, "--epochs", 2, "--output", predictor, "--device", "cpu")
    options = ("--method", "patch-ranking:0.5", "--predictor", predictor)
    result = succeed("classify", pictures, "--classes", DIGITS, *LOCAL, folder, *options)
    assert "PatchRanking(keep=0.5), tokens 1" in result.stderr


def test_support_build_takes_transformers(siglip: Path, pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    common = ("--from-folder", pictures, "--cache", tmp_path / "cache.safetensors", "--per-class", 2, "--shared")
    options = (*LOCAL, siglip, "--classes", DIGITS, "--format", "json")
    result = succeed("support", "build", tmp_path / "set", *common, *options)
    model, tokenizer = load(siglip)
    built = support.SupportSet.load(tmp_path / "set", model)
    text = support.class_embeddings(model, tokenizer, support.photo(digits.CLASSES))
    files = sorted(pictures.rglob("*.png"))
    features = torch.cat([logits_of(file.parent, lambda pixels: embed(model, pixels))[1] for file in files])
    scores = features @ text.T
    for label in range(10):
        expected = scores[:, label].topk(2).values
        found = (built.features[built.labels == label] @ text[label]).sort(descending=True)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    rows = json.loads(result.stdout)["classes"]
    assert rows[0]["similarity"] == pytest.approx(scores[:, 0].topk(2).values.mean().item(), abs=1e-4)
    answers = succeed("classify", pictures, *LOCAL, siglip, "--head", "tipx", "--support", tmp_path / "set")
    assert "10 images" in answers.stderr


def embed(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(ck.encode_image(model, pixels).embedding)


def test_timm_ranks_by_feature_and_classifies_nothing(pictures: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(1)
    model = timm.create_model("test_vit").eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    tower = ("--library", "timm", "--model", "test_vit", "--pretrained", tmp_path / "vit.safetensors")
    path = min(pictures.rglob("*.png"))
    options = ("--window", 5, "--stride", 5, "--step", 50, "--device", "cpu", "--output", tmp_path / "ranks")
    succeed("rank", path, "--score", "feature", *options, *tower)
    preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image = preprocess(Image.open(path).convert("RGB"))
    expected = ck.learn.patch_ranking.golden_ranking(
        model, image[None], score="feature", window=5, stride=5, step=50, block=3
    )
    assert torch.equal(Rankings.load(tmp_path / "ranks").ranks, expected.ranks)
    expected_line = "got timm's test_vit: timm has no text tower"
    assert expected_line in error(run("classify", path, "--classes", "a", *tower))
    assert expected_line in error(run("rank", path, "--classes", "a", *options, *tower))
    built = ("support", "build", tmp_path / "set", "--from-folder", pictures, "--classes", "a")
    assert expected_line in error(run(*built, *tower))


def test_a_folder_without_a_text_tower_or_a_tokenizer_is_one_line(clip: Path, pictures: Path, tmp_path: Path) -> None:
    from clipkernels.testing import transformers_tower

    common = ("classify", pictures, "--classes", "a", "--library", "transformers", "--pretrained", "local", "--model")
    model, _ = load(clip)
    model.save_pretrained(tmp_path / "bare")
    image_processor().save_pretrained(tmp_path / "bare")
    # By version transformers refuses, or makes an empty tokenizer.
    line = error(run(*common, tmp_path / "bare"), status=1)
    assert "bare to hold a tokenizer, got one without a vocabulary" in line or "expected a model that loads" in line
    transformers_tower("CLIPVisionModel", 1, image_size=32, patch_size=8).save_pretrained(tmp_path / "vision")
    image_processor().save_pretrained(tmp_path / "vision")
    save_clip_tokenizer(tmp_path / "vision")
    assert "model must be a CLIP with" in error(run(*common, tmp_path / "vision"))


def test_a_library_needs_a_model(pictures: Path) -> None:
    for verb in (("classify", pictures), ("rank", pictures, "--output", "x"), ("support", "build", "x")):
        options = ("--classes", "a", "--from-folder", pictures) if verb[0] == "support" else ("--classes", "a")
        message = error(run(*verb, *options, "--library", "transformers"))
        assert message == "error: expected --model with --library transformers, got no --model"


def test_verbs_name_the_classes_that_are_cut_in_one_line(pictures: Path, tmp_path: Path) -> None:
    long = "a digit with a name that is too long to be read three"
    line = f"warning: the tokenizer cuts prompts of '{long}', which are too long for the text tower: "
    classes = ("--classes", f"one,{long}")
    path = min(pictures.rglob("*.png"))
    rank = ("rank", path, *classes, "--output", tmp_path / "ranks", "--window", 4, "--stride", 4, "--step", 32)
    assert succeed("classify", path, *classes).stderr.count(line) == 1
    assert succeed(*rank).stderr.count(line) == 1
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    built = ("support", "build", tmp_path / "set", "--from-folder", pictures, "--cache", tmp_path / "cache")
    assert succeed(*built, *classes).stderr.count(line) == 1
    assert "warning" not in succeed("classify", path, "--classes", "one,two").stderr
