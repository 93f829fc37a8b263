"""The GPU campaign: what it runs, how it goes on, the report of what came, and the searches beside it."""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import clipkernels as ck
import counters
import gpu
import report
import staircase
import targets
import tune
from clipkernels.cases import Shape
from clipkernels.timing import Times
from rows import ahead, begin

BENCH = Path(__file__).parent.parent / "bench"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it would run")
def test_without_a_gpu_the_campaign_says_so_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, BENCH / "gpu.py", "--out", tmp_path / "results"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: expected a CUDA or ROCm device, got none")
    assert not list(tmp_path.iterdir())


def test_the_campaign_names_scripts_that_exist_and_options_that_they_have(tmp_path: Path) -> None:
    commands = gpu.commands(tmp_path, "tome=.")
    named = [word for command in commands.values() for word in command if word.endswith(".py")]
    assert named and all((BENCH.parent / word).is_file() for word in named)
    assert {gpu.part_of(name) for name in commands} == set(gpu.PARTS)
    # Every part can begin in a call, and what can be cut short can do something before that.
    assert all((part.piece or part.limit) <= 450 for part in gpu.PARTS.values())
    for name, command in commands.items():
        script = BENCH.parent / next((word for word in command if word.startswith("bench/")), "")
        if script.suffix == ".py" and not name.endswith("ops"):
            source = script.read_text(encoding="utf-8")
            options = [word for word in command if word.startswith("--")]
            assert all(f'"{option}"' in source for option in options), (name, options)
            assert ("--deadline" in source) == (gpu.PARTS[gpu.part_of(name)].piece is not None)


def test_the_campaign_collects_what_it_means_to(tmp_path: Path) -> None:
    command = gpu.commands(tmp_path)["ops"]
    collect = [*command[: command.index("-k") + 2], "--collect-only"]
    done = subprocess.run(collect, cwd=BENCH.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "bfloat16" in done.stdout and "float32" not in done.stdout, done.stdout


def test_the_campaign_keeps_what_a_slow_part_wrote_and_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"tests": gpu.Part(8), "towers": gpu.Part(8, 3), "check": gpu.Part(30), "ops": gpu.Part(piece=10)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    slow = [sys.executable, "-u", "-c", "import time; print('half'); time.sleep(60)"]
    wrong = [sys.executable, "-c", "print('one failed'); raise SystemExit(1)"]
    right = [sys.executable, "-c", "print('all passed')"]
    some = [sys.executable, "-c", "import sys; print(*sys.argv[1:]); raise SystemExit(75)"]
    done: dict[str, gpu.Done] = {}
    stage = {"tests": slow, "towers": slow, "check-a": wrong, "check-b": right, "ops": some}
    assert gpu.run(stage, tmp_path, 25, done) == ["tests", "check-a"]
    said = capsys.readouterr().out.splitlines()
    assert "stopped at its time limit" in said[0] and said[0].endswith("half")
    assert "stopped at its time limit" in said[1]  # it goes on after what it wrote
    assert "exit status 1" in said[2] and said[2].endswith("one failed")
    assert "ok" in said[3] and (tmp_path / "check-b.log").read_text() == "all passed\n"
    # It begins nothing that would not end before the campaign does.
    assert "more is left" in said[4] and said[4].endswith("--deadline 15")
    assert gpu.read(tmp_path) == done and [name for name in done if done[name].whole] == ["check-b"]
    assert [name for name in done if done[name].failed] == ["tests", "check-a"]


def test_nothing_that_a_call_began_runs_on_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PARTS", {"tests": gpu.Part(30)})
    begun: list[Any] = []
    popen = subprocess.Popen

    def interrupted(command: list[str], **options: Any) -> Any:
        if begun:
            raise KeyboardInterrupt
        begun.append(popen(command, **options))
        return begun[-1]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(KeyboardInterrupt):
        gpu.run({"tests": sleeping, "tests-more": sleeping}, tmp_path, 25, {})
    assert begun[0].poll() == -9


def test_a_call_goes_on_with_what_the_last_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command notes that it ran. Ops does not fit in the first call; it is whole the second time that it runs,
    and its table is gone when it begins anew."""
    out = tmp_path / "results"
    count = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.open('a').write('x'); "
    tests = [sys.executable, "-c", count, str(tmp_path / "tests")]
    ops = [sys.executable, "-c", count + "raise SystemExit(75 * (p.stat().st_size < 2))", str(out / "rows.csv")]
    monkeypatch.setattr(gpu, "PARTS", {"tests": gpu.Part(30), "ops": gpu.Part(piece=60)})
    monkeypatch.setattr(gpu, "commands", lambda out, peer: {"tests": tests, "ops": [*ops, "--rows", ops[-1]]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "stamp", lambda: {"driver": "1", "commit": "abc", "date": "2026-11-22"})
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    calls = [(["--limit", "50"], 0, True), ([], 2, False), ([], 2, False), (["--again", "ops"], 2, False)]
    for options, ran, left in calls:
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out), *options])
        gpu.main()
        assert (tmp_path / "tests").stat().st_size == 1
        assert ((out / "rows.csv").stat().st_size if ran else (out / "rows.csv").exists()) == ran
        assert ("left: ops" in capsys.readouterr().out) == left
    assert (out / "report.md").read_text().endswith(f"{report.NOTHING}")


def test_what_failed_comes_last_and_timings_run_alone() -> None:
    names = ["towers", "tests", "check-a", "check-b", "ops", "compiled-ops", "counters"]
    last = gpu.Done(False, False, 9, "", None, None, "")
    whole, failed = last._replace(whole=True), last._replace(failed=True)
    assert gpu.following(names, {}, 400) == ["tests", "check-a", "check-b"]
    done = {"tests": failed, "check-a": whole, "check-b": whole, "towers": last}
    assert gpu.following(names, done, 400) == ["towers"]
    done["towers"] = whole
    assert gpu.following(names, done, 400) == gpu.following(names, done, 65) == ["ops"]
    assert gpu.following(names, done, 50) == []  # counters look at what ops has measured
    assert gpu.following(names, {**done, "ops": failed}, 400) == ["counters"]
    done |= {"ops": whole, "counters": whole}
    assert gpu.following(names, done, 400) == ["compiled-ops"]
    done["compiled-ops"] = whole
    assert gpu.following(names, done, 400) == ["tests"]
    assert gpu.following(names, {**done, "tests": whole}, 400) == []


def test_what_ended_every_run_that_began_it_is_given_up(tmp_path: Path) -> None:
    out, every = tmp_path / "rows.csv", [("a", 1), ("b", 1), ("c", 1)]
    begin(out, str(("a", 1)))
    assert ahead(every, {("b", 1)}, out) == ([("c", 1), ("a", 1)], [])
    begin(out, str(("a", 1)))
    assert ahead(every, {("b", 1)}, out) == ([("c", 1)], ["('a', 1)"])
    assert ahead(every, {("a", 1)}, out) == ([("b", 1), ("c", 1)], [])
    assert ahead(every, (), None) == (every, [])


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


def folder(where: Path, ops: list[dict[str, Any]], **towers: list[dict[str, Any]]) -> Path:
    with (where / "ops.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ops[0])
        writer.writeheader()
        writer.writerows(ops)
    for name, rows in towers.items():
        taken = {"environment": {"device": "a GPU", "torch": "2.11"}, "rows": rows}
        (where / f"{name.replace('_', '-')}.json").write_text(json.dumps(taken))
    return where


def test_a_target_is_met_or_missed_by_what_was_measured(tmp_path: Path) -> None:
    ops = [
        op_row("attention_cls", "sdpa", "B-16", 256, 100.0),
        op_row("attention_cls", "auto", "B-16", 256, 120.0),
        op_row("attention_cls", "triton", "B-16", 256, 102.0),
        op_row("prune_tokens", "triton", "B-16", 256, 30.0, of_copy=0.9),
        op_row("prune_tokens", "triton", "L-14", 64, 30.0, of_copy=0.7),
        op_row("match_tokens", "triton", "B-16", 1, 10.0),
        op_row("match_tokens", "reference", "B-16", 1, 80.0),
    ]
    # Speed-ups are against each run's fastest dense variant.
    eager = [
        tower_row("dense (host)", 12.0, 18.0, speedup=10 / 12),
        tower_row("Dense()", 10.0, 17.0, speedup=1.0),
        tower_row("Dense(), plain", 9.8, 17.0, speedup=10 / 9.8),
        tower_row("EViT", 8.0, 11.0, speedup=10 / 8),
        tower_row("EViT, plain", 7.0, 11.0, speedup=10 / 7),
        tower_row("EViT, plain, graph", 6.0, 11.0, speedup=10 / 6),
        tower_row("dense (host) again", 1.0, 18.0, speedup=10.0),
    ]
    # A slower hour: all of it takes twice as long.
    tuned = [
        tower_row("dense (host)", 24.0, 18.0, speedup=0.75),
        tower_row("Dense()", 20.0, 17.0, speedup=0.9),
        tower_row("dense (host), compiled max-autotune", 18.0, 18.0, speedup=1.0),
    ]
    compiled = [tower_row("dense (host)", 12.0, 18.0), tower_row("dense (host), compiled default", 12.5, 18.0)]
    peer = [tower_row("dense (host)", 1.0, 18.0), tower_row("EViT", 0.1, 11.0, speedup=10.0)]
    rows = {"towers_bf16": eager, "towers_bf16_max_autotune_dense": tuned, "towers_bf16_peer": peer}
    found = report.read(folder(tmp_path, ops, **rows))
    # Without the host in every mode of the compiler nobody knows the best dense one.
    assert targets.efficiencies(found.towers, 256) == targets.speedups(found.towers) == {}
    found = report.read(folder(tmp_path, ops, **rows, towers_bf16_default_dense=compiled))
    came = {target.what: target for target in targets.targets(found.ops, found.towers)}

    def figures(what: str) -> tuple[dict[str, float], list[bool]]:
        target = came[what]
        return pytest.approx(target.came), [target.met(value) for value in target.came.values()]

    assert figures("attention and the CLS row, beside SDPA without it") == ({"B-16 b256": 1.02}, [True])
    assert figures("prune: share of copy bandwidth") == ({"B-16 b256": 0.9, "L-14 b64": 0.7}, [True, False])
    assert figures("match at batch 1, beside the reference in a graph") == ({"B-16 b1": 8.0}, [False])
    assert figures("match at batch 256, beside the reference in a graph") == ({}, [])
    assert figures("Dense() beside the host, batch 64 and 256") == ({"ViT-B-16 b256": 1.2}, [True])
    assert figures("Dense() beside the host under max-autotune") == ({"ViT-B-16 b256": 0.9}, [False])
    assert figures("beside the same in plain PyTorch, batch 256") == ({"ViT-B-16 EViT b256": 7 / 8}, [False])
    # The fastest dense one is the compiled host, 24/18 of the host; EViT is 12/8 of it. Plain and peers are not ours.
    assert figures("η of reduced towers, batch 256") == ({"ViT-B-16 EViT": (12 / 8) / (24 / 18) / (18 / 11)}, [False])
    beside = figures("reduced towers beside the best dense, batch 1, 32 and 256")
    assert beside == ({"ViT-B-16 EViT b256": (12 / 8) / (24 / 18)}, [True])


def test_where_every_run_has_the_hosts_graph_that_is_what_runs_are_compared_by() -> None:
    """In the second run Python took twice as long to launch; the device took what it took."""
    first = {"dense (host)": 1.0, "dense (host), graph": 2.0, "EViT, graph": 3.0}
    second = {"dense (host)": 0.5, "dense (host), graph": 2.0, "dense (host), compiled default": 2.2}
    second["dense (host), compiled max-autotune"] = 2.5
    rows = [tower_row(name, 1.0, 18.0, 1, speedup=speed, run="a") for name, speed in first.items()]
    rows += [tower_row(name, 1.0, 18.0, 1, speedup=speed, run="b") for name, speed in second.items()]
    assert targets.speedups(rows) == pytest.approx({"ViT-B-16 EViT b1": 3.0 / 2.5})
    rows = [row for row in rows if row["variant"] != "dense (host), graph"]
    assert targets.speedups(rows) == pytest.approx({"ViT-B-16 EViT b1": 3.0 / (2.5 / 0.5)})


def test_the_report_has_tables_and_pictures_and_its_summary_goes_into_a_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    ops = [op_row("attention_cls", "sdpa", "B-16", 256, 100.0), op_row("attention_cls", "triton", "B-16", 256, 110.0)]
    ops += [op_row("merge_tokens", "triton", "B-16", 256, 30.0, of_copy=0.8)]
    towers = [tower_row("dense (host)", 10.0, 17.0, batch) for batch in (1, 256)]
    towers += [tower_row("EViT(keep=0.7), graph", 8.0, 11.0, batch, speedup=1.25) for batch in (1, 256)]
    for mode in targets.MODES:
        towers += [tower_row(f"dense (host), compiled {mode}", 11.0, 17.0, batch, speedup=0.9) for batch in (1, 256)]
    out = tmp_path / "results"
    out.mkdir()
    folder(out, ops, towers_bf16=towers)
    (out / "reasons.json").write_text(json.dumps({"attention and the CLS row, beside SDPA without it": "two launches"}))
    (out / "launches.csv").write_text("model,launches\nViT-B-16,99\n")
    readme = tmp_path / "README.md"
    readme.write_text("before <!-- gpu -->\nold\n<!-- /gpu --> after")
    monkeypatch.setattr(sys, "argv", ["report.py", str(out), "--readme", str(readme)])
    report.main()
    said, whole = readme.read_text(), (out / "report.md").read_text()
    assert said.startswith("before <!-- gpu -->\nOne a GPU (torch 2.11; commits abc), bf16")
    assert said.endswith("<!-- /gpu --> after")
    missed = "| ≤ 1.03 | 1.10 to 1.10 | B-16 b256 | missed in 1 of 1 | two launches |"
    assert f"| attention and the CLS row, beside SDPA without it {missed}" in said
    assert "| match at batch 1, beside the reference in a graph | ≥ 10 | not measured |  |  |  |" in said
    assert "| ViT-B-16 | EViT(keep=0.7) | 0.125/s, η 0.81 (graph) |  | 32/s, η 0.81 (graph) |" in said
    assert "![roofline](results/roofline.png)" in said and "![roofline](roofline.png)" in whole
    assert "| EViT(keep=0.7), graph | 8.000 | 32 | ×1.25 | 1.00 [0.90-1.10] | dense (host) | 50% |  |" in whole
    assert "| merge_tokens | B-16 b256 | triton | 30.0 | 100 |  | 50% |" in whole
    assert "| model | launches |\n| --- | --- |\n| ViT-B-16 | 99 |" in whole
    assert all((out / f"{name}.png").stat().st_size > 10_000 for name in ("roofline", "efficiency"))
    readme.write_text("no marks")
    with pytest.raises(SystemExit, match="expected <!-- gpu --> and <!-- /gpu -->"):
        report.main()
    assert readme.read_text() == "no marks"


def test_the_readme_says_of_gpus_what_the_results_say() -> None:
    measured = sorted(ops.parent for ops in (BENCH / "results").glob("*/ops.csv"))
    expected = report.summary(report.read(measured[0]), BENCH.parent) if measured else report.NOTHING
    said = (BENCH.parent / "README.md").read_text(encoding="utf-8")
    assert said.partition(report.BEGIN)[2].partition(report.END)[0] == f"\n{expected}"


def test_the_staircase_finds_counts_that_tile_badly_and_what_rounding_gains() -> None:
    times = {n: -(-n // 16) * 16e-6 + (n % 16 != 0) * 4e-6 for n in range(8, 198)}
    assert staircase.excess(times, 16) == 0 and staircase.excess(times, 15) == pytest.approx(4 / 16)
    gains = staircase.rounded("B-16", times, [16])
    assert {gain["method"] for gain in gains} == {"EViT(keep=0.7)", "EViT(keep=0.5)", "TCA(rate=0.1)"}
    expected = []
    for multiple in (1, 16):
        took = [times[tokens] for tokens in ck.EViT(0.7, multiple=multiple).plan(197, 12).tokens]
        expected.append(1e3 * (sum(took[:-1]) / 3 + sum(took[1:]) * 2 / 3))
    first = gains[0]
    assert (first["milliseconds"], first["rounded"]) == pytest.approx(expected, abs=1e-3)
    assert first["speedup"] == pytest.approx(expected[0] / expected[1], abs=1e-3)


def test_the_staircase_is_measured_written_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_kernels_furthest_from_their_floor_are_two_operations_at_the_largest_batch(tmp_path: Path) -> None:
    rows = [
        op_row("prune_tokens", "triton", "B-16", 256, 1.0, of_floor=0.3),
        op_row("prune_tokens", "triton", "L-14", 256, 1.0, of_floor=0.2),
        op_row("merge_tokens", "triton", "B-16", 256, 1.0, of_floor=0.5),
        op_row("match_tokens", "triton", "B-16", 256, 1.0, of_floor=0.4),
        op_row("add_norm", "triton", "B-16", 1, 1.0, of_floor=0.01),
        op_row("add_norm", "reference", "B-16", 256, 1.0, of_floor=0.01),
    ]
    folder(tmp_path, rows)
    assert counters.furthest(tmp_path / "ops.csv") == [("prune_tokens", "L-14", "256"), ("match_tokens", "B-16", "256")]
    assert counters.furthest(tmp_path / "none.csv") == []


def test_the_counters_are_read_between_the_profilers_own_lines() -> None:
    printed = [
        "==PROF== Connected to process 1",
        '"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"',
        '"","","us","register/thread"',
        '"0","_gather_kernel","12.5","40"',
        "==PROF== Disconnected",
    ]
    expected = {"kernel": "_gather_kernel", "gpu__time_duration.sum [us]": "12.5"}
    assert counters.parsed(printed) == [{**expected, "launch__registers_per_thread [register/thread]": "40"}]
    assert counters.parsed(["==ERROR== no permission"]) == []


def test_the_search_follows_what_is_faster_and_says_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time falls with the warps, by nothing worth while above 8, and does not depend on anything else."""
    merge = importlib.import_module("clipkernels.kernels.merge")
    before = merge.merge_config
    monkeypatch.setitem(tune.SHAPES, "tiny", Shape(21, 32, 2, 1, 4))

    def took(op: str, sources: list[Any]) -> list[float] | None:
        made = merge.merge_config(4, 32)
        return None if made["BLOCK_R"] > 8 else [1e-6 * max(8 / made["num_warps"], 0.99)] * len(sources)

    def measure(pair: dict[str, Any], *_: Any, **__: Any) -> Times:
        return Times({"own": [2e-6] * 3, "best": [1e-6] * 3})

    monkeypatch.setattr(tune, "took", took)
    monkeypatch.setattr(tune, "measure", measure)
    row = tune.searched("merge_tokens", "tiny")
    assert json.loads(row["changed"]) == {"merge.merge_config.num_warps": [4, 8]}
    assert (row["gain"], row["microseconds_b2_own"], row["microseconds_b2_best"]) == (2.0, 2.0, 1.0)
    # Rows and warps, one step down and one up, twice; the numbers that cover rows and pairs stay.
    assert row["tried"] == 2 * 4 and row["rejected"] == 2
    assert merge.merge_config is before


def test_what_covers_rows_is_never_made_smaller() -> None:
    counting = ("counting", "blocks", "BLOCK_P")
    warps = ("counting", "blocks", "num_warps")
    assert list(tune.neighbours({counting: 64, warps: 4})) == [(warps, 2), (warps, 8)]
    for op, functions in tune.CHOSEN.items():
        own: dict[Any, int] = {}
        source = tune.Source(Shape(21, 32, 2, 1, 4), 2, torch.bfloat16, torch.device("cpu"))
        with tune.configured(op, {}, own):
            assert tune.took(op, [source]) is not None, op
        assert {place[:2] for place in own} == set(functions)
    assert all(place[:2] in {each for some in tune.CHOSEN.values() for each in some} for place in tune.COVERS)


def test_a_configuration_that_computes_something_else_is_none() -> None:
    source = tune.Source(Shape(21, 32, 2, 1, 9), 2, torch.bfloat16, torch.device("cpu"))
    own: dict[Any, int] = {}
    with tune.configured("merge_tokens", {}, own):
        assert tune.took("merge_tokens", [source]) is not None
    names = {place[-1]: value for place, value in own.items()}
    assert names == {"BLOCK_S": 16, "BLOCK_R": 8, "BLOCK_C": 32, "num_warps": 4}
    with tune.configured("merge_tokens", {("merge", "merge_config", "BLOCK_C"): 16}, {}):  # half of each row
        assert tune.took("merge_tokens", [source]) is None
