"""The verb distill: its tables, its exit statuses, its refusals, and runs that are stopped or killed."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest

from clipkernels.cli.distill import choose_domain, choose_shares, distill
from clipkernels.questions.examples import ExampleSet
from clipkernels.questions.vcr import VCRQuestion
from tests.cli.commands import error, error_after_notes, run, succeed
from tests.questions.annotation_folders import picture, write_colours
from tests.subprocesses import without_xdist

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
FAST = ("--steps", 3, "--batch-size", 8, "--workers", 0, "--device", "cpu", "--threads", 1)
TRAININGS = ("--shares", "50,100", "--seeds", 2, "--methods", "none,targeted")


@pytest.fixture(scope="module")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SNLI-VE with 12 pairs to train on, and as many to score."""
    folder = tmp_path_factory.mktemp("annotations")
    write_colours(folder, "snli-ve", 12)
    return folder


def arguments_of(annotations: Path, out: Path) -> tuple[Any, ...]:
    images = annotations / "images"
    return ("distill", annotations, "--task", "snli-ve", "--images", images, "--out", out, *TRAININGS, *FAST)


@pytest.fixture(scope="module")
def complete(annotations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not interrupted."""
    out = tmp_path_factory.mktemp("complete") / "out"
    succeed(*arguments_of(annotations, out))
    return out


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The rows of a folder without their times."""
    rows: list[dict[str, Any]] = json.loads((out / "results.json").read_text())["rows"]
    return [{**row, "seconds": 0} for row in rows]


def test_a_folder_gets_rows_means_and_notes(complete: Path) -> None:
    rows = rows_of(complete)
    assert len(rows) == 2 * 2 * 2 * 4  # shares, seeds, methods, and the accuracy with that of three classes
    with (complete / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["method"], float(row["share"]), float(row["score"])) for row in table] == [
        (row["method"], row["share"], row["score"]) for row in rows
    ]
    text = (complete / "results.md").read_text()
    of_none = [r["score"] for r in rows if (r["method"], r["share"], r["metric"]) == ("none", 1.0, "accuracy")]
    line = next(line for line in text.splitlines() if line.startswith("| test | accuracy | 100 % | none |"))
    assert f"| {100 * sum(of_none) / 2:.2f} |" in line
    of_targeted = [r["score"] for r in rows if (r["method"], r["share"], r["metric"]) == ("targeted", 1.0, "accuracy")]
    gain = next(line for line in text.splitlines() if line.startswith("| test | accuracy | 100 % | targeted |"))
    assert f"| {100 * (sum(of_targeted) - sum(of_none)) / 2:+.2f} |" in gain
    assert "- 50 % of the labels: 6 annotations, 3 of their classes" in text and "a reconstruction" in text


def test_the_same_command_trains_nothing_again_in_any_format(annotations: Path, complete: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in (complete / "state").iterdir()}
    result = succeed(*arguments_of(annotations, complete), "--format", "csv")
    assert len(list(csv.DictReader(io.StringIO(result.stdout)))) == len(rows_of(complete))
    assert before == {file.name: file.stat().st_mtime_ns for file in (complete / "state").iterdir()}
    assert "8 trainings in" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "none,magic"), "expected --methods of none, finetune, plain, targeted, got 'magic'"),
        (("--shares", "0,10"), "expected --shares in percent such as 1,10,100, got '0'"),
        (("--shift", "source"), "expected no --shift, because its files have no field for it for snli-ve"),
        (("--train", "dev"), "snli_ve_dev.jsonl"),
        (("--student", "nothing"), "expected a student as module:Class, got 'nothing'"),
        (("--student", "math:sqrt"), "is made with a StudentTask alone, got TypeError: must be real number"),
        (("--lr", "inf"), "lr must be a number in (0, inf), got inf"),
    ],
)
def test_wrong_options_are_one_line(annotations: Path, tmp_path: Path, options: Any, message: str) -> None:
    images = annotations / "images"
    base = ("distill", annotations, "--task", "snli-ve", "--images", images, "--out", tmp_path / "out", *FAST)
    assert message in error_after_notes(run(*base, *options))
    assert not (tmp_path / "out").exists()


def test_other_settings_and_other_folders_are_refused(annotations: Path, complete: Path, tmp_path: Path) -> None:
    result = run(*arguments_of(annotations, complete), "--strength", 2)
    assert "strength 1.0 instead of 2.0" in error_after_notes(result)
    (tmp_path / "results.csv").write_text("mine")
    assert "with results.csv and no state/run.json" in error(run(*arguments_of(annotations, tmp_path)))


def test_an_image_that_cannot_be_read_ends_with_1(tmp_path: Path) -> None:
    write_colours(tmp_path, "vqa", 8)
    (tmp_path / "images" / "COCO_train2014_000000000001.jpg").write_bytes(b"no image")
    options = ("--methods", "none", "--shares", 100, "--seeds", 1, "--shift", "answer_type=other")
    folders = ("--task", "vqa", "--images", tmp_path / "images", "--out", tmp_path / "out")
    result = run("distill", tmp_path, *folders, *options, *FAST)
    assert result.exit_code == 1 and "left out 1 image that cannot be read" in result.stdout
    broken = tmp_path / "images" / "COCO_train2014_000000000001.jpg"
    assert f"skipped {broken}: not an image (no format that is read)" in result.stderr
    assert {(row["split"], row["scored"]) for row in rows_of(tmp_path / "out")} == {("same", 4), ("shifted", 4)}
    picture(tmp_path / "images" / "x.jpg", (1, 2, 3))
    message = error(run("distill", tmp_path, *folders[:4], "--out", tmp_path / "b", *FAST, "--shift", "answer_type=x"))
    assert "expected values of answer_type in the test split, such as other, yes/no, got 'x'" in message


def test_values_that_are_drawn_occur_in_both_splits() -> None:
    def set_of(*movies: str) -> ExampleSet:
        items = [VCRQuestion(str(n), "a.jpg", "", (), 0, (), 0, movie, "lsmdc") for n, movie in enumerate(movies)]
        return ExampleSet("vcr", tuple(items), (), (), ())

    train, test = set_of("a", "a", "b", "c", "c", "c"), set_of("a", "c", "d")
    field, values = choose_domain("movie", "vcr", train, test)
    assert field == "movie" and values in (("a",), ("c",))
    assert choose_domain("movie=d, a,a", "vcr", train, test) == ("movie", ("a", "d"))
    assert choose_domain(None, "vcr", train, test) == ("", ())
    with pytest.raises(click.UsageError, match="expected movie or source for vcr, got --shift text"):
        choose_domain("text", "vcr", train, test)
    with pytest.raises(click.UsageError, match="such as a, c, d, got 'b'"):
        choose_domain("movie=b", "vcr", train, test)
    with pytest.raises(ValueError, match="two different values or more, got 'a'"):
        choose_domain("movie", "vcr", train, set_of("a", "d"))


def test_the_shares_and_methods_are_those_of_the_protocol_by_default() -> None:
    defaults = {option.name: option.default for option in distill.params}
    assert choose_shares(*defaults["shares"]) == [0.01, 0.05, 0.1, 0.2, 0.5, 1.0]
    assert defaults["methods"] == ("none,finetune,plain,targeted",)


def test_shares_are_percents_in_ascending_order() -> None:
    assert choose_shares("100, 5,.5,5.0") == [0.005, 0.05, 1.0]


def test_results_have_the_trainings_of_the_last_command(annotations: Path, complete: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(complete, out)
    whole = rows_of(out)
    folders = arguments_of(annotations, out)[: -len(TRAININGS + FAST)]
    succeed(*folders, "--shares", 50, "--seeds", 1, "--methods", "plain", *FAST)
    assert {(row["method"], row["share"], row["seed"]) for row in rows_of(out)} == {("plain", 0.5, 0)}
    succeed(*arguments_of(annotations, out))
    assert rows_of(out) == whole


def start(pause: float, annotations: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tests" / "cli" / "distill_slowly.py"), str(pause)]
    return subprocess.Popen(
        [*command, *map(str, arguments_of(annotations, out))], cwd=ROOT, env=without_xdist(os.environ), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_a_signal_stops_the_run_and_it_goes_on(annotations: Path, complete: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(0.5, annotations, out)
    while not list((out / "state").glob("checkpoint*")) if out.exists() else True:
        time.sleep(0.05)
        assert process.poll() is None
    other = run(*arguments_of(annotations, out))
    assert other.exit_code == 2 and "to have one writer" in other.stderr
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on" in stderr
    assert not (out / "results.csv").exists()
    process = start(0, annotations, out)
    assert process.communicate(timeout=300) and process.returncode == 0
    assert rows_of(out) == rows_of(complete)


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_same_rows(annotations: Path, complete: Path, tmp_path: Path) -> None:
    generator, kills, out = random.Random(0), 0, tmp_path / "out"
    while kills < 4:
        process = start(0.1, annotations, out)
        state = out / "state"
        before = {file: file.stat().st_mtime_ns for file in state.glob("*")} if state.exists() else {}
        while process.poll() is None:
            files = [file for file in state.glob("*.*") if not file.name.startswith(".")] if state.exists() else []
            if {file.name for file in files} - {file.name for file in before}:
                break
            time.sleep(0.02)
        time.sleep(generator.uniform(0, 0.4))
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
    assert kills >= 2
    process = start(0, annotations, out)
    assert process.communicate(timeout=300) and process.returncode == 0
    assert rows_of(out) == rows_of(complete)
