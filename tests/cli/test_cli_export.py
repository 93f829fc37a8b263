"""The verb export: its options, its lines on stderr, its exit statuses, and the folder that it writes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipkernels as ck
from clipkernels.cli import export as verb
from clipkernels.exporting.parity import Parity
from clipkernels.exporting.report import Products, Report
from clipkernels.runtime import Runtime
from tests.cli.commands import error, run, succeed

pytestmark = pytest.mark.usefixtures("one_thread")
PARITY = Parity(12, 0.97, 0.98, 0.99, 0.5, 0.125)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with three pictures of noise."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each export; no graph is written."""
    log: list[dict[str, Any]] = []

    def export(model: Any, folder: str, **options: Any) -> Report:
        log.append({"model": model, "folder": folder, **options})
        options["progress"]("image graph")
        products = Products(27, ("node_3",)) if options["precision"] == "int8" else None
        nodes = {"nodes": 40, "scatter": 0, "nonzero": 0, "loop": 0, "if": 0}
        sizes, seconds = {"image.xml": 2**20, "image.bin": 2**20}, {"image": 1.0}
        return Report(folder, options["to"], options["precision"], PARITY, None, products, nodes, sizes, seconds, 2**27)

    monkeypatch.setattr(verb, "export_model", export)
    return log


def test_options_reach_the_export(calls: list[dict[str, Any]], photos: Path, tmp_path: Path) -> None:
    result = succeed(
        "export", "--method", "evit:0.7", "--to", "openvino", "--precision", "int8", "--calibrate", photos,
        "--min-cosine", 0.95, "--limit", 2, "--out", tmp_path / "out",
    )  # fmt: skip
    [call] = calls
    assert ck.method_of(call["model"]) == ck.EViT(0.7)
    assert (call["to"], call["precision"], call["min_cosine"], call["layout"]) == ("openvino", "int8", 0.95, None)
    assert call["calibrate"].shape == (2, 3, 32, 32) and "check" not in call and call["config"] is None
    assert torch.equal(call["tokenizer"](["a"]), ck.bundled()[2](["a"]))
    assert result.stderr.splitlines()[-1] == (
        f"2.0 MiB; 128 MiB of memory at batch 8; 27 products in INT8; 1 kept in float; the folder is {tmp_path / 'out'}"
    )
    assert "0.99000" in result.stdout and "50.0%" in result.stdout


def test_results_as_json_and_csv(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    document = json.loads(succeed("export", "--format", "json", "--out", tmp_path / "out").stdout)
    assert document["image"]["cosine_p1"] == 0.98 and document["runtime"] == "onnx" and document["products"] is None
    [row] = csv.DictReader(io.StringIO(succeed("export", "--format", "csv", "--out", tmp_path / "out").stdout))
    assert (row["tower"], row["inputs"], row["cosine_min"]) == ("image", "12", "0.97")
    assert ck.method_of(calls[0]["model"]) == ck.Dense()


def test_a_file_that_is_no_image_is_skipped(calls: list[dict[str, Any]], photos: Path, tmp_path: Path) -> None:
    (photos / "broken.png").write_bytes(b"no image")
    result = run("export", "--check", photos, "--out", tmp_path / "out")
    assert result.exit_code == 1 and f"skipped {photos / 'broken.png'}: " in result.stderr
    assert calls[0]["check"].shape == (3, 3, 32, 32)


def test_wrong_options_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    line = error(run("export", "--out", tmp_path / "other"))
    assert "expected a new or empty folder, or one that ck.export wrote" in line
    line = error_after_warnings_and_note(run("export", "--precision", "bf16", "--out", tmp_path / "out"))
    assert 'got "bf16", whose products onnxruntime lacks on a CPU: use to="openvino"' in line
    assert "expected one --method, got dense and tome:4" in error(
        run("export", "--method", "dense", "--method", "tome:4", "--out", tmp_path / "out")
    )
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "export.json").write_text("{}")
    line = error(run("export", "--model", tmp_path / "exported", "--out", tmp_path / "out"))
    assert f"expected a model in PyTorch, got {tmp_path / 'exported'}, which is exported: name the model" in line
    assert not (tmp_path / "out").exists()


def error_after_warnings_and_note(result: Any) -> str:
    """The one line of an error behind the note about the bundled model."""
    assert result.exit_code == 2, result.output
    note, line = result.stderr.splitlines()
    assert note == verb.NOTE
    return line


@pytest.mark.slow
@torch.no_grad()
def test_the_bundled_model_is_exported_and_runs(photos: Path, tmp_path: Path) -> None:
    succeed("export", "--method", "tome:4", "--check", photos, "--out", tmp_path / "out")
    model, preprocess, _ = ck.bundled()
    ck.patch(model, ck.ToMe(4))
    paths = sorted(photos.rglob("*.png"))
    expected = model.encode_image(torch.stack([preprocess(Image.open(path)) for path in paths]))
    assert np.abs(Runtime(tmp_path / "out").encode_image(paths) - expected.numpy()).max() < 1e-5
