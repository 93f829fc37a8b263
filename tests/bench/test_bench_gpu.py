"""The GPU campaign: its steps, schedule, resumption and report, and the searches for configurations."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import clipkernels as ck
from bench.gpu import campaign, counters, report, staircase, steps, targets, tune
from bench.result_files import note_attempt, remaining
from clipkernels.cli.check import check
from clipkernels.measure.timing import Times
from clipkernels.testing.inputs import Shape
from tests.subprocesses import without_xdist

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the campaign would run on this GPU")
def test_without_a_gpu_the_campaign_stops_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu.campaign", "--out", tmp_path / "results"]
    done = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: expected a CUDA or ROCm device, got none")
    assert not list(tmp_path.iterdir())


def test_every_step_names_an_existing_script_and_options(tmp_path: Path) -> None:
    every = steps.steps(tmp_path, "tome=.")
    assert len({step.name for step in every}) == len(every)
    for step in every:
        command = list(step.command)
        assert all((BENCH.parent / word).is_file() for word in command if word.endswith(".py"))
        if "pytest" in command:
            source = (BENCH / "conftest.py").read_text(encoding="utf-8") if "bench/ops.py" in command else ""
        else:
            if command[1].startswith("bench."):
                source = (BENCH.parent / f"{command[1].replace('.', '/')}.py").read_text(encoding="utf-8")
            else:
                assert command[1:3] == ["clipkernels", "check"], step
                source = " ".join(f'"{name}"' for option in check.params for name in option.opts)
            assert all(f'"{word}"' in source for word in command if word.startswith("--")), step
        assert ('"--deadline"' in source) == (step.piece is not None), step


def test_the_steps_collect_benchmarks_of_one_dtype(tmp_path: Path) -> None:
    command = next(step.command for step in steps.steps(tmp_path) if step.name == "ops")
    collect = [sys.executable, *command, "--collect-only"]
    done = subprocess.run(collect, cwd=BENCH.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "bfloat16" in done.stdout and "float32" not in done.stdout, done.stdout


def test_a_missing_package_is_named_with_its_steps(tmp_path: Path) -> None:
    every = steps.steps(tmp_path)
    lines = "\n".join(steps.losses(every, ["ftfy", "transformers", "matplotlib"]))
    assert "ftfy is missing: these steps cannot run: towers, dense-default," in lines
    assert "transformers is missing: these steps cannot run: transformers\n" in lines
    assert "matplotlib is missing: the report has no pictures" in lines
    assert "pip download" in lines and "--target site" in lines and "PYTHONPATH=" in lines
    assert list(steps.losses(every, [])) == []
    assert next(steps.losses(every, ["torch"])) == "torch is missing: no step can run"


def test_missing_packages_are_found_without_importing_torch() -> None:
    code = "from bench.gpu import steps; import sys; steps.missing_packages(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCH.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def step(name: str, code: str = "print('done')", seconds: float = 30, **more: Any) -> steps.Step:
    """Return a step that runs Python code."""
    return steps.Step(name, ["-c", code], seconds, **more)


def new_campaign(tmp_path: Path, every: list[steps.Step], limit: float = 100) -> campaign.Campaign:
    folder = tmp_path / "a-gpu"
    folder.mkdir(exist_ok=True)
    return campaign.Campaign(every, folder, tmp_path, limit, time.monotonic())


def archived(tmp_path: Path) -> set[str]:
    """Return the file names in the archive."""
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        return {Path(name).name for name in archive.getnames()}


def test_every_step_is_visited_once_before_any_is_repeated() -> None:
    first, second = step("first", seconds=40, total=200, piece=10), step("second", seconds=50)
    every = [first, second]
    fresh = steps.Progress((), (), {})
    assert steps.next_visit(every, fresh, 500) == steps.Visit(first, 40)
    once = steps.Progress((), (), {"first": 1})
    assert steps.next_visit(every, once, 460) == steps.Visit(second, 50)
    # The remaining time is too short for the second step and long enough for a piece of the first.
    assert steps.next_visit(every, once, 45) == steps.Visit(first, 45)
    assert steps.next_visit(every, once, 9) is None
    assert steps.next_visit(every, fresh._replace(failed=["first"]), 500) == steps.Visit(second, 50)
    assert steps.next_visit(every, steps.Progress(["second"], ["first"], {}), 500) == steps.Visit(first, 40)


def test_the_first_ten_minutes_measure_the_denominators(tmp_path: Path) -> None:
    lines = list(steps.schedule(steps.steps(tmp_path), [570, 570], 3))
    second = lines.index("run 2, 570 s")
    names = [line.split()[2].rstrip(":") for line in lines[1 : second - 1]]
    expected = ["kernels", "ceilings", "first-check", "ops", "towers", "dense-default", "dense-max-autotune"]
    assert names[: len(expected)] == expected
    assert all(float(line.split()[0]) <= 570 for line in lines if line.startswith(" "))
    assert any("tests: 250 s, complete" in line for line in lines[second:])


def test_a_run_survives_slow_and_failing_steps_and_reports_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(campaign, "PATIENCE", 0)
    slow = "import time; print('half', flush=True); time.sleep(60)"
    more = "import sys; print(*sys.argv[1:]); raise SystemExit(75 * (sys.argv[-1] == '15'))"
    every = [
        step("slow", slow, 2),
        step("wrong", "print('one failed'); raise SystemExit(1)"),
        step("right", "print('all passed')"),
        step("more", more, 20, total=90, piece=5),
        step("long", seconds=500),
    ]
    run = new_campaign(tmp_path, every, 60)
    assert run.run() == ["slow", "wrong"]
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "log.txt").read_text()
    assert re.search(r"slow: stopped at its time limit after \d+ s: half\n", printed)
    assert re.search(r"wrong: exit status 1 after \d+ s: one failed\n    one failed\n", printed)
    assert re.search(r"right: done after \d+ s: all passed\n", printed)
    # The first visit is limited to the estimate minus one piece; the second is not.
    assert re.search(r"more: incomplete after \d+ s: --deadline 15\n", printed)
    assert re.search(r"more: done after \d+ s: --deadline [3-5]\d\n", printed)
    assert re.search(r"skipped long: needs 500 s, \d+ s are left\n", printed)
    assert campaign.read(run.folder) == run.done and [name for name in run.done if run.done[name].whole] == [
        "right",
        "more",
    ]
    assert {"done.json", "report.md", "slow.log", "right.log"} <= archived(tmp_path)
    assert (tmp_path / "report.md").read_text().endswith(report.NOTHING)


def test_archive_and_report_are_complete_after_every_step(tmp_path: Path) -> None:
    """The second step lists the archive after the first step."""
    look = "import sys, tarfile; print(sorted(tarfile.open(r'{}').getnames()))"
    every = [step("one"), step("two", look.format(tmp_path / "results.tar.gz"))]
    run = new_campaign(tmp_path, every)
    assert run.run() == [] and "a-gpu/one.log" in run.done["two"].line and "a-gpu/report.md" in run.done["two"].line


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_run_resumes_from_its_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second step kills the campaign, which is then resumed in another folder."""
    count = "open(r'{}', 'a').write('x')"
    kill = "import os, signal, time; os.kill(os.getppid(), signal.SIGKILL); time.sleep(9)"
    code = f"""
import time
from bench.gpu import campaign, steps
from pathlib import Path
every = [steps.Step("one", ["-c", "print(1)"], 5), steps.Step("two", ["-c", {kill!r}], 5)]
folder = Path(r"{tmp_path}") / "first" / "a-gpu"; folder.mkdir(parents=True)
campaign.Campaign(every, folder, folder.parent, 60, time.monotonic()).run()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCH.parent, capture_output=True, check=False)
    assert done.returncode == -9
    folder, marks = tmp_path / "second" / "a-gpu", {name: tmp_path / name for name in ("one", "two")}
    every = [step(name, count.format(mark)) for name, mark in marks.items()]
    monkeypatch.setattr(campaign, "steps", lambda *_: every)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(campaign.signal, "signal", lambda *_: None)
    monkeypatch.setattr("bench.result_files.stamp", lambda: {"driver": "1", "commit": "abc", "date": "2026-11-22"})
    options = ["--folder", str(folder), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["campaign.py", *options, "--resume", str(tmp_path / "first" / "results.tar.gz")])
    campaign.main()
    assert not marks["one"].exists() and marks["two"].exists()
    assert campaign.read(folder)["one"].whole and campaign.read(folder)["two"].whole
    with pytest.raises(SystemExit, match="expected no results in"):
        campaign.main()
    monkeypatch.setattr(sys, "argv", ["campaign.py", *options, "--again", "one"])
    campaign.main()
    assert marks["one"].read_text() == "x" and "one: done" in capsys.readouterr().out


def test_an_archive_of_another_device_is_refused(tmp_path: Path) -> None:
    run = new_campaign(tmp_path, [step("one")])
    run.run()
    with pytest.raises(SystemExit, match=r"expected results of another-gpu in .*, got a-gpu"):
        campaign.unpack(tmp_path / "results.tar.gz", tmp_path / "another-gpu")


def test_no_process_outlives_an_interrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_campaign(tmp_path, [step("sleeping", "import time; time.sleep(60)")])

    def interrupted(self: Any, timeout: float | None = None) -> int:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert run.running is not None and run.running.poll() == -9


def test_measuring_a_step_anew_removes_its_rows(tmp_path: Path) -> None:
    run = new_campaign(tmp_path, [step("one"), step("two")])
    run.run()
    rows = run.folder / "one.csv"
    rows.write_text("rows")
    campaign.forget(steps.Step("one", ["--out", str(rows)], 1), run.folder)
    assert not rows.exists() and list(campaign.read(run.folder)) == ["two"]


def test_a_step_marked_always_runs_in_every_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    every = [step("kernels", f"open(r'{mark}', 'a').write('x')", always=True), step("one")]
    for _ in range(2):
        new_campaign(tmp_path, every).run()
    assert mark.read_text() == "xx"


@pytest.mark.parametrize(
    "names",
    [
        ["ceilings", "first-check"],
        pytest.param([], marks=pytest.mark.slow, id="every step"),
    ],
    ids=str,
)
def test_a_dry_run_completes_every_step_and_writes_every_file(tmp_path: Path, names: list[str]) -> None:
    command = [sys.executable, "-m", "bench.gpu.campaign", "--dry-run", "--out", tmp_path, "--limit", "3600"]
    command += ["--steps", *names] if names else []
    done = subprocess.run(
        command, cwd=BENCH.parent, env=without_xdist(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    every = steps.steps(tmp_path / "dry-run")
    chosen = [step for step in every if not names or step.name in names]
    state = campaign.read(tmp_path / "dry-run")
    assert {name for name in state if state[name].whole} == {step.name for step in chosen}
    outputs = [
        Path(step.command[list(step.command).index(option) + 1])
        for step in chosen
        for option in ("--out", "--output", "--rows", "--plot")
        if option in step.command and step.name != "counters"  # it needs ncu
    ]
    assert outputs and all(file.stat().st_size for file in outputs)
    assert {file.name for file in outputs} <= archived(tmp_path)
    assert {"results.tar.gz", "report.md", "log.txt"} == {file.name for file in tmp_path.iterdir() if file.is_file()}


def test_a_case_that_ended_two_runs_is_given_up(tmp_path: Path) -> None:
    out, every = tmp_path / "rows.csv", [("a", 1), ("b", 1), ("c", 1)]
    note_attempt(out, str(("a", 1)))
    assert remaining(every, {("b", 1)}, out) == ([("c", 1), ("a", 1)], [])
    note_attempt(out, str(("a", 1)))
    assert remaining(every, {("b", 1)}, out) == ([("c", 1)], ["('a', 1)"])
    assert remaining(every, {("a", 1)}, out) == ([("b", 1), ("c", 1)], [])
    assert remaining(every, (), None) == (every, [])


def op_row(op: str, variant: str, tower: str, batch: int, microseconds: float, **more: Any) -> dict[str, Any]:
    flops = 4e9 if "attention" in op else ""
    row = {"op": op, "variant": variant, "tower": tower, "batch": batch, "microseconds": microseconds}
    row |= {"bytes": 2e7, "flops": flops, "copy_gb_per_s": 4000.0, "matmul_tflop_per_s": 700.0, "gb_per_s": 100.0}
    row |= {"tflop_per_s": 1.0 if flops else "", "of_copy": 0.5, "of_floor": 0.5, "device": "a GPU", "torch": "2.11"}
    return {**row, "commit": "abc", **more}


def tower_row(variant: str, milliseconds: float, gmacs: float, batch: int = 256, **more: Any) -> dict[str, Any]:
    tokens = [197, 197 if variant.lower().startswith("dense") else 72]
    row = {"model": "ViT-B-16", "dtype": "bfloat16", "batch": batch, "variant": variant, "tokens": tokens}
    row |= {"gmacs": gmacs, "gmacs_run": gmacs, "milliseconds": milliseconds, "images_per_second": batch / milliseconds}
    row |= {"speedup": 1.0, "efficiency": 1.0, "efficiency_p10": 0.9, "efficiency_p90": 1.1, "of_matmul": 0.5}
    return {**row, "peak_mib": None, "baseline": "dense (host)", "commit": "abc", **more}


def write_results(where: Path, ops: list[dict[str, Any]], **towers: list[dict[str, Any]]) -> Path:
    with (where / "ops.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ops[0])
        writer.writeheader()
        writer.writerows(ops)
    for name, rows in towers.items():
        content = {"environment": {"device": "a GPU", "torch": "2.11"}, "rows": rows}
        (where / f"{name.replace('_', '-')}.json").write_text(json.dumps(content))
    return where


def test_targets_are_met_or_missed_by_the_measured_figures(tmp_path: Path) -> None:
    ops = [
        op_row("attention_cls", "sdpa", "B-16", 256, 100.0),
        op_row("attention_cls", "auto", "B-16", 256, 120.0),
        op_row("attention_cls", "triton", "B-16", 256, 102.0),
        op_row("prune_tokens", "triton", "B-16", 256, 30.0, of_copy=0.9),
        op_row("prune_tokens", "triton", "L-14", 64, 30.0, of_copy=0.7),
        op_row("match_tokens", "triton", "B-16", 1, 10.0),
        op_row("match_tokens", "reference", "B-16", 1, 80.0),
    ]
    # Speed-ups are over each run's fastest dense variant.
    eager = [
        tower_row("dense (host)", 12.0, 18.0, speedup=10 / 12),
        tower_row("Dense()", 10.0, 17.0, speedup=1.0),
        tower_row("Dense(), plain", 9.8, 17.0, speedup=10 / 9.8),
        tower_row("EViT", 8.0, 11.0, speedup=10 / 8),
        tower_row("EViT, plain", 7.0, 11.0, speedup=10 / 7),
        tower_row("EViT, plain, graph", 6.0, 11.0, speedup=10 / 6),
        tower_row("dense (host) again", 1.0, 18.0, speedup=10.0),
    ]
    # A run in a slower hour: everything takes twice as long.
    tuned = [
        tower_row("dense (host)", 24.0, 18.0, speedup=0.75),
        tower_row("Dense()", 20.0, 17.0, speedup=0.9),
        tower_row("dense (host), compiled max-autotune", 18.0, 18.0, speedup=1.0),
    ]
    compiled = [tower_row("dense (host)", 12.0, 18.0), tower_row("dense (host), compiled default", 12.5, 18.0)]
    peer = [tower_row("dense (host)", 1.0, 18.0), tower_row("EViT", 0.1, 11.0, speedup=10.0)]
    rows = {"towers_bf16": eager, "towers_bf16_max_autotune_dense": tuned, "towers_bf16_peer": peer}
    results = report.read(write_results(tmp_path, ops, **rows))
    # One compiler mode is enough for a figure, which names the missing mode.
    assert targets.speedups(results.towers) == pytest.approx({"ViT-B-16 EViT b256": (12 / 8) / (24 / 18)})
    assert targets.unmeasured(results.towers, (256,)) == {"ViT-B-16 b256": "default"}
    results = report.read(write_results(tmp_path, ops, **rows, towers_bf16_default_dense=compiled))
    by_name = {target.name: target for target in targets.targets(results.ops, results.towers)}

    def figures(name: str) -> tuple[dict[str, float], list[bool]]:
        target = by_name[name]
        return pytest.approx(target.figures), [target.is_met(value) for value in target.figures.values()]

    assert figures("attention and CLS row: time over SDPA without the row") == ({"B-16 b256": 1.02}, [True])
    assert figures("prune: share of copy bandwidth") == ({"B-16 b256": 0.9, "L-14 b64": 0.7}, [True, False])
    assert figures("match at batch 1: speed-up over the reference in a graph") == ({"B-16 b1": 8.0}, [False])
    assert figures("match at batch 256: speed-up over the reference in a graph") == ({}, [])
    assert figures("Dense() at batch 64 and 256: speed-up over the host") == ({"ViT-B-16 b256": 1.2}, [True])
    assert figures("Dense() at batch 64 and 256: speed-up over the host under max-autotune") == (
        {"ViT-B-16 b256": 0.9},
        [False],
    )
    assert figures("reduced towers at batch 256: speed-up over the same plan in plain PyTorch") == (
        {"ViT-B-16 EViT b256": 7 / 8},
        [False],
    )
    # The fastest dense variant is the compiled host, at 24/18 of the host's speed; EViT runs at 12/8. Plain PyTorch
    # and peers do not count as ours.
    assert figures("η of reduced towers, batch 256") == ({"ViT-B-16 EViT": (12 / 8) / (24 / 18) / (18 / 11)}, [False])
    assert not by_name["η of reduced towers, batch 256"].unmeasured
    expected = figures("reduced towers at batch 1, 32 and 256: speed-up over the best dense")
    assert expected == ({"ViT-B-16 EViT b256": (12 / 8) / (24 / 18)}, [True])


def test_at_batch_1_graphs_are_compared_with_graphs() -> None:
    speeds = {"dense (host)": 1.0, "dense (host), graph": 2.0, "Dense(), graph": 2.5, "EViT": 0.9, "EViT, graph": 3.0}
    rows = [tower_row(name, 1.0, 18.0, 1, speedup=speed, run="a") for name, speed in speeds.items()]
    assert targets.beside_graph(rows) == pytest.approx({"ViT-B-16 EViT": 3.0 / 2.5})
    assert targets.beside_host(rows) == pytest.approx({"ViT-B-16 EViT": 3.0})
    assert targets.beside_graph([{**row, "batch": 32} for row in rows]) == {}


def test_runs_are_compared_by_the_hosts_graph_if_all_have_it() -> None:
    """In the second run Python takes twice as long to launch; the device takes the same time."""
    first = {"dense (host)": 1.0, "dense (host), graph": 2.0, "EViT, graph": 3.0}
    second = {"dense (host)": 0.5, "dense (host), graph": 2.0, "dense (host), compiled default": 2.2}
    second["dense (host), compiled max-autotune"] = 2.5
    rows = [tower_row(name, 1.0, 18.0, 1, speedup=speed, run="a") for name, speed in first.items()]
    rows += [tower_row(name, 1.0, 18.0, 1, speedup=speed, run="b") for name, speed in second.items()]
    assert targets.speedups(rows) == pytest.approx({"ViT-B-16 EViT b1": 3.0 / 2.5})
    rows = [row for row in rows if row["variant"] != "dense (host), graph"]
    assert targets.speedups(rows) == pytest.approx({"ViT-B-16 EViT b1": 3.0 / (2.5 / 0.5)})


def test_the_report_has_tables_pictures_and_a_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    ops = [op_row("attention_cls", "sdpa", "B-16", 256, 100.0), op_row("attention_cls", "triton", "B-16", 256, 110.0)]
    ops += [op_row("merge_tokens", "triton", "B-16", 256, 30.0, of_copy=0.8)]
    towers = [tower_row("dense (host)", 10.0, 17.0, batch) for batch in (1, 256)]
    towers += [tower_row("EViT(keep=0.7), graph", 8.0, 11.0, batch, speedup=1.25) for batch in (1, 256)]
    for mode in targets.MODES:
        towers += [tower_row(f"dense (host), compiled {mode}", 11.0, 17.0, batch, speedup=0.9) for batch in (1, 256)]
    out = tmp_path / "results"
    out.mkdir()
    write_results(out, ops, towers_bf16=towers)
    (out / "reasons.json").write_text(
        json.dumps({"attention and CLS row: time over SDPA without the row": "two launches"})
    )
    (out / "launches.csv").write_text("model,launches\nViT-B-16,99\n")
    document = tmp_path / "results.md"
    document.write_text("before <!-- gpu -->\nold\n<!-- /gpu --> after")
    monkeypatch.setattr(sys, "argv", ["report.py", str(out), "--into", str(document)])
    report.main()
    text, full_report = document.read_text(), (out / "report.md").read_text()
    assert text.startswith("before <!-- gpu -->\nOne a GPU (torch 2.11; commits abc), bf16")
    assert text.endswith("<!-- /gpu --> after")
    missed = "| ≤ 1.03 | 1.10 to 1.10 | B-16 b256 | missed in 1 of 1 | two launches |"
    assert f"| attention and CLS row: time over SDPA without the row {missed}" in text
    assert "| match at batch 1: speed-up over the reference in a graph | ≥ 10 | not measured |  |  |  |" in text
    assert "| ViT-B-16 | EViT(keep=0.7) | 0.125/s, η 0.81 (graph) |  | 32/s, η 0.81 (graph) |" in text
    assert "![roofline](results/roofline.png)" in text and "![roofline](roofline.png)" in full_report
    assert "| EViT(keep=0.7), graph | 8.000 | 32 | ×1.25 | 1.00 [0.90-1.10] | dense (host) | 50% |  |" in full_report
    assert "| merge_tokens | B-16 b256 | triton | 30.0 | 100 |  | 50% |" in full_report
    assert "| model | launches |\n| --- | --- |\n| ViT-B-16 | 99 |" in full_report
    assert all((out / f"{name}.png").stat().st_size > 10_000 for name in ("roofline", "efficiency"))
    document.write_text("no marks")
    with pytest.raises(SystemExit, match="expected <!-- gpu --> and <!-- /gpu -->"):
        report.main()
    assert document.read_text() == "no marks"


def test_the_documentation_has_the_summary_of_the_gpu_results() -> None:
    measured = sorted(ops.parent for ops in (BENCH / "results").glob("*/ops.csv"))
    expected = report.summary(report.read(measured[0]), BENCH.parent / "docs") if measured else report.NOTHING
    document = (BENCH.parent / "docs" / "results.md").read_text(encoding="utf-8")
    assert document.partition(report.BEGIN)[2].partition(report.END)[0] == f"\n{expected}"


def test_the_staircase_finds_bad_counts_and_gains_of_rounding() -> None:
    times = {n: -(-n // 16) * 16e-6 + (n % 16 != 0) * 4e-6 for n in range(8, 198)}
    assert staircase.excess(times, 16) == 0 and staircase.excess(times, 15) == pytest.approx(4 / 16)
    gains = staircase.rounding_gains("B-16", times, [16])
    assert {gain["method"] for gain in gains} == {"EViT(keep=0.7)", "EViT(keep=0.5)", "TCA(rate=0.1)"}
    expected = []
    for multiple in (1, 16):
        seconds = [times[tokens] for tokens in ck.EViT(0.7, multiple=multiple).plan(197, 12).tokens]
        expected.append(1e3 * (sum(seconds[:-1]) / 3 + sum(seconds[1:]) * 2 / 3))
    first = gains[0]
    assert (first["milliseconds"], first["rounded"]) == pytest.approx(expected, abs=1e-3)
    assert first["speedup"] == pytest.approx(expected[0] / expected[1], abs=1e-3)


def test_the_staircase_is_measured_written_and_plotted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setitem(staircase.SHAPES, "B-32", Shape(50, 32, 2, 1, 4))
    out = tmp_path / "staircase.csv"
    options = ["--models", "B-32", "--batch", "1", "2", "--dtype", "float32", "--step", "6", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["staircase.py", *options, "--out", str(out), "--plot", f"{out}.png"])
    staircase.main()
    rows = list(csv.DictReader(out.open()))
    assert [int(row["tokens"]) for row in rows] == [*range(8, 50, 6), 50] * 2
    assert all(float(row["microseconds"]) > 0 and float(row["excess"]) >= 0 for row in rows)
    assert len(json.loads(out.with_suffix(".json").read_text())["rounding"]) == 2 * 3 * 2
    assert Path(f"{out}.png").stat().st_size > 10_000


def test_counters_read_the_two_kernels_furthest_from_their_floor(tmp_path: Path) -> None:
    rows = [
        op_row("prune_tokens", "triton", "B-16", 256, 1.0, of_floor=0.3),
        op_row("prune_tokens", "triton", "L-14", 256, 1.0, of_floor=0.2),
        op_row("merge_tokens", "triton", "B-16", 256, 1.0, of_floor=0.5),
        op_row("match_tokens", "triton", "B-16", 256, 1.0, of_floor=0.4),
        op_row("add_norm", "triton", "B-16", 1, 1.0, of_floor=0.01),
        op_row("add_norm", "reference", "B-16", 256, 1.0, of_floor=0.01),
    ]
    write_results(tmp_path, rows)
    assert counters.furthest(tmp_path / "ops.csv") == [("prune_tokens", "L-14", "256"), ("match_tokens", "B-16", "256")]
    assert counters.furthest(tmp_path / "none.csv") == []


def test_counters_are_parsed_between_the_profilers_messages() -> None:
    printed = [
        "==PROF== Connected to process 1",
        '"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"',
        '"","","us","register/thread"',
        '"0","_gather_kernel","12.5","40"',
        "==PROF== Disconnected",
    ]
    expected = {"kernel": "_gather_kernel", "gpu__time_duration.sum [us]": "12.5"}
    assert counters.parse_launches(printed) == [{**expected, "launch__registers_per_thread [register/thread]": "40"}]
    assert counters.parse_launches(["==ERROR== no permission"]) == []


def test_the_search_follows_the_fastest_and_reports_the_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time falls with the number of warps, by too little above 8, and depends on nothing else."""
    merge = importlib.import_module("clipkernels.kernels.merge")
    before = merge.merge_config
    monkeypatch.setitem(tune.SHAPES, "tiny", Shape(21, 32, 2, 1, 4))

    def seconds_of(op: str, sources: list[Any]) -> list[float] | None:
        config = merge.merge_config(4, 32)
        return None if config["BLOCK_R"] > 8 else [1e-6 * max(8 / config["num_warps"], 0.99)] * len(sources)

    def measure(pair: dict[str, Any], *_: Any, **__: Any) -> Times:
        return Times({"own": [2e-6] * 3, "best": [1e-6] * 3})

    monkeypatch.setattr(tune, "seconds_of", seconds_of)
    monkeypatch.setattr(tune, "measure", measure)
    row = tune.search_row("merge_tokens", "tiny", 60, lambda *_: None)
    assert json.loads(row["changed"]) == {"merge.merge_config.num_warps": [4, 8]}
    assert (row["gain"], row["microseconds_b2_own"], row["microseconds_b2_best"]) == (2.0, 2.0, 1.0)
    # Two rounds of sources, rows and warps, one step down and one up; the numbers that cover rows and pairs stay.
    assert row["tried"] == 2 * 6 and row["rejected"] == 2
    assert merge.merge_config is before


def test_block_sizes_that_cover_rows_never_change() -> None:
    covering = ("ranking", "blocks", "BLOCK_P")
    warps = ("ranking", "blocks", "num_warps")
    assert list(tune.neighbours({covering: 64, warps: 4})) == [(warps, 2), (warps, 8)]
    for op, functions in tune.CHOSEN.items():
        defaults: dict[Any, int] = {}
        source = tune.InputFactory(Shape(21, 32, 2, 1, 4), 2, torch.bfloat16, torch.device("cpu"))
        with tune.configured(op, {}, defaults):
            assert tune.seconds_of(op, [source]) is not None, op
        assert {place[:2] for place in defaults} == set(functions)
    assert all(
        place[:2] in {function for functions in tune.CHOSEN.values() for function in functions} for place in tune.COVERS
    )


def test_a_configuration_with_wrong_results_is_rejected() -> None:
    source = tune.InputFactory(Shape(21, 32, 2, 1, 9), 2, torch.bfloat16, torch.device("cpu"))
    defaults: dict[Any, int] = {}
    with tune.configured("merge_tokens", {}, defaults):
        assert tune.seconds_of("merge_tokens", [source]) is not None
    names = {place[-1]: value for place, value in defaults.items()}
    assert names == {"BLOCK_S": 16, "BLOCK_G": 8, "BLOCK_R": 8, "BLOCK_C": 32, "num_warps": 4}
    with tune.configured("merge_tokens", {("merge", "merge_config", "BLOCK_C"): 16}, {}):  # covers half of each row
        assert tune.seconds_of("merge_tokens", [source]) is None
