"""The verb recover: the library's own weights, what it writes, its exit statuses, signals and libraries."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import clipkernels as ck
from clipkernels.artefacts.header import read_header
from clipkernels.cli import recover as verb
from clipkernels.cli.parts.demo_images import QUICK, draw, save
from clipkernels.images import Reader
from clipkernels.testing import randomized, timm_tower
from tests.cli.commands import error_after_warnings, run, succeed
from tests.local_transformers import save_clip
from tests.subprocesses import without_xdist

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
FAST = ("--epochs", 1, "--batch-size", 8, "--held-out", 4, "--workers", 0, "--device", "cpu")
OPTIONS: dict[str, Any] = {"epochs": 1, "batch_size": 8, "held_out": 4}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty of the quick demo's digits."""
    folder = tmp_path_factory.mktemp("pictures")
    save({"digits": draw(QUICK, seed=0)["digits"]}, folder / "all")
    (folder / "photos").mkdir()
    for index, file in enumerate(sorted((folder / "all").rglob("*.png"))[::2][:20]):
        file.rename(folder / "photos" / f"{index:02}.png")
    return folder / "photos"


def tensors_of(pictures: Path) -> torch.Tensor:
    preprocess = ck.bundled()[1]
    return torch.stack([preprocess(Reader().read(file)) for file in sorted(pictures.glob("*.png"))])


def same_weights(first: Any, second: Any) -> bool:
    """True if two models have the same state, bit for bit."""
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_folder_gives_the_weights_of_the_library(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "tower"
    result = succeed("recover", pictures, "--method", "evit:0.5", "--out", out, *FAST, "--seed", 3, "--format", "json")
    model = ck.bundled()[0]
    expected = ck.learn.recover(model, tensors_of(pictures), method=ck.EViT(0.5), seed=3, **OPTIONS)
    loaded = ck.load(out).model
    assert same_weights(loaded, model) and ck.method_of(loaded) == ck.EViT(0.5)
    content = json.loads(result.stdout)
    assert expected.before is not None and expected.after is not None
    assert content["before"] == verb.rounded(expected.before) and content["after"] == verb.rounded(expected.after)
    assert (content["images"], content["held_out"], content["skipped"], content["steps"]) == (16, 4, 0, 2)
    assert (content["folder"], content["method"]) == (str(out), "EViT(keep=0.5)")
    fidelity = read_header(out).fidelity
    assert fidelity is not None and fidelity["recovery"]["after"] == content["after"]
    assert fidelity["recovery"]["settings"] == {
        **{"epochs": 1, "batch_size": 8, "lr": 2e-4, "warmup": 0.05, "weight_decay": 0.0, "contrast": 0.005},
        **{"held_out": 4, "patience": 2, "lora": None, "seed": 3},
    }
    note, summary = result.stderr.splitlines()
    assert note == verb.BUNDLED_NOTE and summary.startswith("2 steps on 16 images in ")
    assert summary.endswith(f"; the tower is in {out}") and os.listdir(tmp_path) == ["tower"]


def test_the_table_and_csv_have_both_towers(pictures: Path, tmp_path: Path) -> None:
    common = ("recover", pictures, "--method", "tome:8", *FAST, "--out", tmp_path / "tower")
    table = succeed(*common).stdout
    assert "ToMe(r=8), 4 images held out" in table and "before" in table and "R@1" in table
    rows = list(csv.DictReader(io.StringIO(succeed(*common, "--format", "csv").stdout)))  # replaces the artefact
    assert [row["tower"] for row in rows] == ["before", "after"] and rows[0]["held_out"] == "4"
    assert all(0 < float(row["cosine_min"]) <= float(row["cosine"]) <= 1 for row in rows)


def test_skipped_files_are_named_and_exit_one(pictures: Path, tmp_path: Path) -> None:
    broken = [tmp_path / f"bad{index:02}.png" for index in range(12)]
    for file in broken:
        file.write_bytes(b"nothing")
    (tmp_path / "notes.txt").write_text("")
    result = run("recover", pictures, tmp_path, "--method", "evit:0.5", "--out", tmp_path / "out" / "tower", *FAST)
    assert result.exit_code == 1 and ck.method_of(ck.load(tmp_path / "out" / "tower").model) == ck.EViT(0.5)
    lines = result.stderr.splitlines()
    assert lines[1:11] == [f"skipped {file}: not an image (no format that is read)" for file in broken[:10]]
    assert lines[11:13] == ["skipped 2 more", "skipped 1 .txt: not images"]
    assert "2 steps on 16 images in " in lines[13] and "; 12 files skipped; " in lines[13]


def test_files_that_are_all_unreadable_are_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"nothing")
    result = run("recover", tmp_path, "--method", "evit:0.5", "--out", tmp_path / "out", *FAST)
    _, *named, line = result.stderr.splitlines()
    assert named == [f"skipped {tmp_path / name}: not an image (no format that is read)" for name in ("a.png", "b.png")]
    assert result.exit_code == 2 and line.startswith("error: images must hold at least two images, ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nowhere", "--method", "evit:0.5"), "'nowhere', which matches nothing"),
        (("PHOTOS",), "expected --method with a reduction to recover, such as evit:0.7, got none"),
        (("PHOTOS", "--method", "none"), "expected --method with a reduction"),
        (("PHOTOS", "--method", "dense"), "expected a method that reduces tokens, got Dense()"),
        (("PHOTOS", "--method", "evit:7"), "evit:7"),
        (("PHOTOS", "--method", "evit:0.5", "--held-out", "20"), "held_out must leave an image to train on"),
        (("PHOTOS", "--method", "evit:0.5", "--held-out", "half"), "'half' is neither a share such as 0.05 nor a"),
        (("PHOTOS", "--method", "evit:0.5", "--held-out", "1.5"), "held_out must be a number in (0, 1), got 1.5"),
        (("PHOTOS", "--method", "evit:0.5", "--lr", "1e30"), "lr must keep all numbers finite, got 1e+30"),
        (("PHOTOS", "--method", "evit:0.5", "--lr", "0"), "lr must be a positive number, got 0.0"),
        (("PHOTOS", "--method", "evit:0.5", "--model", "ViT-B-33"), "ViT-B-33"),
        (("PHOTOS", "--method", "patch-ranking"), "--predictor"),
        (("PHOTOS/00.png", "--method", "evit:0.5"), "images must hold at least two images"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_two(
    arguments: tuple[str, ...], expected: str, pictures: Path, tmp_path: Path
) -> None:
    places = {"PHOTOS": pictures, "PHOTOS/00.png": pictures / "00.png"}
    out = tmp_path / "tower"
    result = run(
        "recover", "--epochs", 1, "--workers", 0, *(places.get(part, part) for part in arguments), "--out", out
    )
    lines = [line for line in result.stderr.splitlines() if line != verb.BUNDLED_NOTE]
    assert result.exit_code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0]
    assert not out.exists() and not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_folders_of_something_else_are_refused_first(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "load_whole", lambda *arguments: pytest.fail("a model is loaded"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("")
    common = ("recover", pictures, "--method", "evit:0.5", *FAST)
    assert "with 'notes' and no clipkernels.json" in error_after_warnings(run(*common, "--out", tmp_path / "mine"))
    line = error_after_warnings(run(*common, "--out", tmp_path / "new", "--state", tmp_path / "mine"))
    assert "expected state to be a new or empty folder" in line


def command_of(pause: float, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "tests.cli.recover_slowly", str(pause), *map(str, arguments)]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_batch_and_the_command_goes_on(
    number: signal.Signals, status: int, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tower"
    common = ("recover", pictures, "--method", "evit:0.5", "--out", out, *FAST[2:], "--epochs", 3, "--threads", 1)
    environment = without_xdist(os.environ)
    options: dict[str, Any] = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command_of(0.5, *common), **options) as process:
        assert process.stderr is not None
        while not (tmp_path / "tower.state" / "checkpoint.safetensors").exists():
            assert process.poll() is None
        process.send_signal(number)
        _, stderr = process.communicate()
    lines = stderr.splitlines()[1:]
    assert process.returncode == status and lines[0] == "stopping after this batch; a second signal stops at once"
    assert len(lines) == 2 and lines[1].startswith("stopped after training ")
    assert lines[1].endswith(" of 48 images; the same command goes on") and not out.exists()
    changed = run(*common, "--seed", 9)
    assert changed.exit_code == 2 and "seed 0 instead of 9: repeat that call" in changed.stderr
    succeed(*common)
    other = tmp_path / "other"
    succeed(*common[:4], "--out", other, *common[6:])
    assert same_weights(ck.load(out).model, ck.load(other).model)
    assert sorted(os.listdir(tmp_path)) == ["other", "tower"]


def test_a_saved_tower_is_recovered_with_its_own_method(pictures: Path, tmp_path: Path) -> None:
    ck.save(ck.patch(ck.bundled()[0], ck.ToMe(8)), tmp_path / "tower")
    result = succeed("recover", pictures, "--model", tmp_path / "tower", "--out", tmp_path / "tower", *FAST)
    assert verb.BUNDLED_NOTE not in result.stderr and ck.method_of(ck.load(tmp_path / "tower").model) == ck.ToMe(8)
    model = ck.bundled()[0]
    ck.learn.recover(model, tensors_of(pictures), method=ck.ToMe(8), **OPTIONS)
    assert same_weights(ck.load(tmp_path / "tower").model, model)


def test_a_model_of_open_clip_keeps_the_activation_of_its_weights(
    registered: str, pictures: Path, tmp_path: Path
) -> None:
    import open_clip

    torch.manual_seed(0)
    model = randomized(open_clip.create_model(registered, force_quick_gelu=True))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    result = succeed(
        "recover", pictures, "--method", "evit:0.5", "--model", registered, "--pretrained",
        tmp_path / "weights.safetensors", "--out", tmp_path / "tower", *FAST,
    )  # fmt: skip
    assert "2 steps on 16 images" in result.stderr
    loaded, preprocess, tokenizer = ck.load(tmp_path / "tower")
    assert preprocess is not None and preprocess(Image.new("RGB", (40, 40))).shape == (3, 32, 32)
    assert tokenizer(["a cat"]).shape == (1, 16) and ck.method_of(loaded) == ck.EViT(0.5)
    assert torch.equal(loaded.text_projection, model.text_projection)


def test_transformers_keeps_tokenizer_and_image_processor(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = save_clip(tmp_path / "clip")
    options = ("--library", "transformers", "--model", tmp_path / "clip", "--pretrained", "local")
    succeed("recover", pictures, "--method", "evit:0.5", *options, "--out", tmp_path / "tower", *FAST)
    loaded, preprocess, tokenizer = ck.load(tmp_path / "tower")
    assert preprocess is not None and tokenizer is not None and ck.method_of(loaded) == ck.EViT(0.5)
    assert torch.equal(loaded.text_projection.weight, model.text_projection.weight)


def test_timm_has_no_text_and_no_tokenizer(pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ck.save(randomized(timm_tower("test_vit", 3)), tmp_path / "timm")
    options = ("--model", tmp_path / "timm", "--method", "evit:0.5")
    succeed("recover", pictures, *options, "--out", tmp_path / "tower", *FAST)
    assert ck.method_of(ck.load(tmp_path / "tower").model) == ck.EViT(0.5)
