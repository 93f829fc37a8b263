"""The benchmarks run, refuse to time what is wrong, and write what they say they write."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipkernels as ck
import corruptions
from clipkernels.cases import Shape
from clipkernels.cli.demo import QUICK, draw, save
from clipkernels.data import scenes

BENCH = Path(__file__).parent.parent / "bench"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def unshared(environment: dict[str, str]) -> dict[str, str]:
    """An environment in which pytest does not take itself for a worker of pytest-xdist, which times nothing."""
    return {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}


ops, towers, gpu, adaptation = load("ops"), load("towers"), load("gpu"), load("adaptation")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model in place of a full-size one."""
    monkeypatch.setattr(towers, "build", lambda name, dtype: ck.bundled()[0].to(dtype))


def source() -> Any:
    shape = Shape(tokens=21, width=128, heads=2, prefix=1, r=4)
    return ops.Source(shape, batch=2, dtype=torch.float32, device=torch.device("cpu"))


def towers_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["towers.py", *map(str, arguments)])
    try:
        towers.main()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("op", ops.CASES)
def test_every_operation_is_right_by_its_own_check(op: str) -> None:
    case, some = ops.CASES[op], source()
    inputs = case.inputs(some)
    ops.check(op, "reference", some, inputs, ops.flat(case.call(some, "reference", *inputs)))


@pytest.mark.parametrize("op", ["attention", "prune_tokens", "merge_tokens", "rank_tokens"])
def test_a_wrong_result_is_never_timed(op: str) -> None:
    case, some = ops.CASES[op], source()
    inputs = case.inputs(some)
    came = ops.flat(case.call(some, "reference", *inputs))
    came[0] = came[0] * 1.001
    with pytest.raises(AssertionError):
        ops.check(op, "reference", some, inputs, came)


def test_a_wrong_choice_is_never_timed() -> None:
    case, some = ops.CASES["match_tokens"], source()
    inputs = case.inputs(some)
    came = ops.flat(case.call(some, "reference", *inputs))
    came[2] = came[2].roll(1, 1)
    with pytest.raises(AssertionError):
        ops.check("match_tokens", "reference", some, inputs, came)


@pytest.mark.parametrize("op", ["attention_cls_sized", "attention_received"])
def test_sdpa_is_judged_by_its_output_alone(op: str) -> None:
    some = source()
    inputs = ops.CASES[op].inputs(some)
    came = ops.flat(ops.build(op, "sdpa", some)(*inputs))
    ops.check(op, "sdpa", some, inputs, came)
    with pytest.raises(AssertionError):
        ops.check(op, "sdpa", some, inputs, [came[0] * 1.001])


@pytest.mark.parametrize("op", ["prune_tokens", "prune_tokens_heads_fuse_norm"])
def test_pruning_with_topk_keeps_the_same_patches_in_another_order(op: str) -> None:
    some = source()
    inputs = ops.CASES[op].inputs(some)
    tokens, index, *normed = ops.build(op, "topk", some)(*inputs)
    right = ops.CASES[op].call(some, "reference", *inputs)
    order = index.argsort(1)
    assert torch.equal(index.gather(1, order), right.index)
    kept = tokens[:, 1 : 1 + some.keep].gather(1, order[..., None].expand(-1, -1, 128))
    assert torch.equal(kept, right.tokens[:, 1 : 1 + some.keep])
    if normed:
        torch.testing.assert_close(tokens[:, -1], right.tokens[:, -1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(normed[0][:, -1], right.normed[:, -1], atol=1e-5, rtol=1e-4)


def test_pruning_counts_only_the_rows_that_it_keeps() -> None:
    case, some = ops.CASES["prune_tokens"], source()
    inputs = case.inputs(some)
    came = ops.flat(case.call(some, "reference", *inputs))
    moved = sum(tensor.nbytes for tensor in (*inputs, *came)) - case.unread(some)
    rows, scores, index = 2 * 15 * 128 * 4, 2 * 20 * 4, 2 * 14 * 8
    assert moved == 2 * rows + scores + index


def test_benchmarks_run_under_pytest_benchmark(tmp_path: Path) -> None:
    chosen = "prune_tokens-reference-B-32-b1-float32"
    options = ["-q", "-k", chosen, "--benchmark-json", tmp_path / "ops.json", "--benchmark-max-time=0.01"]
    command = [sys.executable, "-m", "pytest", BENCH / "ops.py", *options, "--benchmark-min-rounds=2"]
    environment = unshared({**os.environ, "OMP_NUM_THREADS": "1"})
    done = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads((tmp_path / "ops.json").read_text())["benchmarks"]
    info = result["extra_info"]
    assert (info["op"], info["tokens"], info["batch"], info["torch"]) == ("prune_tokens", 50, 1, torch.__version__)
    assert info["gb_per_s"] == pytest.approx(info["bytes"] / result["stats"]["median"] / 1e9)


class Benchmark:
    """What a bench needs of pytest-benchmark's fixture; every timed round takes two seconds."""

    def __init__(self) -> None:
        self.group, self.extra_info = "", {}
        self.stats: Any = None

    def pedantic(self, run: Callable[[], object], setup: Callable[[], object], rounds: int, warmup_rounds: int) -> None:
        for _ in range(warmup_rounds + rounds):
            setup()
            run()
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[2.0] * rounds, median=2.0))


def test_a_tower_benchmark_pairs_every_round_with_dense(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(towers.time, "perf_counter", lambda: next(clock))
    benchmark = Benchmark()
    towers.test_tower(benchmark, "ViT-B-32", 2, "float32", "EViT(keep=0.5)")
    info = benchmark.extra_info
    assert (info["variant"], info["batch"], info["images_per_second"]) == ("EViT(keep=0.5)", 2, 1.0)
    assert (info["speedup"], info["baseline"]) == (1.5, "dense (host)")


def test_the_paired_run_writes_rows_and_environment(
    monkeypatch: pytest.MonkeyPatch, small: None, tmp_path: Path
) -> None:
    file = tmp_path / "cpu" / "towers.csv"
    towers_main(monkeypatch, "--models", "ViT-B-32", "--batch", 1, 2, "--rounds", 1, "--threads", 1, "--out", file)
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    variants = ["dense (host)", "Dense()", "EViT(keep=0.7)", "EViT(keep=0.5)", "ToMe(r=4)"]
    variants += ["TCA(rate=0.1)", "dense (host) again"]
    assert [(row["batch"], row["variant"]) for row in rows] == [(batch, name) for batch in "12" for name in variants]
    report = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    assert report["environment"]["threads"] == 1
    assert [row["variant"] for row in report["rows"]] == 2 * variants
    for row in report["rows"]:
        dense = next(other for other in report["rows"] if other["variant"] == row["baseline"])
        assert row["efficiency"] == pytest.approx(row["speedup"] * row["gmacs_run"] / dense["gmacs_run"], rel=0.02)


def test_some_variants_can_be_chosen_and_each_of_them_compiled(
    monkeypatch: pytest.MonkeyPatch, small: None, tmp_path: Path
) -> None:
    asked = []
    monkeypatch.setattr(torch, "compile", lambda encode, mode: asked.append(mode) or encode)
    options = ["--only", "Dense", "EViT(keep=0.7)", "--compile", "default", "--rounds", 1, "--threads", 1]
    file = tmp_path / "towers.csv"
    towers_main(monkeypatch, "--models", "ViT-B-32", "--batch", 1, *options, "--out", file)
    with file.open(encoding="utf-8", newline="") as stream:
        names = [row["variant"] for row in csv.DictReader(stream)]
    plain = ["dense (host)", "Dense()", "EViT(keep=0.7)"]
    assert names == [*plain, *(f"{name}, compiled default" for name in plain), "dense (host) again"]
    assert asked == ["default"] * 3


def test_a_tower_that_differs_from_the_host_is_never_timed(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    some = torch.randn(2, 3, 32, 32)
    honest = tiny.visual.forward

    def wrong(images: torch.Tensor) -> torch.Tensor:
        return honest(images) * (1.0 if ck.method_of(tiny) is None else 1.01)

    monkeypatch.setattr(tiny.visual, "forward", wrong)
    with pytest.raises(AssertionError, match=r"Dense\(\): relative error"):
        towers.check(tiny, {"Dense()": ck.Dense()}, some)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--models", "ViT-X"],
            "expected open_clip models, or transformers:CLASS (a ViT-B/16), timm:MODEL, clip:ViT-B-16, got ViT-X",
        ),
        (["--clock", "process", "--threads", 2], "expected --threads 1 with --clock process, got 2"),
        (["--models", "ViT-B-16", "--peer", "tome=nowhere"], "expected --peer tome=PATH with PATH/tome/patch/timm.py"),
    ],
)
def test_a_wrong_option_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[object], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        towers_main(monkeypatch, *arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_timms_weights_compute_the_same_in_an_open_clip_tower() -> None:
    timm = pytest.importorskip("timm")
    peer = load("peer_tome")
    torch.manual_seed(0)
    theirs = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(peer.from_timm(theirs).encode_image(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_what_has_not_begun_by_the_deadline_is_skipped() -> None:
    options = ["-q", "-rs", "-k", "prune_tokens-reference-B-32-b1-float32", "--deadline", "0"]
    command = [sys.executable, "-m", "pytest", BENCH / "ops.py", *options]
    done = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "not begun within 0 s" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it would run")
def test_without_a_gpu_the_campaign_says_so_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, BENCH / "gpu.py", "--out", tmp_path / "results"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: expected a CUDA or ROCm device, got none")
    assert not list(tmp_path.iterdir())


def test_the_campaign_names_scripts_that_exist_and_collects_tests(tmp_path: Path) -> None:
    commands = gpu.commands(tmp_path)
    named = [word for command in commands.values() for word in command if word.endswith(".py")]
    assert named and all((BENCH.parent / word).is_file() for word in named)
    assert {name.split("-")[0] for name in commands} == set(gpu.LIMITS)
    assert sum(gpu.LIMITS.values()) - gpu.LIMITS["check"] < 480
    chosen = commands["ops"].index("-k") + 2
    collect = [*commands["ops"][:chosen], "--collect-only"]
    done = subprocess.run(collect, cwd=BENCH.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "bfloat16" in done.stdout and "float32" not in done.stdout, done.stdout


def test_the_campaign_keeps_what_a_slow_part_wrote_and_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "LIMITS", {"tests": 2, "check": 30})
    slow = [sys.executable, "-u", "-c", "import time; print('half'); time.sleep(60)"]
    wrong = [sys.executable, "-c", "print('one failed'); raise SystemExit(1)"]
    right = [sys.executable, "-c", "print('all passed')"]
    failed = gpu.run({"tests": slow, "check-a": wrong, "check-b": right}, tmp_path)
    assert failed == ["tests", "check-a"]
    said = capsys.readouterr().out.splitlines()
    assert "stopped at its time limit" in said[0] and said[0].endswith("half")
    assert "exit status 1" in said[1] and said[1].endswith("one failed")
    assert "ok" in said[2] and (tmp_path / "check-b.log").read_text() == "all passed\n"


def test_rows_are_appended_as_they_are_measured_and_urgent_ones_come_first(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    options = ["-q", "-k", "bias_act_gelu-reference-B-32 and float32", "--deadline", "500", "--rows", rows]
    command = [sys.executable, "-m", "pytest", BENCH / "ops.py", *options, "--benchmark-max-time=0.01"]
    environment = unshared({**os.environ, "OMP_NUM_THREADS": "1"})
    for _ in range(2):
        done = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    with rows.open(newline="") as file:
        came = list(csv.DictReader(file))
    assert [row["batch"] for row in came] == ["1", "8"] * 2
    assert all(float(row["p20"]) <= float(row["microseconds"]) <= float(row["p80"]) for row in came)


def test_the_study_of_streams_runs_goes_on_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(draw(QUICK, seed=0), tmp_path)
    out = tmp_path / "study" / "shift.csv"
    arguments = ["--images", tmp_path / "digits", "--limit", 12, "--shuffles", 2, "--out", out]
    monkeypatch.setattr(sys, "argv", ["adaptation.py", *map(str, arguments)])
    before, runs = torch.get_num_threads(), []
    run = adaptation.run
    monkeypatch.setattr(adaptation, "run", lambda *given: runs.append(given) or run(*given))
    try:
        adaptation.main()
        rows = list(csv.DictReader(out.open()))
        kinds = {(row["stream"], row["severity"]) for row in rows}
        assert len(kinds) == 12 and ("clean", "all") in kinds and ("shifted", "5") in kinds
        adapting = {row["variant"] for row in rows if row["orders"] == "2"}
        assert len({row["variant"] for row in rows}) == 15 and len(adapting) == 6 and len(runs) == 9 + 2 * 6
        assert all("reservoir" in name for name in adapting)
        # Cut short before the last variant, it runs that one alone.
        kept = json.loads(out.with_suffix(".json").read_text())
        last = kept["rows"][-1]["variant"]
        kept["rows"] = [row for row in kept["rows"] if row["variant"] != last]
        out.with_suffix(".json").write_text(json.dumps(kept))
        runs.clear()
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--plot", str(tmp_path / "shift.png")])
        adaptation.main()
        assert len(runs) == 2 and len(list(csv.DictReader(out.open()))) == len(rows)
        assert (tmp_path / "shift.png").stat().st_size > 10_000
        monkeypatch.setattr(sys, "argv", ["adaptation.py", *map(str, [*arguments, "--seed", 1])])
        with pytest.raises(SystemExit, match="was taken with other options or versions"):
            adaptation.main()
    finally:
        torch.set_num_threads(before)


def test_a_corruption_is_the_same_for_a_seed_and_worse_with_severity() -> None:
    photo = Image.fromarray(scenes.draw(1, 0).images[0])
    for kind in corruptions.STRENGTHS:
        apart = []
        for severity in (1, 3, 5):
            made = [
                np.asarray(corruptions.corrupted(photo, kind, severity, np.random.default_rng(0))) for _ in range(2)
            ]
            assert np.array_equal(*made)
            apart.append(np.abs(made[0].astype(float) - np.asarray(photo)).mean())
        assert 0 < apart[0] < apart[2] and apart[1] <= apart[2]
