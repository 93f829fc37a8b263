"""The verb evaluate on point clouds: its rows, its picture of the views, its options."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipkernels.data import depth_maps
from clipkernels.pictures.sheet import Layout
from tests.cli.commands import error_after_notes, run, succeed
from tests.cli.test_cli_evaluate import FAST, rows_of
from tests.evaluation.cloud_layouts import modelnet40, scanobjectnn, shape, write_clouds

pytest.importorskip("h5py", reason="h5py is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_clouds_have_rows_notes_and_a_picture(tmp_path: Path) -> None:
    modelnet40(tmp_path, train=10, test=2)
    options = ("--heads", "zero-shot,calip,tip", "--shots", 1, "--seeds", 1, "--prompts", "ensemble")
    sheet = tmp_path / "views.png"
    result = succeed(
        "evaluate", "--data", f"modelnet40={tmp_path}", *options, *FAST, "--picture", sheet, "--out", tmp_path / "out"
    )
    rows = rows_of(tmp_path / "out")
    assert [(row["head"], row["images"]) for row in rows] == [("zero-shot", 6), ("calip", 6), ("tip", 6)]
    assert {row["weights"] for row in rows} == {"validation split, 6 clouds"}
    assert "'point cloud depth map of a {}.'" in result.stdout and "7 prompts" not in result.stdout
    assert "modelnet40: a cloud gives 6 depth maps of 224×224 pixels" in result.stdout
    document = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    described = document["data"]["modelnet40"]
    assert (described["views"], described["images"]) == (6, {"train": 24, "val": 6, "test": 6})
    with Image.open(sheet) as picture:
        layout = Layout(128, 128)
        assert picture.size[0] == layout.at(0, 6)[0] + 2 and picture.size[1] > layout.at(5, 0)[1] + 128
        # The third view of the fourth cloud, a ball.
        x, y = layout.at(3, 2)
        panel = np.asarray(picture.crop((x, y, x + 128, y + 128)).convert("L"))
    expected = depth_maps(torch.from_numpy(shape(0, 903))[None], 6, 128, grid=128)[0, 2, 0].numpy() * 255
    assert np.corrcoef(panel.ravel(), expected.ravel())[0, 1] > 0.8


def test_ten_views_are_drawn(tmp_path: Path) -> None:
    home = scanobjectnn(tmp_path)
    data = np.stack([shape(label, label) for label in (0, 1)])
    data[1] = np.nan
    write_clouds(home / "test_objectdataset.h5", [0, 1], data=data)
    (home / "training_objectdataset.h5").unlink()
    command = ("evaluate", "--data", f"scanobjectnn={home}", *FAST, "--out", tmp_path / "out")
    refused = error_after_notes(run(*command, "--picture", tmp_path / "none" / "views.png"))
    assert f"can be written for --picture, got {tmp_path / 'none' / 'views.png'}: No such file" in refused
    result = run(*command, "--views", 10, "--picture", tmp_path / "out" / "views.png")
    assert result.exit_code == 1  # a cloud cannot be read
    assert [(row["images"], row["weights"]) for row in rows_of(tmp_path / "out")] == [(1, "equal views")]
    assert "1 image left out by dense (host), such as test_objectdataset.h5#1:1: points must be finite" in result.stdout
    with Image.open(tmp_path / "out" / "views.png") as picture:
        assert picture.size[0] > Layout(128, 128).at(0, 9)[0] + 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--views", 6), "expected --data of modelnet40 or scanobjectnn with --views 6, got none: add it, or leave"),
        (("--picture", "views.png"), "expected --data of modelnet40 or scanobjectnn with --picture views.png, got"),
        (("--picture", "views.gif"), "expected a picture that ends in .png"),
        (("--views", 7), "'7' is not one of"),
    ],
)
def test_options_without_clouds_are_refused(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "0.png")
    result = run("evaluate", "--data", tmp_path / "data", *options, *FAST, "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in error_after_notes(result)
    assert not (tmp_path / "out").exists()
