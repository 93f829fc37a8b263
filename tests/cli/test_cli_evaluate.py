"""The verb evaluate: its files, its table, its exit statuses, signals and kills."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clipkernels.cli.parts.evaluation_report import published_of, records_of
from clipkernels.data import scenes
from clipkernels.evaluation.published import published_model
from clipkernels.evaluation.results import Results, Row
from clipkernels.evaluation.scores import Score
from clipkernels.folder_lock import Lock
from tests.cli.commands import error_after_notes, run, save_a_digit_per_class, succeed
from tests.evaluation.scene_files import scenes_in
from tests.subprocesses import without_xdist

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
FAST = ("--workers", 0, "--rounds", 1, "--batch-size", 16, "--device", "cpu")
HEADS = ("--heads", "zero-shot,calip,tda,reservoir,tip,tipx,tip-f,calip-fs", "--shots", "0,1,4", "--seeds", 2)


@pytest.fixture(scope="module")
def scene_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes as files, with train, val and test splits."""
    return scenes_in(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def complete(scene_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of every head by two methods, undisturbed."""
    out = tmp_path_factory.mktemp("results") / "out"
    succeed("evaluate", "--data", f"scenes={scene_folder}", "--method", "evit:0.7", *HEADS, *FAST, "--out", out)
    return out


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]
    return rows


def scores_of(out: Path) -> list[tuple[Any, ...]]:
    keys = ("data", "method", "head", "shots", "score", "low", "high", "spread", "images", "weights")
    return [tuple(row[key] for key in keys) for row in rows_of(out)]


def test_csv_json_and_markdown_have_the_same_rows(complete: Path) -> None:
    rows = rows_of(complete)
    with (complete / "results.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["head"] for row in table] == [row["head"] for row in rows]
    assert [float(row["score"]) for row in table] == [row["score"] for row in rows]
    text = (complete / "results.md").read_text(encoding="utf-8")
    assert text.count("\n| scenes |") == len(rows) == 2 * (4 + 4 * 2)


def test_rows_have_their_cost(complete: Path) -> None:
    by_method = {row["method"]: row for row in rows_of(complete)}
    assert by_method["EViT(keep=0.7)"]["gmacs_run"] < by_method["dense (host)"]["gmacs_run"]
    assert all(row["images_per_second"] > 0 and row["speedup"] > 0 for row in rows_of(complete))


def test_the_picture_is_drawn(complete: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    with Image.open(complete / "accuracy.png") as picture:
        assert min(picture.size) > 300


def test_means_are_over_sets_that_have_every_score(scene_folder: Path, tmp_path: Path) -> None:
    digits = save_a_digit_per_class(tmp_path / "digits")
    data = ("--data", f"scenes={scene_folder}", "--data", f"digits={digits}")
    result = run("evaluate", *data, "--heads", "zero-shot,tip", "--shots", "0,1", *FAST, "--out", tmp_path / "out")
    assert result.exit_code == 1  # digits have no train split
    rows = rows_of(tmp_path / "out")
    assert [(row["data"], row["head"]) for row in rows] == [
        ("scenes", "zero-shot"), ("scenes", "tip"), ("digits", "zero-shot"), ("mean of 2", "zero-shot")
    ]  # fmt: skip
    assert rows[-1]["score"] == pytest.approx((rows[0]["score"] + rows[2]["score"]) / 2, abs=1e-6)
    assert "no score, digits: the data set has no train split: tip of 1 shots by dense (host)." in result.stdout


def test_more_heads_add_to_what_is_there(scene_folder: Path, complete: Path, tmp_path: Path) -> None:
    data = ("--data", f"scenes={scene_folder}")
    succeed("evaluate", *data, *FAST, "--out", tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "state").glob("features-*")}
    succeed("evaluate", *data, "--heads", "zero-shot,tda", "--seeds", 2, *FAST, "--out", tmp_path / "out")
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert len(list((tmp_path / "out" / "state").glob("features-*"))) == len(before)
    expected = [row for row in scores_of(complete) if row[1] == "dense (host)" and row[2] in ("zero-shot", "tda")]
    assert scores_of(tmp_path / "out") == expected


def test_a_support_set_stands_for_shots(scene_folder: Path, tmp_path: Path) -> None:
    classes = ",".join(sorted(path.name for path in (scene_folder / "train").iterdir()))
    build = ("--from-folder", scene_folder / "train", "--classes", classes, "--per-class", 4)
    succeed("support", "build", tmp_path / "set", *build)
    options = ("--heads", "zero-shot,tipx", "--support", f"scenes={tmp_path / 'set'}")
    succeed("evaluate", "--data", f"scenes={scene_folder}", *options, *FAST, "--out", tmp_path / "out")
    assert [(row["head"], row["shots"], row["runs"]) for row in rows_of(tmp_path / "out")] == [
        ("zero-shot", 0, 1), ("tipx", 0, 1)
    ]  # fmt: skip


def test_captions_give_recalls(scene_folder: Path, tmp_path: Path) -> None:
    files = sorted((scene_folder / "test").rglob("*.png"))
    table = tmp_path / "captions.csv"
    lines = [f"{file.relative_to(scene_folder / 'test')},a {file.parent.name}." for file in files]
    table.write_text("image,caption\n" + "\n".join(lines) + "\n", encoding="utf-8")
    options = ("--captions", f"drawn={table}", "--images", scene_folder / "test", "--method", "tome:4")
    succeed("evaluate", *options, *FAST, "--out", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert [row["metric"] for row in rows[:3]] == [f"text to image R@{rank}" for rank in (1, 5, 10)]
    assert [row["method"] for row in rows] == ["dense (host)"] * 6 + ["ToMe(r=4)"] * 6
    assert all(row["data"] == "drawn" and 0 < row["score"] <= 1 for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected --data or --captions, got neither"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "a=DATA", "--data", "a=DATA"], "expected different names with --data, got a twice"),
        (["--data", "DATA="], "expected a folder"),
        (["--data", "photos="], "expected --data of NAME=PATH or a path, got 'photos='"),
        (["--data", "=DATA"], "expected --data of NAME=PATH or a path, got '="),
        (["--data", "DATA", "--images", "DATA"], "expected --captions with --images"),
        (["--data", "DATA", "--heads", "tip"], "expected --shots of 1 or more, or --support, with --heads tip"),
        (["--data", "x=DATA", "--support", "x=DATA"], "expected --heads tip or tipx and 0 in --shots with --support"),
        (["--data", "x=DATA", "--support", "y=DATA", "--heads", "tip"], "expected --support of a data set in --data"),
        (["--data", "x=DATA", "--support", "x=DATA", "--heads", "tip"], "without manifest.json"),
        (["--data", "DATA", "--heads", "tip,tap"], "expected --heads of"),
        (["--data", "DATA", "--shots", "few"], "expected --shots of numbers such as 0,1,4,16, got 'few'"),
        (["--data", "DATA", "--method", "evit:2"], "expected a method such as evit"),
        (["--data", "DATA", "--library", "timm", "--model", "vit_tiny_patch16_224"], "timm has no text tower"),
    ],
)
def test_a_wrong_option_is_one_line(options: list[str], message: str, scene_folder: Path, tmp_path: Path) -> None:
    arguments = [option.replace("DATA", str(scene_folder)) for option in options]
    line = error_after_notes(run("evaluate", *arguments, *FAST, "--out", tmp_path / "out"))
    assert message in line
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused(complete: Path, scene_folder: Path, registered: str) -> None:
    arguments = ("--data", f"scenes={scene_folder}", "--model", registered, *FAST, "--out", complete)
    assert "another tower" in run("evaluate", *arguments).stderr


def start(pause: float, scene_folder: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tests" / "cli" / "evaluate_slowly.py"), str(pause), "evaluate"]
    command += ["--data", f"scenes={scene_folder}", "--method", "evit:0.7", *map(str, HEADS), *map(str, FAST)]
    return subprocess.Popen(
        [*command, "--out", str(out)], cwd=ROOT, env=without_xdist(os.environ), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_a_signal_stops_the_run_and_it_goes_on(complete: Path, scene_folder: Path, tmp_path: Path) -> None:
    process = start(0.5, scene_folder, tmp_path / "out")
    while not list((tmp_path / "out" / "state").glob("features-*")):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on" in stderr
    assert not (tmp_path / "out" / "results.csv").exists()
    process = start(0, scene_folder, tmp_path / "out")
    assert process.communicate(timeout=300) and process.returncode == 0
    assert scores_of(tmp_path / "out") == scores_of(complete)


@pytest.mark.slow
def test_a_run_that_is_killed_five_times_ends_with_the_same_rows(
    complete: Path, scene_folder: Path, tmp_path: Path
) -> None:
    generator, kills = random.Random(0), 0
    while kills < 5:
        process = start(0.1, scene_folder, tmp_path / "out")
        before = set((tmp_path / "out" / "state").glob("*.safetensors")) if (tmp_path / "out").exists() else set()
        while process.poll() is None and set((tmp_path / "out" / "state").glob("*.safetensors")) == before:
            time.sleep(0.02)
        time.sleep(generator.uniform(0, 1))
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
    assert kills >= 3
    process = start(0, scene_folder, tmp_path / "out")
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert scores_of(tmp_path / "out") == scores_of(complete)


def test_the_costs_of_methods_are_in_the_tables(complete: Path, scene_folder: Path) -> None:
    text = (complete / "results.md").read_text(encoding="utf-8")
    assert "| method | GMACs | images/s | speed-up | η |" in text
    assert text.count("\n| dense (host) | ") == text.count("\n| EViT(keep=0.7) | ") == 1
    assert "- GMACs: of an image, as executed." in text
    assert "published | difference" not in text  # no figure is known of these scenes
    assert (
        f"- scenes: folder of folders in train/, val/, test/, {len(scenes.SEEN[:6])} classes, 'a photo of a {{}}.'"
        in text
    )


def test_images_that_cannot_be_read_are_named_in_every_run(scene_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(scene_folder / "test", tmp_path / "photos")
    broken = sorted(folder.rglob("*.png"))[0]
    broken.write_bytes(b"no image")
    for _ in range(2):
        result = run("evaluate", "--data", folder, *FAST, "--rounds", 0, "--out", tmp_path / "out")
        assert result.exit_code == 1
        assert f"photos, test: 1 image left out by dense (host), such as {broken}: not an image" in result.stdout


def test_captions_without_their_image_are_counted(scene_folder: Path, tmp_path: Path) -> None:
    files = sorted((scene_folder / "test").rglob("*.png"))[:12]
    names = [str(file.relative_to(scene_folder / "test")) for file in files]
    images = [{"id": number, "file_name": name} for number, name in enumerate([*names, "missing.png", names[0] + "x"])]
    notes = [{"image_id": number, "caption": "a drawing"} for number in range(13)]
    file = tmp_path / "captions_test.json"
    file.write_text(json.dumps({"images": images, "annotations": notes}), encoding="utf-8")
    options = ("--captions", file, "--images", scene_folder / "test", "--rounds", 0)
    result = succeed("evaluate", *options, *FAST, "--out", tmp_path / "out")
    for note in (
        "captions_test.json: COCO captions JSON, 12 images with 12 captions",
        "captions_test.json: left out 1 image without captions",
        "captions_test.json: 1 of the 13 files of the test split are missing, the first 'missing.png'",
    ):
        assert note in result.stdout.splitlines()


def test_results_of_another_command_are_kept(scene_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("mine", encoding="utf-8")
    line = error_after_notes(run("evaluate", "--data", f"scenes={scene_folder}", *FAST, "--out", tmp_path))
    assert "with results.csv and no state/run.json: choose another one, or move that file" in line
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


def test_two_runs_at_once_are_refused(complete: Path, scene_folder: Path) -> None:
    settings = (complete / "state" / "run.json").read_bytes()
    lock = Lock(complete / "state")
    try:
        arguments = ("--data", f"scenes={scene_folder}", *FAST, "--out", complete)
        process = subprocess.run(
            [sys.executable, "-m", "clipkernels", "evaluate", *map(str, arguments)],
            env=without_xdist(os.environ), text=True, capture_output=True, timeout=120,
        )  # fmt: skip
    finally:
        lock.release()
    assert process.returncode == 2 and "to have one writer, got process" in process.stderr
    assert (complete / "state" / "run.json").read_bytes() == settings


def test_another_batch_size_is_refused_with_a_remedy(complete: Path, scene_folder: Path) -> None:
    line = error_after_notes(
        run("evaluate", "--data", f"scenes={scene_folder}", *FAST, "--batch-size", 8, "--out", complete)
    )
    assert "batch_size 16 instead of 8: repeat it as it was, or choose another folder (--out)" in line


def test_a_resnet_runs_its_heads(scene_folder: Path, tmp_path: Path, resnet: str) -> None:
    heads = ("--heads", "zero-shot,calip,reservoir", "--model", resnet)
    result = run("evaluate", "--data", f"scenes={scene_folder}", *heads, *FAST, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert [row["head"] for row in rows_of(tmp_path / "out")] == ["zero-shot", "calip"]
    assert "no score, scenes: the tower has no CLS token: reservoir by dense (host)." in result.stdout
    only = ("--heads", "reservoir", "--model", resnet, *FAST, "--out", tmp_path / "none")
    result = run("evaluate", "--data", f"scenes={scene_folder}", *only)
    assert result.exit_code == 2
    assert "a head that some data set has a score for, got none: the tower has no CLS token" in result.stderr
    assert not (tmp_path / "none" / "results.csv").exists()


def row(data: str, score: float, spread: float | None = None) -> Row:
    return Row(
        data, "dense (host)", "tda", "accuracy", 0, Score(score, score - 0.03, score + 0.04, spread, 3, 50), {}, ""
    )


def test_a_mean_combines_intervals_and_figures() -> None:
    results = Results([row("dtd", 0.5, 0.03), row("pets", 0.9, 0.04)], [], [])
    published = partial(published_of, published_model("ViT-B-16-quickgelu", "openai"))
    dtd, pets, mean = records_of(results, {}, published)
    assert (dtd["published"], dtd["difference"], pets["published"]) == (0.474, 0.026, 0.8863)
    assert dtd["published_prompts"].startswith("TDA's released code")
    assert (mean["data"], mean["score"], mean["published"], mean["verified"]) == ("mean of 2", 0.7, 0.68015, True)
    assert mean["low"] == pytest.approx(0.7 - (2 * 0.03**2) ** 0.5 / 2, abs=1e-6)
    assert mean["high"] == pytest.approx(0.7 + (2 * 0.04**2) ** 0.5 / 2, abs=1e-6)
    assert mean["spread"] == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("name", "pretrained", "expected"),
    [
        ("ViT-B-16", "openai", "ViT-B-16 openai"),
        ("RN50-quickgelu", "openai", "RN50 openai"),
        ("openai/clip-vit-base-patch16", None, "ViT-B-16 openai"),
        ("ViT-B-16", "laion2b_s34b_b88k", "ViT-B-16 laion2b_s34b_b88k"),
        (None, None, "None None"),
    ],
)
def test_models_have_the_names_of_published_figures(name: str | None, pretrained: str | None, expected: str) -> None:
    assert published_model(name, pretrained) == expected
