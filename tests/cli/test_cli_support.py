"""`clipkernels support build`: files, messages and refusals, on the bundled model and digits."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import Result
from PIL import Image

import clipkernels as ck
from clipkernels import support
from clipkernels.cli.parts.demo_images import QUICK, draw, save
from clipkernels.data import digits
from clipkernels.images import draw_images
from clipkernels.support import SupportSet
from tests.cli import commands
from tests.cli.commands import error

DIGITS = ",".join(digits.CLASSES)
pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object) -> Result:
    return commands.run("support", *arguments)


@pytest.fixture(scope="module")
def digit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick demo's digits, a folder per class."""
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    folder = tmp_path_factory.mktemp("pictures")
    save({"digits": draw(QUICK, seed=0)["digits"]}, folder)
    return folder / "digits"


@pytest.fixture
def pictures(digit_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digit_folder, tmp_path / "digits"))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of a stand-in for Stable Diffusion, which makes noise from its generators."""
    calls: list[dict[str, Any]] = []

    def pipeline(**arguments: Any) -> Any:
        calls.append(arguments)
        noise = [torch.randint(0, 256, (32, 32, 3), generator=g, dtype=torch.uint8) for g in arguments["generator"]]
        return SimpleNamespace(images=[Image.fromarray(pixels.numpy()) for pixels in noise])

    monkeypatch.setattr(sys.modules["clipkernels.cli.support"], "load_pipeline", lambda source, device: pipeline)
    return calls


def test_a_set_is_built_from_a_folder(pictures: Path, tmp_path: Path) -> None:
    common = ("--classes", DIGITS, "--per-class", 5, "--format", "json", "--template", "the handwritten digit {}.")
    common += ("--shared",)
    result = run("build", tmp_path / "set", "--from-folder", pictures, *common)
    assert result.exit_code == 0, result.output
    assert result.stderr == f"50 retrieved images of 10 classes in {tmp_path / 'set'}\n"
    model, preprocess, tokenizer = ck.bundled()
    built = SupportSet.load(tmp_path / "set", model)
    prompts = support.photo(digits.CLASSES, ("the handwritten digit {}.",))
    expected = support.retrieve(model, preprocess, tokenizer, prompts, pictures, per_class=5, shared=True)
    assert torch.equal(built.features, expected.features) and built.classes == digits.CLASSES
    table = json.loads(result.stdout)
    assert (table["kind"], table["model"], table["settings"]["per_class"]) == ("LC", "bundled", 5)
    text = support.class_embeddings(model, tokenizer, prompts)
    for k, row in enumerate(table["classes"]):
        mean = (built.features[built.labels == k] @ text[k]).mean().item()
        assert row == {"class": digits.CLASSES[k], "images": 5, "similarity": pytest.approx(mean, abs=1e-5)}
    folders = [Path(image.path).parent.name for image in expected.images]
    correct = sum(name == digits.CLASSES[label] for name, label in zip(folders, built.labels.tolist(), strict=True))
    assert correct >= 25  # out of 50; chance gives 5
    result = run("build", tmp_path / "same", "--from-embeddings", *tmp_path.glob("digits.*.safetensors"), *common)
    assert result.exit_code == 0, result.output
    same = SupportSet.load(tmp_path / "same", model)
    assert torch.equal(same.features, built.features)


def test_the_table_and_the_csv_hold_the_same(pictures: Path, tmp_path: Path) -> None:
    common = ("build", tmp_path / "set", "--from-folder", pictures, "--classes", "nine,[red] one", "--per-class", 2)
    table = run(*common)
    result = run(*common, "--format", "csv", "--output", tmp_path / "out.csv")
    rows = list(csv.DictReader((tmp_path / "out.csv").open(encoding="utf-8")))
    assert result.stdout == "" and [(row["class"], row["images"]) for row in rows] == [
        ("nine", "2"),
        ("[red] one", "2"),
    ]
    assert all(row["class"] in table.stdout and f"{float(row['similarity']):.4f}" in table.stdout for row in rows)


def test_a_set_is_brought_up_to_date_with_its_folders(pictures: Path, tmp_path: Path) -> None:
    run("build", tmp_path / "set", "--from-folder", pictures, "--classes", "two,one", "--per-class", 3)
    min((tmp_path / "set" / "one").iterdir()).unlink()
    shutil.copy(pictures / "two" / "0009.png", tmp_path / "set" / "two" / "mine.png")
    result = run("build", tmp_path / "set", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [(row["class"], row["images"]) for row in rows] == [("two", "4"), ("one", "2")]
    assert SupportSet.load(tmp_path / "set", ck.bundled()[0]).labels.tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("photo", ["a photo of a cat."]),
        ("ensemble", [template.replace("{}", "cat") for template in support.ENSEMBLE]),
        ("cupl", ["A cat has fur."]),
        ("combined", [*(template.replace("{}", "cat") for template in support.ENSEMBLE), "A cat has fur."]),
    ],
)
def test_prompts_are_of_the_chosen_kind(kind: str, expected: list[str], pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "sentences.json").write_text(json.dumps({"cat": ["A cat has fur.", "?"], "dog": ["It barks."]}))
    sentences = ("--cupl", tmp_path / "sentences.json") if kind in ("cupl", "combined") else ()
    options = ("--classes", "cat", "--prompts", kind, *sentences)
    result = run("build", tmp_path / "set", "--from-folder", pictures, *options)
    assert result.exit_code == 0, result.output
    assert SupportSet.load(tmp_path / "set", ck.bundled()[0]).prompts == {"cat": expected}


def test_files_that_are_not_images_give_status_one(pictures: Path, tmp_path: Path) -> None:
    (pictures / "text.png").write_text("no image")
    result = run("build", tmp_path / "set", "--from-folder", pictures, "--classes", "one")
    assert result.exit_code == 1
    assert f"skipped {pictures / 'text.png'}: not an image (no format that is read)\n" in result.stderr
    assert f"60 retrieved images of 1 class in {tmp_path / 'set'}; 1 skipped\n" in result.stderr
    assert len(SupportSet.load(tmp_path / "set", ck.bundled()[0]).images) == 60


def test_photographs_fill_a_class_each_and_a_warning_says_which_lack(pictures: Path, tmp_path: Path) -> None:
    (pictures / "notes.txt").touch()
    common = ("build", tmp_path / "set", "--from-folder", pictures, "--classes", "zero,one,two")
    result = run(*common, "--format", "csv")
    counts = {row["class"]: int(row["images"]) for row in csv.DictReader(io.StringIO(result.stdout))}
    assert result.exit_code == 0 and sum(counts.values()) == 60
    listed = ", ".join(f"{name!r} ({count})" for name, count in counts.items())
    assert result.stderr == (
        f"warning: expected 100 images per class, got fewer of {listed}\n"
        f"60 retrieved images of 3 classes in {tmp_path / 'set'}\nskipped 1 .txt: not images\n"
    )
    shared = run(*common, "--shared", "--per-class", 60, "--format", "csv")
    assert [row["images"] for row in csv.DictReader(io.StringIO(shared.stdout))] == ["60"] * 3
    assert "fewer" not in shared.stderr
    assert SupportSet.load(tmp_path / "set", ck.bundled()[0]).about["settings"]["shared"] is True


def test_a_limit_draws_the_same_images_by_the_same_seed(pictures: Path, tmp_path: Path) -> None:
    drawn = {}
    for limit, seed in ((6, 0), (6, 1), (9, 0)):
        options = ("--from-folder", pictures, "--classes", "one,two", "--shared", "--limit", limit, "--seed", seed)
        assert run("build", tmp_path / "set", *options, "--no-copy").exit_code == 0
        images = SupportSet.load(tmp_path / "set", ck.bundled()[0]).images
        drawn[limit, seed] = {image.path for image in images}
    assert {key: len(paths) for key, paths in drawn.items()} == {(6, 0): 6, (6, 1): 6, (9, 0): 9}
    assert drawn[6, 0] < drawn[9, 0] and drawn[6, 0] != drawn[6, 1]
    assert drawn[6, 0] == set(draw_images(sorted(map(str, pictures.rglob("*.png"))), 6, None))


def test_a_set_keeps_the_rules_that_its_images_were_read_by(pictures: Path, tmp_path: Path) -> None:
    options = ("--from-folder", pictures, "--classes", "one,two", "--per-class", 2, "--no-exif")
    assert run("build", tmp_path / "set", *options).exit_code == 0
    model = ck.bundled()[0]
    assert SupportSet.load(tmp_path / "set", model).about["reader"] == "1, no EXIF"
    assert run("build", tmp_path / "set").exit_code == 0
    assert SupportSet.load(tmp_path / "set", model).about["reader"] == "1, no EXIF"
    common = ["classify", str(pictures / "one"), "--head", "tipx", "--support", str(tmp_path / "set")]
    assert commands.run(*common, "--no-exif").exit_code == 0
    refused = error(commands.run(*common))
    assert "expected a support set of images that were read alike (reader '1'), got '1, no EXIF'" in refused


def test_classes_without_a_hit_are_one_line_and_no_set(pictures: Path, tmp_path: Path) -> None:
    options = ("--classes", "one,two", "--minimum", 0.99)
    line = error(run("build", tmp_path / "set", "--from-folder", pictures, *options))
    assert "score of at least 0.99 for every class, got none for 'one', 'two'" in line
    assert not (tmp_path / "set").exists()


def test_no_copy_leaves_the_images_where_they_are(pictures: Path, tmp_path: Path) -> None:
    cache = ("--cache", tmp_path / "cache")
    run("build", tmp_path / "set", "--from-folder", pictures, "--classes", "one", "--no-copy", *cache)
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["features.safetensors", "manifest.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "digits", "set"]


def test_a_set_is_generated_as_published_and_resumed(fake: list[dict[str, Any]], tmp_path: Path) -> None:
    options = ("--diffusion", "somebody/something", "--classes", "one,two", "--per-class")
    result = run("build", tmp_path / "set", *options, 2)
    assert result.exit_code == 0, result.output
    assert result.stderr == f"4 generated images of 2 classes in {tmp_path / 'set'}\n"
    settings = [(call["prompt"], call["guidance_scale"], call["num_inference_steps"]) for call in fake]
    assert settings == [([f"a photo of a {name}."], 9.5, 85) for name in ("one", "one", "two", "two")]
    assert run("build", tmp_path / "set", *options, 3).exit_code == 0
    assert len(fake) == 6
    changed = error(run("build", tmp_path / "set", *options, 3, "--seed", 1))
    assert "to be made with seed 1, got 0" in changed
    other = ("--guidance", 2.5, "--steps", 4, "--seed", 3)
    assert run("build", tmp_path / "other", *options, 1, *other).exit_code == 0
    assert (fake[-1]["guidance_scale"], fake[-1]["num_inference_steps"]) == (2.5, 4)
    assert SupportSet.load(tmp_path / "other", ck.bundled()[0]).about["settings"]["seed"] == 3


def test_another_tower_is_refused(registered: str, pictures: Path, tmp_path: Path) -> None:
    run("build", tmp_path / "set", "--from-folder", pictures, "--classes", "one")
    result = run("build", tmp_path / "set", "--model", registered)
    assert result.exit_code == 2
    assert f"expected the tower of {tmp_path / 'set'} (bundled, no tag; float32" in result.stderr.splitlines()[-1]


def test_a_set_is_built_with_an_open_clip_model(registered: str, pictures: Path, tmp_path: Path) -> None:
    options = ("--model", registered, "--classes", "one", "--per-class", 1, "--precision", "bf16")
    result = run("build", tmp_path / "set", "--from-folder", pictures, *options)
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert (manifest["model"], list(manifest["tower"])) == (registered, ["bfloat16"])


@pytest.mark.parametrize(("package", "extra"), [("faiss", "support"), ("diffusers", "diffusion")])
def test_a_missing_extra_is_one_line(package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    source = ("--from-folder", tmp_path) if package == "faiss" else ("--diffusion", "somebody/something")
    assert f"pip install clipkernels[{extra}]" in error(run("build", tmp_path / "set", *source, "--classes", "one"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "got set without manifest.json: give --from-folder or --diffusion to build one"),
        (
            ("--classes", "one"),
            "expected --from-folder or --from-embeddings or --diffusion with --classes, got none of",
        ),
        (("--from-folder", "PICTURES"), "expected --classes or --classes-file, got neither"),
        (("--from-folder", "PICTURES", "--classes", ""), "classes must name at least one class"),
        (("--from-folder", "PICTURES", "--classes", "a,b,a"), "classes must differ, got 'a' 2 times"),
        (("--from-folder", "PICTURES", "--diffusion", "x", "--classes", "a"), "expected one of --from-folder, --from-"),
        (
            ("--from-folder", "PICTURES", "--classes", "a", "--steps", "3"),
            "expected --diffusion with --steps, got --from",
        ),
        (("--diffusion", "x", "--classes", "a", "--minimum", "0.2"), "with --minimum, got --diffusion"),
        (
            ("--diffusion", "x", "--classes", "a", "--no-copy"),
            "expected --from-folder or --from-embeddings with --no-copy",
        ),
        (("--from-folder", "PICTURES", "--classes", "a", "--prompts", "cupl"), "expected --cupl with --prompts cupl"),
        (
            ("--from-folder", "PICTURES", "--classes", "a", "--cupl", __file__),
            "expected --prompts cupl or combined with",
        ),
        (
            ("--from-folder", "PICTURES", "--classes", "a", "--prompts", "ensemble", "--template", "{}"),
            "expected --prompts photo or combined with --template, got ensemble",
        ),
        (("--from-folder", "PICTURES", "--classes", "a", "--template", "a"), "templates must hold {} in place of"),
        (("--from-embeddings", __file__, "--classes", "a", "--no-exif"), "expected --from-folder with --no-exif"),
        (("--diffusion", "x", "--classes", "a", "--shared"), "--from-embeddings with --shared, got --diffusion"),
        (("--from-folder", "PICTURES", "--classes", "a", "--seed", "3"), "expected --diffusion or --limit with --seed"),
        (
            ("--from-folder", "PICTURES", "--classes-file", "no"),
            "class names in --classes-file no, got an error: classes",
        ),
        (("--from-folder", "PICTURES", "--classes", "a", "--minimum", "3"), "minimum must be a cosine"),
        (("--from-folder", "PICTURES", "--classes", "a", "--cache", "no/such/cache"), "got no/such"),
        (("--from-folder", "gone", "--classes", "a"), "'gone' does not exist"),
        (("--from-embeddings", __file__, "--classes", "a"), "expected a safetensors file, got"),
        (("--from-folder", "PICTURES", "--classes", "a", "--device", "abacus"), "expected a device of this machine"),
        (("--from-folder", "PICTURES", "--classes", "a", "--pretrained", "x"), "expected --model with --pretrained x"),
    ],
)
def test_a_wrong_option_is_one_line(
    options: tuple[str, ...], message: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no").touch()
    arguments = [str(pictures) if option == "PICTURES" else option for option in options]
    assert message in error(run("build", "set", *arguments))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000, "JSON that is nested too deeply"),
        (b"[" + b"0," * (1 << 21) + b"0]", "JSON of more than 2097152 values"),
        (b'["A cat has fur."]', "a JSON list instead of an object"),
        (b"A cat has fur.", "text that is not JSON: Expecting value"),
        (b"\xff", "'utf-8' codec can't decode byte 0xff"),
    ],
    ids=["deep", "large", "list", "text", "bytes"],
)
def test_a_file_that_is_not_cupl_is_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "sentences.json"
    file.write_bytes(content)
    options = ("--from-folder", tmp_path, "--classes", "cat", "--prompts", "cupl", "--cupl", file)
    line = error(run("build", tmp_path / "set", *options))
    assert line.startswith(f"error: expected a JSON file of sentences per class, got {file}: {reason}")


def test_a_diffusion_model_that_does_not_load_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(source: str, device: torch.device) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(sys.modules["clipkernels.cli.support"], "load_pipeline", offline)
    line = error(run("build", tmp_path / "set", "--diffusion", "a/b", "--classes", "one,two"), status=1)
    assert line == "error: expected a model that loads, got a/b: no network"


def test_an_interrupted_build_says_so(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("clipkernels.support.features.encode_image", interrupted)
    result = run("build", tmp_path / "set", "--from-folder", pictures, "--classes", "one")
    assert (result.exit_code, result.stdout, result.stderr.strip()) == (130, "", "error: interrupted")


def test_without_a_verb_the_help_is_printed() -> None:
    result = run()
    assert result.exit_code == 0
    assert "build" in result.stdout and "Example:" in result.stdout
    assert "--from-folder" in run("build", "-h").stdout
