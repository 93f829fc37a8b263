"""The committed table of launches is current, and the bench of the host's time runs without a GPU."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("open_clip", reason="open_clip is not installed, which defines the towers")

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "bench" / "results" / "launches.csv"


def run_host(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip(
        "triton", "3.4", reason="no triton from 3.4 on is installed; earlier ones cannot compile the kernels"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "COLUMNS": "120"}
    command = [sys.executable, "-m", "bench.cost.host", *options]
    return subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT
    )


def test_the_table_of_launches_is_current(tmp_path: Path) -> None:
    process = run_host("--only", "launches", "--out", str(tmp_path / "launches.csv"))
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "launches.csv").read_text() == TABLE.read_text(), (
        "run `python -m bench.cost.host --only launches --out bench/results/launches.csv` and commit the table"
    )


def test_towers_launch_no_more_than_their_budgets() -> None:
    rows = list(csv.DictReader(TABLE.open(encoding="utf-8")))
    totals = {row["method"]: int(row["launches"]) for row in rows if row["kernel"] == "all"}
    assert totals.keys() == {"Dense()", "EViT(0.7)", "ToMe(13)"}
    for method, total in totals.items():
        assert total == sum(int(row["launches"]) for row in rows if row["method"] == method and row["kernel"] != "all")
        assert total <= {"Dense()": 48, "EViT(0.7)": 54, "ToMe(13)": 84}[method]


@pytest.mark.slow
def test_the_bench_prints_a_row_for_each_operation_and_tower() -> None:
    process = run_host("--only", "operations", "towers", "--rounds", "1")
    assert process.returncode == 0, process.stderr
    rows = [re.split(r"\s*│\s*", line.strip("│ ")) for line in process.stdout.splitlines() if line.startswith("│")]
    figures = {name: cells for name, *cells in rows}
    assert figures["torch.add of 4 elements"][2] == "1.0"
    launches = {name: cells[0] for name, cells in figures.items()}
    assert launches["attention, cls"] == "1" and launches["prune_tokens, heads, fuse, norm"] == "2"
    assert launches["cross_attention"] == launches["calip_logits"] == "2" and launches["targeted_l1"] == "3"
    assert launches["open_clip eager"] == "0" and launches["Dense()"] == "48"


def test_the_interpreter_is_refused() -> None:
    process = run_host(TRITON_INTERPRET="1")
    assert process.returncode == 1
    assert process.stderr == "error: expected triton's compiler, got TRITON_INTERPRET=1: unset it\n"
