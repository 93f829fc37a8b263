"""The verb tune: its table, its promise, its file, its exit statuses, signals and kills."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import clipkernels as ck
from clipkernels.cli.parts.demo_images import QUICK, draw, save
from clipkernels.tuning.cost_table import CostTable
from tests.cli.commands import error_after_notes, run, succeed
from tests.subprocesses import without_xdist
from tests.tuning.fixed_times import fix_times, table_of

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
BUDGET = ("--budget", "cosine_mean>=.97")
COUNTED = ("--cost", "gmacs", "--workers", 0)
FAST = (*COUNTED, "--evaluations", 20, "--families", "merge,prune", "--device", "cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 60 digits of the quick demo, a folder per class."""
    folder = tmp_path_factory.mktemp("tune")
    save({"digits": draw(QUICK, seed=0)["digits"]}, folder)
    return folder / "digits"


@pytest.fixture(scope="module")
def schedule(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of the schedule that an undisturbed run writes."""
    out = tmp_path_factory.mktemp("schedule") / "schedule.json"
    succeed("tune", photos, *BUDGET, *FAST, "--out", out)
    return out.read_bytes()


def test_a_schedule_is_written_and_used(photos: Path, tmp_path: Path, schedule: bytes) -> None:
    out = tmp_path / "schedule.json"
    result = succeed("tune", photos, *BUDGET, *FAST, "--out", out, "--plot", tmp_path / "frontier.png")
    assert out.read_bytes() == schedule and not (tmp_path / "schedule.json.state").exists()
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    lines = result.stdout.splitlines()
    assert "on 30 photographs; * is published" in lines[0]
    assert any("→" in line and "✓" in line for line in lines) and any(
        re.search(r"ToMe\(r=\d+\) \*", line) for line in lines
    )
    promise = next(line for line in lines if line.startswith("cosine_mean>=0.97: "))
    assert "on 30 held-out photographs, at least 0.9" in promise and promise.endswith("with 95 % confidence")
    assert lines[-1] == f"use it with --method {out}, or ck.Schedule.load({str(out)!r})"
    plan = ck.Schedule.load(out)
    classified = succeed("classify", photos, "--folder-labels", "--method", out, "--format", "csv")
    assert str(plan) in classified.stderr


def test_json_and_csv_have_the_frontier(photos: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "schedule.json")
    document = json.loads(succeed("tune", photos, *BUDGET, *FAST, *out, "--format", "json").stdout)
    assert document["budget"] == "cosine_mean>=.97" and document["images"] == {
        "search": 30,
        "held_out": 30,
        "skipped": 0,
    }
    [promise] = document["promises"]
    assert promise["constraint"] == "cosine_mean>=0.97" and promise["figure"] >= promise["bound"] >= 0.97
    [chosen] = [row for row in document["rows"] if row["chosen"]]
    assert chosen["gmacs_run"] == pytest.approx(document["gmacs_run"], abs=1e-6) and chosen["keeps"]
    text = succeed("tune", photos, *BUDGET, *FAST, *out, "--format", "csv").stdout
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["plan"] for row in rows] == [row["plan"] for row in document["rows"]]


def test_labels_of_folders_and_captions_are_read(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "schedule.json"
    budget = ("--budget", "accuracy_drop<=.5")
    result = succeed("tune", photos, *budget, *FAST, "--out", out, "--folder-labels")
    assert "accuracy_drop<=0.5: " in result.stdout and "at most " in result.stdout
    for path in photos.rglob("*.png"):
        path.with_suffix(".txt").write_text(f"a photo of a {path.parent.name}")
    result = succeed("tune", photos, "--budget", "text_recall@10>=.2", *FAST, "--out", out, "--text", "txt")
    assert "text_recall@10>=0.2: " in result.stdout and " among 60" in result.stdout


def test_no_plan_is_exit_one(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "schedule.json"
    result = run("tune", photos, "--budget", "cosine_p1>=.99999", *FAST, "--out", out)
    assert result.exit_code == 1 and not out.exists() and not (tmp_path / "schedule.json.state").exists()
    assert result.stdout.splitlines()[-1].startswith("no schedule: expected a plan that keeps cosine_p1>=0.99999, got ")
    assert result.stderr.endswith("; no schedule was written\n")


def test_an_image_that_is_left_out_is_exit_one(photos: Path, tmp_path: Path, schedule: bytes) -> None:
    (tmp_path / "broken.png").write_text("no image")
    out = tmp_path / "schedule.json"
    result = run("tune", photos, tmp_path / "broken.png", *BUDGET, *FAST, "--out", out)
    assert result.exit_code == 1 and out.read_bytes() == schedule
    assert f"skipped {tmp_path}/broken.png: " in result.stderr and "; 1 file skipped" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--budget", "recall>=.9"), "recall@"),
        (("--budget", "recall@1>=99%"), "divide the percentage by 100"),
        (("--budget", "accuracy_drop<=.01"), "--folder-labels"),
        (("--budget", "text_recall@1>=.5"), "--text"),
        (("--budget", "text_recall@1>=.5", "--text", "caption"), "expected a caption in "),
        (("--budget", "speedup>=1.5"), "measured cost"),
        (("--budget", "recall@500>=.9"), "more than 500 images"),
        ((*BUDGET, "--families", "merges"), "'merges'"),
        ((*BUDGET, "--plot", "frontier.jpg"), "frontier.jpg"),
        ((*BUDGET, "--device", "tpu:9"), "tpu:9"),
        ((*BUDGET, "--state", "STATE"), "'notes.txt'"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_two(
    arguments: tuple[str, ...], expected: str, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "notes.txt").write_text("mine")
    given = [tmp_path / "state" if part == "STATE" else part for part in arguments]
    result = run("tune", photos, *COUNTED, "--out", tmp_path / "schedule.json", *given)
    assert expected in error_after_notes(result)
    assert not (tmp_path / "schedule.json").exists()


def test_a_cost_table_is_written_and_then_read(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[CostTable] = []

    def measure(model: nn.Module, batch: int, **options: Any) -> CostTable:
        measured.append(table_of(model, batch))
        return measured[-1]

    monkeypatch.setattr("clipkernels.tuning.costs.measure_cost", measure)
    fix_times(monkeypatch, plan=1.0)
    out, cost = tmp_path / "schedule.json", tmp_path / "cost.json"
    few = (photos / "zero", photos / "one", "--budget", "cosine_mean>=.5", "--families", "merge", "--evaluations", 8)
    options = (*few, "--workers", 0, "--device", "cpu", "--cost", cost, "--out", out)
    first = succeed("tune", *options)
    assert [CostTable.load(cost)] == measured and measured[0].conditions.batch == 8
    assert "measured speed-up over the fastest dense tower: ×1.50 (×1.50 to ×1.50)" in first.stdout.splitlines()
    content, schedule = cost.read_bytes(), out.read_bytes()
    document = json.loads(succeed("tune", *options, "--format", "json").stdout)
    assert len(measured) == 1 and cost.read_bytes() == content and out.read_bytes() == schedule
    dense = measured[0].milliseconds(ck.Dense().plan(65, 6))
    assert [row["milliseconds"] for row in document["rows"] if row["plan"] == "Dense()"] == [round(dense, 4)]
    result = run("tune", *options, "--batch-size", 4)
    assert f"expected a cost table of batch 4 (it has 8), got {cost}: measure a new one" in error_after_notes(result)
    assert cost.read_bytes() == content and out.read_bytes() == schedule


class Process:
    """A run of the verb in another process.

    Args:
        photos: the photographs.
        out: the file of the schedule.
        pause: seconds before every forward.
    """

    def __init__(self, photos: Path, out: Path, pause: float = 0.0) -> None:
        script = Path(__file__).with_name("tune_slowly.py")
        arguments = ["tune", photos, *BUDGET, *FAST, "--out", out, "--threads", 1]
        self.process = subprocess.Popen(
            [sys.executable, script, str(pause), *map(str, arguments)],
            cwd=ROOT, env=without_xdist({**os.environ, "PYTHONPATH": str(ROOT)}), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.state = out.with_name(f"{out.name}.state")

    def wait_for(self, plans: int) -> None:
        """Wait until so many evaluations are kept."""
        deadline = time.monotonic() + 300
        while len(list(self.state.glob("plan-*"))) < plans:
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate()
            time.sleep(0.01)

    def end(self, number: int | None = None) -> tuple[int, str]:
        """Send a signal, and return the exit status and stderr."""
        if number is not None:
            self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=300)
        return self.process.returncode, errors


def test_a_run_that_is_killed_goes_on_to_the_same_file(photos: Path, tmp_path: Path, schedule: bytes) -> None:
    out, kept = tmp_path / "schedule.json", 0
    for plans in (4, 20):
        process = Process(photos, out, pause=0.05)
        process.wait_for(plans)
        assert process.end(signal.SIGKILL)[0] == -signal.SIGKILL and not out.exists()
        now = len(list(process.state.glob("plan-*.json")))
        assert now >= max(plans, kept)
        kept = now
    assert Process(photos, out).end()[0] == 0
    assert out.read_bytes() == schedule and sorted(os.listdir(tmp_path)) == ["schedule.json"]


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_ends_in_the_same_file(photos: Path, tmp_path: Path, schedule: bytes) -> None:
    out, dice = tmp_path / "schedule.json", random.Random(0)
    for number in range(10):
        process = Process(photos, out, pause=0.05)
        process.wait_for(1 + 4 * number)
        time.sleep(dice.random() * 0.3)
        process.end(signal.SIGKILL)
    assert Process(photos, out).end()[0] == 0
    assert out.read_bytes() == schedule and sorted(os.listdir(tmp_path)) == ["schedule.json"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_forward(photos: Path, tmp_path: Path, number: int, status: int) -> None:
    process = Process(photos, tmp_path / "schedule.json", pause=0.05)
    process.wait_for(3)
    returned, errors = process.end(number)
    assert returned == status and "stopping after this forward" in errors
    assert errors.splitlines()[-1] == "stopped in effects; the same command goes on"
    assert process.state.exists() and not (tmp_path / "schedule.json").exists()


def test_a_state_of_other_photographs_is_refused(photos: Path, tmp_path: Path) -> None:
    out: dict[str, Any] = {"out": tmp_path / "schedule.json"}
    process = Process(photos, out["out"], pause=0.05)
    process.wait_for(2)
    process.end(signal.SIGKILL)
    result = run("tune", photos / "zero", photos / "one", *BUDGET, *FAST, "--out", out["out"])
    assert "expected the run that state" in error_after_notes(result) and "other pixels" in result.stderr
