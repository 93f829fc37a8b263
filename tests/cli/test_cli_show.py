"""`clipkernels show`: the library's own picture and cosines, files that are skipped, and refusals."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clipkernels as ck
from clipkernels.data import scenes
from tests.cli.commands import error, run, succeed

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 5
TWO = ("--method", "tome:8", "--method", "evit:0.5")
METHODS = {"ToMe(r=8)": ck.ToMe(8), "EViT(keep=0.5)": ck.EViT(0.5)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(scenes.draw(COUNT, 3).images):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


@torch.no_grad()
def cosines(paths: list[Path]) -> np.ndarray:
    model, preprocess, _ = ck.bundled()
    images = torch.stack([preprocess(Image.open(path)) for path in paths])
    dense = model.encode_image(images)  # type: ignore[operator]
    columns = []
    for method in METHODS.values():
        with ck.patched(model, method):
            columns.append(torch.cosine_similarity(model.encode_image(images), dense))  # type: ignore[operator]
    return torch.stack(columns, 1).numpy()


def test_the_file_holds_the_picture_of_the_library(photos: Path, tmp_path: Path) -> None:
    path = photos / "0.png"
    result = succeed("show", path, *TWO, "--out", tmp_path / "kept.png", "--format", "csv")
    assert result.stderr == f"{tmp_path / 'kept.png'} shows 1 of 1 image\n"
    model, preprocess, _ = ck.bundled()
    expected = ck.show(model, path, list(METHODS.values()), preprocess=preprocess)
    assert np.array_equal(np.array(Image.open(tmp_path / "kept.png")), np.array(expected))
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [(row["path"], row["method"], row["tokens"]) for row in rows] == [
        (str(path), "ToMe(r=8)", "17"),
        (str(path), "EViT(keep=0.5)", "11"),
    ]
    assert [float(row["cosine"]) for row in rows] == pytest.approx(cosines([path])[0].tolist(), abs=1e-5)


@pytest.mark.parametrize("size", [2, 32])
def test_the_worst_images_are_shown_most_moved_first(photos: Path, tmp_path: Path, size: int) -> None:
    out = tmp_path / "worst.png"
    common = ("show", photos, *TWO, "--worst", 3, "--out", out, "--batch-size", size, "--format", "json")
    document = json.loads(succeed(*common).stdout)
    paths = [photos / f"{number}.png" for number in range(COUNT)]
    expected = cosines(paths)
    order = expected.min(1).argsort()[:3]
    assert (document["picture"], document["images"]) == (str(out), COUNT)
    assert [row["path"] for row in document["rows"]] == [str(paths[place]) for place in order for _ in METHODS]
    assert [row["cosine"] for row in document["rows"]] == pytest.approx(expected[order].ravel().tolist(), abs=1e-5)
    model, preprocess, _ = ck.bundled()
    names = list(map(str, paths))
    picture = ck.show(model, names, METHODS, preprocess=preprocess, worst=3)
    assert np.array_equal(np.array(Image.open(out)), np.array(picture))


def test_the_table_has_the_schedule_and_the_cosine(photos: Path, tmp_path: Path) -> None:
    result = succeed("show", photos / "0.png", "--method", "evit:0.5", "--out", tmp_path / "kept.jpg")
    cosine = cosines([photos / "0.png"])[0, 1]
    assert all(text in result.stdout for text in ("EViT(keep=0.5)", "65→34→19→11", f"{cosine:.4f}", "0.png"))
    assert Image.open(tmp_path / "kept.jpg").format == "JPEG"


def test_methods_that_reduce_nothing_show_the_whole_image(photos: Path, tmp_path: Path) -> None:
    common = ("show", photos / "0.png", "--method", "dense", "--method", "none", "--out", tmp_path / "kept.webp")
    rows = json.loads(succeed(*common, "--format", "json").stdout)["rows"]
    assert [(row["method"], row["tokens"]) for row in rows] == [("dense (host)", 65), ("Dense()", 65)]
    assert [row["cosine"] for row in rows] == pytest.approx([1, 1])
    assert Image.open(tmp_path / "kept.webp").format == "WEBP"


def test_without_a_method_three_are_shown_in_any_precision(photos: Path, tmp_path: Path) -> None:
    common = ("show", photos / "0.png", "--out", tmp_path / "kept.png", "--precision", "bf16", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(succeed(*common).stdout)))
    assert [row["method"] for row in rows] == ["ToMe(r=7)", "EViT(keep=0.7)", "EViT(keep=0.5)"]


def test_all_steps_make_a_wider_picture(photos: Path, tmp_path: Path) -> None:
    sizes = []
    for options in ((), ("--all-steps",)):
        succeed("show", photos / "0.png", "--method", "tome:8", "--out", tmp_path / "kept.png", *options)
        sizes.append(Image.open(tmp_path / "kept.png").width)
    assert sizes[1] - sizes[0] == 2 * (224 + 14)  # six steps instead of four


def test_a_file_that_is_no_image_is_skipped(photos: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    result = run("show", bad, photos / "0.png", *TWO, "--out", tmp_path / "kept.png", "--format", "csv")
    assert result.exit_code == 1
    skipped, shown = result.stderr.splitlines()
    assert skipped == f"skipped {bad}: not an image (no format that is read)"
    assert shown == f"{tmp_path / 'kept.png'} shows 1 of 1 image; 1 file skipped"
    assert len(result.stdout.splitlines()) == 3 and (tmp_path / "kept.png").exists()


def test_files_none_of_which_is_an_image_are_an_error(tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    result = run("show", bad, "--out", tmp_path / "kept.png")
    assert result.exit_code == 2 and not (tmp_path / "kept.png").exists()
    assert result.stderr.splitlines()[-1].startswith("error: expected images, got 1 file that cannot be used")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "kept.tiff"), "expected a picture that ends in .png, .jpg, .jpeg, .webp, got kept.tiff"),
        (("--out", "-"), "expected a file for --out"),
        (("--out", "nowhere/kept.png"), "expected a file that can be written for --out"),
        (("--out", "same.png", "--output", "same.png"), "to differ"),
        (("--out", "kept.png", "--method", "tome"), None),
        (("--out", "kept.png", "--method", "evit:2"), "expected a method such as evit:0.7"),
        (("--out", "kept.png", "--method", "evit:0.7:blocks=9"), "blocks must be ints in [0, 5]"),
        (("--out", "kept.png", "--worst", "65"), "65 is not in the range"),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("show", photos / "0.png", *options)
    if message is None:
        assert result.exit_code == 0, result.output
    else:
        assert message in error(result)
        assert not list(tmp_path.iterdir())


def test_too_many_images_ask_for_the_worst(photos: Path, tmp_path: Path) -> None:
    paths = [photos / "0.png"] * 17
    line = error(run("show", *paths, "--out", tmp_path / "kept.png"))
    assert line == "error: expected at most 16 images, got 17: show the worst 16 of them"
    succeed("show", *paths, "--worst", 1, "--method", "tome:8", "--out", tmp_path / "kept.png")


def test_a_resnet_has_no_patches_to_show(photos: Path, resnet: str, tmp_path: Path) -> None:
    result = run("show", photos / "0.png", "--model", resnet, "--out", tmp_path / "kept.png")
    assert result.exit_code == 2 and "got ModifiedResNet" in result.stderr
