"""`clipkernels rank`, `train-predictor` and patch-ranking: the library's own answers, and refusals."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from PIL import Image

import clipkernels as ck
from clipkernels import support
from clipkernels.cli.parts.demo_images import QUICK, draw, save
from clipkernels.data import digits
from clipkernels.images import Reader
from clipkernels.images.batches import Pictures
from clipkernels.learn.patch_ranking import (
    Rankings,
    RankPredictor,
    VisualTokens,
    fit_predictor,
    golden_ranking,
)
from clipkernels.support import class_embeddings
from tests.cli.commands import error_after_warnings as error
from tests.cli.commands import run, succeed

DIGITS = ",".join(digits.CLASSES)
HERE = ("--device", "cpu")  # where the library runs in these tests, too
FAST = ("--window", 4, "--stride", 4, "--step", 32, *HERE)
pytestmark = pytest.mark.usefixtures("one_thread")


def json_of(*arguments: object) -> dict[str, Any]:
    """Return the JSON of a command that succeeds."""
    return json.loads(succeed(*arguments, "--format", "json").stdout)


def matplotlib() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick demo's digits, a folder per class."""
    folder = tmp_path_factory.mktemp("pictures")
    save({"digits": draw(QUICK, seed=0)["digits"]}, folder)
    return folder / "digits"


@pytest.fixture(scope="module")
def files(pictures: Path) -> list[Path]:
    """Eight of these digits, of different classes."""
    return sorted(pictures.rglob("*.png"))[::7][:8]


@pytest.fixture(scope="module")
def ranks(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rankings of twenty of the digits."""
    file = tmp_path_factory.mktemp("ranks") / "ranks.safetensors"
    assert json_of("rank", pictures, "--folder-labels", *FAST, "--limit", 20, "--output", file)["ranked"] == 20
    return file


@pytest.fixture(scope="module")
def predictor(ranks: Path) -> Path:
    """A predictor that is trained on these rankings."""
    file = ranks.with_name("predictor.safetensors")
    json_of("train-predictor", ranks, "--epochs", 2, "--output", file)
    return file


def preprocessed(files: list[Path]) -> torch.Tensor:
    preprocess = ck.bundled()[1]
    return torch.stack([preprocess(Image.open(file).convert("RGB")) for file in files])


def embeddings(classes: list[str], *templates: str) -> torch.Tensor:
    model, _, tokenizer = ck.bundled()
    return class_embeddings(model, tokenizer, support.photo(classes, templates or support.PHOTO))


SETTINGS = {"window": 4, "stride": 2, "step": 40, "block": 4}


@pytest.mark.parametrize(
    ("options", "score", "classes"),
    [
        (("--folder-labels",), "label", "folders"),
        (("--folder-labels", "--classes", DIGITS), "label", digits.CLASSES),
        (("--folder-labels", "--score", "confidence"), "confidence", "folders"),
        (("--classes", "[red] one,two"), "confidence", ("[red] one", "two")),
        (("--score", "feature"), "feature", None),
    ],
)
def test_rankings_are_those_of_the_library(
    files: list[Path], tmp_path: Path, options: tuple[object, ...], score: Any, classes: Any
) -> None:
    file, folders = tmp_path / "ranks.safetensors", [path.parent.name for path in files]
    numbers = [part for name, number in SETTINGS.items() for part in (f"--{name}", number)]
    record = json_of("rank", *files, *options, *numbers, *HERE, "--output", file)
    names = sorted(set(folders)) if classes == "folders" else list(classes or ())
    expected = golden_ranking(
        ck.bundled()[0],
        preprocessed(files),
        score=score,
        text=embeddings(names) if names else None,
        labels=[names.index(name) for name in folders] if score == "label" else None,
        reader=Reader().rules,
        **SETTINGS,
    )
    actual = Rankings.load(file)
    assert torch.equal(actual.ranks, expected.ranks) and torch.equal(actual.features, expected.features)
    assert actual.about == expected.about
    assert {name: record[name] for name in ("images", "ranked", "patches", "score", *SETTINGS)} == {
        "images": 8,
        "ranked": 8,
        "patches": 64,
        "score": score,
        **SETTINGS,
    }
    assert record["file"] == str(file) and record["images_per_second"] == pytest.approx(8 / record["seconds"], rel=0.05)


def test_table_csv_and_summary_agree(files: list[Path], tmp_path: Path) -> None:
    common = ("rank", *files, "--score", "feature", *FAST, "--output")
    rows = list(csv.DictReader(io.StringIO(run(*common, tmp_path / "a", "--format", "csv").stdout)))
    assert [(row["file"], row["images"], row["ranked"], row["patches"]) for row in rows] == [
        (str(tmp_path / "a"), "8", "8", "64")
    ]
    result = run(*common, tmp_path / "b")
    assert result.exit_code == 0 and all(text in result.stdout for text in ("images/s", "64", "8"))
    assert re.fullmatch(r"8 images of 64 patches, 8 ranked in [\d.]+ s: [\d.]+ images/s\n", result.stderr)


def test_only_new_images_are_ranked(files: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "ranks.safetensors"
    common = ("--folder-labels", "--classes", DIGITS, *FAST, "--output", file)
    assert json_of("rank", *files[:5], *common)["ranked"] == 5
    first = file.read_bytes()
    result = run("rank", *files[:5], *common, "--batch-size", 3)
    assert re.fullmatch(r"5 images of 64 patches, 0 ranked in [\d.]+ s; 5 ranked before\n", result.stderr)
    assert file.read_bytes() == first
    more = json_of("rank", *files, *common)
    assert (more["images"], more["ranked"]) == (8, 3)
    assert json_of("rank", files[0], *common)["images_per_second"] is None
    assert len(Rankings.load(file).ranks) == 8 and list(tmp_path.iterdir()) == [file]


def test_an_interrupted_run_keeps_its_rankings(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, indices = Pictures.__getitem__, []

    def interrupted(self: Pictures, index: int) -> Any:
        indices.append(index)
        if len(indices) == 20:
            raise KeyboardInterrupt
        return read(self, index)

    common = ("rank", pictures, "--folder-labels", *FAST, "--limit", 24, "--output", tmp_path / "ranks [1].safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(Pictures, "__getitem__", interrupted)
        result = run(*common)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "\nerror: interrupted\n")
    result = run(*common)
    assert "24 images of 64 patches, 8 ranked in" in result.stderr and "; 16 ranked before" in result.stderr


def test_a_limit_draws_by_seed_and_a_larger_one_adds(pictures: Path, tmp_path: Path) -> None:
    common = ("rank", pictures, "--score", "feature", *FAST)
    features = {}
    for seed in ((), ("--shuffle", 0), ("--shuffle", 1)):
        file = tmp_path / f"ranks{len(features)}"
        assert json_of(*common, *seed, "--limit", 3, "--output", file)["images"] == 3
        features[seed] = Rankings.load(file).features
    default, zero, one = features.values()
    assert torch.equal(default, zero) and not torch.equal(zero, one)
    more = json_of(*common, "--limit", 5, "--output", tmp_path / "ranks0")
    assert (more["images"], more["ranked"]) == (5, 2)
    assert json_of(*common, "--limit", 100, "--output", tmp_path / "ranks0")["images"] == 60


def test_a_file_that_is_named_twice_is_ranked_once(files: list[Path], tmp_path: Path) -> None:
    common = ("rank", files[0], files[1], files[0], "--score", "feature", *FAST, "--output", tmp_path / "ranks")
    record = json_of(*common)
    assert (record["images"], record["ranked"]) == (3, 2)


def test_other_prompts_or_options_need_another_file(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("zero\n\n one \n", encoding="utf-8")
    file = tmp_path / "ranks.safetensors"
    common = ("rank", files[0], *FAST, "--output", file)
    assert json_of(*common, "--classes", "zero,one")["ranked"] == 1
    assert json_of(*common, "--classes-file", tmp_path / "classes.txt")["ranked"] == 0
    assert json_of(*common, "--classes", "zero,one", "--template", support.PHOTO[0])["ranked"] == 0
    for options in (("--classes", "one,zero"), ("--classes", "zero,one", "--template", "{}.")):
        expected = f"expected rankings with the same classes and prompts, got {file} with others: choose another"
        assert expected in error(run(*common, *options))
    expected = f"expected rankings with the same options, got {file} with"
    for options in (
        ("--classes", "zero,one", "--window", 5),
        ("--classes", "zero,one", "--block", 2),
        ("--score", "feature"),
    ):
        assert expected in error(run(*common, *options))


def test_files_that_are_not_images_are_skipped(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(whole, "JPEG")
    folder = tmp_path / files[0].parent.name
    folder.mkdir()
    broken = [folder / name for name in ("text.png", "short.jpg", "empty.jpg")]
    for path, content in zip(broken, (b"no image", whole.getvalue()[:900], b""), strict=True):
        path.write_bytes(content)
    mixed = [*files[:2], broken[0], files[2], broken[1], *files[3:5], broken[2]]
    reads: Counter[int] = Counter()
    read = Pictures.__getitem__

    def counted(self: Pictures, index: int) -> Any:
        reads[index] += 1
        return read(self, index)

    monkeypatch.setattr(Pictures, "__getitem__", counted)
    common = ("--folder-labels", "--classes", DIGITS, *FAST, "--format", "json")
    result = run("rank", *mixed, *common, "--output", tmp_path / "mixed.safetensors")
    assert result.exit_code == 1
    assert (json.loads(result.stdout)["images"], json.loads(result.stdout)["ranked"]) == (5, 5)
    assert re.findall(r"^skipped (.*?): ", result.stderr, re.MULTILINE) == [str(path) for path in broken]
    assert result.stderr.endswith("; 3 files skipped\n") and set(reads.values()) == {1}
    reads.clear()
    clean = run("rank", *files[:5], *common, "--output", tmp_path / "clean.safetensors")
    assert clean.exit_code == 0 and set(reads.values()) == {1}
    assert (tmp_path / "mixed.safetensors").read_bytes() == (tmp_path / "clean.safetensors").read_bytes()


def test_rankings_keep_the_rules_that_images_were_read_by(files: list[Path], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    upright = Image.open(files[0]).convert("RGB")
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "tagged.png", exif=exif)
    common = ("--score", "feature", *FAST, "--output")
    for name in ("upright", "tagged"):
        json_of("rank", tmp_path / f"{name}.png", *common, tmp_path / name)
    assert (tmp_path / "upright").read_bytes() == (tmp_path / "tagged").read_bytes()
    assert Rankings.load(tmp_path / "tagged").about["reader"] == "1"
    refused = error(run("rank", tmp_path / "tagged.png", "--no-exif", *common, tmp_path / "tagged"))
    assert f"expected rankings with the same options, got {tmp_path / 'tagged'} with reader '1'" in refused
    json_of("rank", tmp_path / "tagged.png", "--no-exif", *common, tmp_path / "stored")
    options = ("train-predictor", tmp_path / "upright", tmp_path / "stored", "--output", tmp_path / "predictor")
    assert f"got {tmp_path / 'stored'} with another reader than {tmp_path / 'upright'}" in error(run(*options))


def test_files_without_an_image_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    result = run("rank", tmp_path, "--score", "feature", *FAST, "--output", tmp_path / "ranks.safetensors")
    assert result.exit_code == 2 and not (tmp_path / "ranks.safetensors").exists()
    assert "expected images, got 1 file that cannot be used, such as" in result.stderr.splitlines()[-1]


def test_rankings_record_precision_and_model(files: list[Path], tmp_path: Path, registered: str) -> None:
    common = ("rank", *files[:2], "--score", "feature", "--window", 2, "--stride", 2, "--step", 8)
    json_of(*common, "--precision", "bf16", "--output", tmp_path / "low")
    assert list(Rankings.load(tmp_path / "low").about["tower"]) == ["bfloat16"]
    record = json_of(*common, "--model", registered, "--output", tmp_path / "other")
    assert record["patches"] == 16 and Rankings.load(tmp_path / "other").about["width"] == 64


def test_a_picture_shows_the_first_images_and_their_rankings(pictures: Path, tmp_path: Path) -> None:
    matplotlib()
    common = ("rank", pictures, "--score", "feature", "--window", 8, "--stride", 8, "--step", 64, "--output")
    for count, (width, height) in {1: (200, 500), 14: (900, 1500)}.items():
        options = ("--limit", count, "--plot", tmp_path / "ranks.png")
        assert run(*common, tmp_path / "ranks.safetensors", *options).exit_code == 0
        with Image.open(tmp_path / "ranks.png") as picture:
            assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 24) or ()) > 100
            assert width < picture.width < width + 200 and height < picture.height < height + 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks.png", "ranks.safetensors"]


def test_a_picture_draws_names_literally(files: list[Path], tmp_path: Path) -> None:
    matplotlib()
    odd = tmp_path / "a name that is longer than its image is wide, with $x_{ in it.png"
    odd.write_bytes(files[0].read_bytes())
    common = ("--score", "feature", *FAST, "--output", tmp_path / "ranks.safetensors")
    assert run("rank", odd, *common, "--plot", tmp_path / "ranks.svg").exit_code == 0
    assert "<svg" in (tmp_path / "ranks.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("verb", ["rank", "train-predictor"])
def test_a_picture_without_matplotlib_names_the_package(
    verb: str, ranks: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    argument = {"rank": files[0], "train-predictor": ranks}[verb]
    result = run(verb, argument, "--plot", tmp_path / "x.png", "--output", tmp_path / "out.safetensors")
    assert "expected matplotlib for --plot (pip install matplotlib)" in error(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "or --classes-file, got neither: give --folder-labels if the folders are named like the classes"),
        (("--classes", "a", "--classes-file", __file__), "expected --classes or --classes-file, got both"),
        (("--classes", "a,b,a"), "classes must differ, got 'a' 2 times"),
        (("--classes", "a", "--template", "a photo"), "templates must hold {} in place of the class name"),
        (("--classes", "a", "--folder-labels"), "expected folders named like the classes, got"),
        (("--score", "label", "--classes", "a"), "expected --folder-labels with --score label, got none"),
        (("--score", "feature", "--classes", "a"), "expected --score label or confidence with --classes, got feature"),
        (("--score", "feature", "--classes-file", __file__), "with --classes-file, got feature"),
        (("--score", "feature", "--template", "{}"), "with --template, got feature"),
        (("--score", "feature", "--folder-labels"), "with --folder-labels, got feature"),
        (("--score", "logit"), "'logit' is not one of"),
        (("--folder-labels", "--window", 9), "window must be an int from 1 to 8, got 9"),
        (("--folder-labels", "--stride", 3), "stride must be an int from 1 to 2, got 3"),
        (("--folder-labels", "--step", 0), "step must be an int from 1 to 64, got 0"),
        (("--folder-labels", "--block", 6), "block must be an int from 0 to 5, got 6"),
        (("--folder-labels", "--batch-size", 0), "--batch-size"),
        (("--folder-labels", "--limit", 0), "--limit"),
        (("--folder-labels", "--device", "abacus"), "expected a device of this machine, got 'abacus'"),
        (("--folder-labels", "--pretrained", "openai"), "expected --model with --pretrained openai"),
        (("--folder-labels", "--plot", "out.gif"), "expected a file ending in .png, .svg, .pdf for --plot"),
        (("--folder-labels", "--output", "."), "expected a regular file for --output, got ."),
        (("--folder-labels", "--output", "nowhere/x"), "expected a file that can be written for --output, got nowhere"),
        (("--folder-labels", "--output", __file__), "expected a safetensors file, got"),
    ],
)
def test_a_wrong_rank_option_is_one_line(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    output = () if "--output" in options else ("--output", "ranks.safetensors")
    assert message in error(run("rank", files[0], *output, *options))
    assert list(tmp_path.iterdir()) == []


def test_rank_needs_an_output_and_existing_images(files: list[Path], tmp_path: Path, resnet: str) -> None:
    assert "Missing option '--output'" in error(run("rank", files[0], "--score", "feature"))
    common = ("--score", "feature", "--output", tmp_path / "ranks")
    assert "which matches nothing" in error(run("rank", tmp_path / "gone.png", *common))
    result = run("rank", files[0], *common, "--model", resnet)
    assert result.exit_code == 2 and "got ModifiedResNet" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep": 0.3},
        {"held_out": 0.4},
        {"margin": 0.5},
        {"epochs": 3},
        {"batch_size": 4},
        {"lr": 0.01},
        {"seed": 3},
    ],
)
def test_a_predictor_equals_that_of_the_library(ranks: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"epochs": 2, **options}
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    record = json_of("train-predictor", ranks, *arguments, *HERE, "--output", tmp_path / "predictor")
    expected = fit_predictor(Rankings.load(ranks), **options)
    actual = RankPredictor.load(tmp_path / "predictor")
    assert all(torch.equal(actual.state_dict()[name], w) for name, w in expected.predictor.state_dict().items())
    assert actual.about == expected.predictor.about
    held_out, keep = round(20 * options.get("held_out", 0.1)), math.ceil(64 * options.get("keep", 0.6))
    assert record == {
        "file": str(tmp_path / "predictor"),
        "images": 20 - held_out,
        "held_out": held_out,
        "keep": options.get("keep", 0.6),
        "parameters": 37_666,
        "mmacs": 2.4003,
        "loss": pytest.approx(expected.losses[-1], abs=1e-6),
        "overlap": pytest.approx(expected.overlaps[-1], abs=1e-6),
        "overlap_random": pytest.approx(1 - keep / 64, abs=1e-6),
    }


def test_training_options_change_the_predictor(ranks: Path) -> None:
    rankings = Rankings.load(ranks)
    weights = {
        repr(fit_predictor(rankings, **{"epochs": 2, **o}).predictor) for o in ({}, {"margin": 0.5}, {"seed": 3})
    }
    assert len(weights) == 3


def test_table_and_csv_of_a_training_agree(ranks: Path, tmp_path: Path) -> None:
    common = ("train-predictor", ranks, "--epochs", 2, "--output", tmp_path / "predictor")
    (row,) = csv.DictReader(io.StringIO(run(*common, "--format", "csv").stdout))
    result = run(*common)
    assert (row["images"], row["held_out"], row["overlap_random"]) == ("18", "2", "0.390625")
    cells = ("37,666", "2.40", f"{float(row['loss']):.4f}", f"{100 * float(row['overlap']):.1f} %", "39.1 %")
    assert all(text in result.stdout for text in cells)
    assert re.fullmatch(
        r"2 epochs on 18 images in [\d.]+ s: loss [\d.]+, overlap [\d.]+ % \(random 39.1 %\)\n", result.stderr
    )


def test_without_held_out_images_there_is_no_overlap(ranks: Path, tmp_path: Path) -> None:
    common = ("train-predictor", ranks, "--epochs", 1, "--held-out", 0, "--output", tmp_path / "predictor")
    record = json_of(*common)
    assert (record["images"], record["held_out"], record["overlap"]) == (20, 0, None)
    assert "overlap" not in run(*common).stderr


def test_a_shared_image_of_several_files_counts_once(files: list[Path], ranks: Path, tmp_path: Path) -> None:
    common = ("--score", "feature", *FAST, "--output")
    parts = [tmp_path / "a", tmp_path / "b"]
    for part, subset in zip(parts, (files[:5], files[3:]), strict=True):
        json_of("rank", *subset, *common, part)
    json_of("rank", *files, *common, tmp_path / "whole")
    for name, inputs in (("one", [tmp_path / "whole"]), ("two", parts), ("three", [*parts, parts[0]])):
        record = json_of("train-predictor", *inputs, "--epochs", 1, "--held-out", 0.25, "--output", tmp_path / name)
        assert (record["images"], record["held_out"]) == (6, 2)
    weights = [RankPredictor.load(tmp_path / name).state_dict() for name in ("one", "two", "three")]
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weights[2][name])
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=1e-4)  # features of other batches


def test_files_made_with_other_options_are_refused(files: list[Path], ranks: Path, tmp_path: Path) -> None:
    json_of("rank", files[0], "--score", "feature", *FAST, "--window", 8, "--output", tmp_path / "other")
    result = run("train-predictor", ranks, tmp_path / "other", "--output", tmp_path / "predictor")
    expected = f"expected rankings that were made alike, got {tmp_path / 'other'} with another score, window"
    assert expected in error(result) and f" than {ranks}" in result.stderr


def test_training_draws_a_plot(ranks: Path, tmp_path: Path) -> None:
    matplotlib()
    options = ("--epochs", 2, "--plot", tmp_path / "training.png", "--output", tmp_path / "predictor")
    assert run("train-predictor", ranks, *options).exit_code == 0
    with Image.open(tmp_path / "training.png") as picture:
        assert picture.format == "PNG" and picture.width > 500
    assert run("train-predictor", ranks, *options, "--held-out", 0).exit_code == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_interrupted_training_leaves_the_old_file(ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(rankings: Rankings, **options: Any) -> None:
        options["progress"](1, 0.5, 0.5)
        raise KeyboardInterrupt

    (tmp_path / "predictor").write_text("old")
    monkeypatch.setattr(sys.modules["clipkernels.cli.train_predictor"], "fit_predictor", stopped)
    result = run("train-predictor", ranks, "--output", tmp_path / "predictor")
    assert (result.exit_code, result.stderr) == (130, "\nerror: interrupted\n")
    assert (tmp_path / "predictor").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--keep", 1), "keep must be a number in (0, 1), got 1.0"),
        (("--keep", "inf"), "keep must be a number in (0, 1), got inf"),
        (("--held-out", 1), "held_out must be a number in [0, 1), got 1.0"),
        (("--held-out", 0.99), "rankings must hold at least one image that is not held out, got 20 images"),
        (("--margin", -1), "--margin"),
        (("--epochs", 0), "--epochs"),
        (("--batch-size", 0), "--batch-size"),
        (("--lr", 0), "lr must be"),
        (("--seed", -1), "--seed"),
        (("--device", "abacus"), "expected a device of this machine, got 'abacus'"),
        (("--plot", "out.gif"), "expected a file ending in .png, .svg, .pdf for --plot"),
        (("--output", "."), "expected a regular file for --output, got ."),
        (("--output", "nowhere/x"), "expected a file that can be written for --output, got nowhere/x"),
        (("--output", "RANKS"), "expected --output and RANKINGS to differ, got"),
        (("--output", "same.png", "--plot", "same.png"), "expected --plot and --output to differ, got same.png"),
        (("--output", "-"), "expected a file for --output, got -"),
        (("--output", "predictor", "--lr", "1e30"), "lr must keep the loss finite, got 1e+30"),
        (("gone",), "'gone' does not exist"),
        ((__file__,), "expected a safetensors file, got"),
    ],
)
def test_a_wrong_training_option_is_one_line(
    ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = ranks.read_bytes()
    arguments = [str(ranks) if option == "RANKS" else option for option in options]
    output = () if "--output" in options else ("--output", "predictor")
    assert message in error(run("train-predictor", ranks, *output, *arguments))
    assert list(tmp_path.iterdir()) == [] and ranks.read_bytes() == before


def test_a_predictor_file_is_not_rankings(ranks: Path, predictor: Path, tmp_path: Path) -> None:
    result = run("train-predictor", predictor, "--output", tmp_path / "other")
    assert "expected rankings, as golden_ranking writes them" in error(result)
    assert "Missing argument 'RANKINGS...'" in error(run("train-predictor", "--output", tmp_path / "other"))


def classify(*arguments: object) -> Result:
    return run("classify", *arguments, *HERE, "--classes", DIGITS, "--format", "jsonl")


@pytest.mark.parametrize(
    ("spec", "keep", "tokens"),
    [("patch-ranking", 0.6, "65→40"), ("patch-ranking:0.5", 0.5, "65→33"), ("patch-ranking:1", 1.0, "65")],
)
def test_classify_keeps_the_highest_ranked_patches(
    files: list[Path], predictor: Path, spec: str, keep: float, tokens: str
) -> None:
    result = classify(*files, "--method", spec, "--predictor", predictor)
    assert result.exit_code == 0, result.output
    assert f"PatchRanking(keep={keep:g}), tokens {tokens}\n" in result.stderr
    model, _, tokenizer = ck.bundled()
    method = ck.PatchRanking(RankPredictor.load(predictor), keep)
    classifier = ck.Classifier(model, tokenizer, digits.CLASSES, method=method)
    with torch.inference_mode():
        expected = classifier(preprocessed(files)).softmax(1).amax(1)
    actual = [json.loads(line)["probability"] for line in result.stdout.splitlines()]
    assert actual == pytest.approx(expected.tolist(), abs=1e-4)


def test_classify_keeps_the_share_that_the_predictor_was_trained_for(
    files: list[Path], ranks: Path, tmp_path: Path
) -> None:
    options = ("--keep", 0.4, "--epochs", 1, "--output", tmp_path / "predictor")
    json_of("train-predictor", ranks, *options)
    result = classify(files[0], "--method", "patch-ranking", "--predictor", tmp_path / "predictor")
    assert "PatchRanking(keep=0.4), tokens 65→27\n" in result.stderr


@pytest.mark.parametrize("text_width", [0, 128])
def test_learnt_tokens_stand_beside_the_patches(
    files: list[Path], predictor: Path, tmp_path: Path, text_width: int
) -> None:
    model, _, tokenizer = ck.bundled()
    torch.manual_seed(0)
    tokens = VisualTokens(2, 3, 128, text_width and model.transformer.width)
    tokens.save(tmp_path / "tokens")
    options = ("--method", "patch-ranking", "--predictor", predictor)
    result = classify(*files, *options, "--tokens", tmp_path / "tokens")
    assert result.exit_code == 0, result.output
    assert "tokens 67→42→40" in result.stderr and "PatchRanking(keep=0.6, tokens=2)" in result.stderr
    method = ck.PatchRanking(RankPredictor.load(predictor), tokens=tokens)
    classifier = ck.Classifier(model, tokenizer, digits.CLASSES, method=method)
    with torch.inference_mode():
        expected = classifier(preprocessed(files)).softmax(1).amax(1)
    actual = [json.loads(line)["probability"] for line in result.stdout.splitlines()]
    assert actual == pytest.approx(expected.tolist(), abs=1e-4)
    assert result.stdout != classify(*files, *options).stdout


def test_a_predictor_of_bf16_rankings_serves_any_precision(files: list[Path], tmp_path: Path) -> None:
    json_of("rank", *files, "--score", "feature", *FAST, "--precision", "bf16", "--output", tmp_path / "ranks")
    json_of("train-predictor", tmp_path / "ranks", "--epochs", 1, "--output", tmp_path / "predictor")
    for precision in ("fp32", "bf16"):
        options = ("--method", "patch-ranking", "--predictor", tmp_path / "predictor", "--precision", precision)
        assert classify(files[0], *options).exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "patch-ranking"), "expected --predictor with patch-ranking, got none: see clipkernels"),
        (("--predictor", "PREDICTOR"), "expected --method patch-ranking with --predictor, got no --method"),
        (
            ("--method", "evit", "--predictor", "PREDICTOR"),
            "expected --method patch-ranking with --predictor, got evit",
        ),
        (("--method", "evit", "--tokens", "PREDICTOR"), "expected --method patch-ranking with --tokens, got evit"),
        (("--method", "patch-ranking", "--predictor", "gone"), "'gone' does not exist"),
        (("--method", "patch-ranking", "--predictor", __file__), "expected a safetensors file, got"),
        (
            ("--method", "patch-ranking", "--predictor", "RANKS"),
            "expected a predictor (clipkernels.rank_predictor.2), got",
        ),
        (
            ("--method", "patch-ranking", "--predictor", "PREDICTOR", "--tokens", "PREDICTOR"),
            "expected learnt tokens (clipkernels.visual_tokens.2), got",
        ),
        (("--method", "patch-ranking:0", "--predictor", "PREDICTOR"), "keep must be a number in (0, 1], got 0.0"),
        (
            ("--method", "patch-ranking:0.6:blocks=3", "--predictor", "PREDICTOR"),
            "expected a method such as patch-ranking:0.6, got 'patch-ranking:0.6:blocks=3': the keys are multiple",
        ),
    ],
)
def test_a_wrong_option_beside_a_predictor_is_one_line(
    files: list[Path], ranks: Path, predictor: Path, options: tuple[object, ...], message: str
) -> None:
    paths = {"PREDICTOR": predictor, "RANKS": ranks}
    assert message in error(classify(files[0], *(paths.get(str(option), option) for option in options)))


def test_a_predictor_or_tokens_of_another_tower_are_one_line(
    files: list[Path], predictor: Path, tmp_path: Path, registered: str
) -> None:
    options = ("--method", "patch-ranking", "--predictor", predictor)
    result = classify(files[0], *options, "--model", registered)
    assert result.exit_code == 2 and result.stdout == ""
    assert "error: the predictor is for" in result.stderr.splitlines()[-1]
    other = RankPredictor.load(predictor)
    other.about["tower"] = {"float32": "0" * 64}
    other.save(tmp_path / "other")
    result = classify(files[0], "--method", "patch-ranking", "--predictor", tmp_path / "other")
    assert "expected the tower of the predictor" in error(result)
    VisualTokens(2, 3, 64).save(tmp_path / "tokens")
    result = classify(files[0], *options, "--tokens", tmp_path / "tokens")
    assert "the learnt tokens are for a tower of width 64" in error(result)


def test_bench_times_patch_ranking_and_its_tokens(files: list[Path], predictor: Path) -> None:
    common = ("bench", files[0], files[1], "--rounds", 1, "--predictor", predictor)
    methods = ("--methods", "evit:0.5,patch-ranking:0.6")
    rows = {row["variant"]: row for row in json_of(*common, *methods)["rows"]}
    assert list(rows)[2:] == ["EViT(keep=0.5)", "PatchRanking(keep=0.6)"]
    assert rows["PatchRanking(keep=0.6)"]["tokens"] == [65, 65, 65, 40, 40, 40, 40]
    plan = ck.PatchRanking(RankPredictor.load(predictor)).plan(tokens=65, blocks=6)
    assert rows["PatchRanking(keep=0.6)"]["gmacs"] == pytest.approx(plan.gmacs(128, patch=4, out=128), abs=1e-5)
    torch.manual_seed(0)
    VisualTokens(2, 3, 128).save(predictor.with_name("tokens"))
    options = ("--method", "patch-ranking", "--tokens", predictor.with_name("tokens"))
    row = json_of(*common, *options)["rows"][2]
    assert (row["variant"], row["tokens"]) == ("PatchRanking(keep=0.6, tokens=2)", [67, 67, 67, 42, 42, 42, 40])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "patch-ranking:0.6"), "expected --predictor with patch-ranking, got none"),
        (("--predictor", "PREDICTOR"), "expected --method patch-ranking with --predictor, got no --method"),
        (("--tokens", "PREDICTOR", "--method", "tome"), "expected --method patch-ranking with --tokens, got tome"),
        (("--predictor", "PREDICTOR", "--methods", "tome:8"), "with --predictor, got tome:8"),
        (("--predictor", "PREDICTOR", "--methods", "patch-ranking:x"), "keep: expected a number, got 'x'"),
        (("--predictor", "PREDICTOR", "--methods", "patch-ranking:2"), "got 'patch-ranking:2': keep must be a number"),
    ],
)
def test_a_wrong_predictor_for_bench_is_one_line(predictor: Path, options: tuple[object, ...], message: str) -> None:
    assert message in error(run("bench", *(predictor if option == "PREDICTOR" else option for option in options)))


def test_bench_refuses_a_predictor_of_another_tower(predictor: Path, registered: str) -> None:
    options = ("--methods", "patch-ranking:0.6", "--predictor", predictor)
    result = run("bench", "--model", registered, *options)
    assert result.exit_code == 2 and "the predictor is for" in result.stderr.splitlines()[-1]
