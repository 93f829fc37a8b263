"""The benchmarks run, refuse to time what is wrong, and write what they say they write."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
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
import ways
from clipkernels import backend
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


ops, towers, adaptation = load("ops"), load("towers"), load("adaptation")


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
    variants += ["TCA(rate=0.035)", "TCA(rate=0.1)", "PatchRanking(keep=0.6)", "dense (host) again"]
    assert [(row["batch"], row["variant"]) for row in rows] == [(batch, name) for batch in "12" for name in variants]
    report = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    assert report["environment"]["threads"] == 1
    assert [row["variant"] for row in report["rows"]] == 2 * variants
    for row in report["rows"]:
        dense = next(other for other in report["rows"] if other["variant"] == row["baseline"])
        assert row["peak_mib"] > 0
        rate = 2 * row["gmacs_run"] * row["batch"] / row["milliseconds"]
        rates = (rate, rate / row["matmul_tflop_per_s"])
        # Written to four places, which may be two per cent of a small share.
        assert (row["tflop_per_s"], row["of_matmul"]) == pytest.approx(rates, rel=0.02, abs=5e-5)
        assert row["efficiency"] == pytest.approx(row["speedup"] * row["gmacs_run"] / dense["gmacs_run"], rel=0.02)


def test_a_paired_run_ends_in_time_and_goes_on_where_its_file_ends(
    monkeypatch: pytest.MonkeyPatch, small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "towers.csv"
    options = ["--models", "ViT-B-32", "--batch", 1, 2, "--rounds", 1, "--threads", 1, "--only", "Dense()"]
    began = iter([0.0, 9.0])
    monkeypatch.setattr(towers, "monotonic", lambda: next(began))
    with pytest.raises(SystemExit) as ended:
        towers_main(monkeypatch, *options, "--deadline", 5, "--out", file)
    assert ended.value.code == towers.MORE and "1 of 2 left" in capsys.readouterr().out
    first = list(csv.DictReader(file.open(encoding="utf-8")))
    monkeypatch.undo()
    monkeypatch.setattr(towers, "build", lambda name, dtype: ck.bundled()[0].to(dtype))
    towers_main(monkeypatch, *options, "--out", file)
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    assert rows[:3] == first and [row["batch"] for row in rows] == ["1"] * 3 + ["2"] * 3
    with pytest.raises(SystemExit, match="was taken with other options"):
        towers_main(monkeypatch, *options[:-1], "EViT", "--out", file)


def test_a_plain_variant_runs_the_same_plan_on_the_reference(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    (variant,) = towers.vary(tiny, {"EViT": ck.EViT(0.5)}).values()
    images, asked, choose = torch.randn(2, 3, 32, 32), [], backend.choose

    def noted(wanted: str, *given: Any, **more: Any) -> str:
        asked.append(backend.asked(wanted))
        return choose(wanted, *given, **more)

    with torch.inference_mode():
        expected = variant.encode(images)
        monkeypatch.setattr(backend, "choose", noted)
        came = ways.plain(variant).encode(images)
    assert set(asked) == {"reference"} and torch.equal(came, expected)
    assert "CLIPKERNELS_BACKEND" not in os.environ


def test_a_batch_that_cannot_be_measured_is_named_and_the_others_are(
    monkeypatch: pytest.MonkeyPatch, small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, paired = tmp_path / "towers.csv", towers.paired

    def full(name: str, dtype: torch.dtype, batch: int, arguments: Any) -> Any:
        if batch == 1:
            raise torch.OutOfMemoryError("no room")
        return paired(name, dtype, batch, arguments)

    monkeypatch.setattr(towers, "paired", full)
    options = ["--models", "ViT-B-32", "--rounds", 1, "--threads", 1, "--only", "Dense()", "--out", file]
    with pytest.raises(SystemExit, match="error: ViT-B-32 float32 b1 could not be measured"):
        towers_main(monkeypatch, *options, "--batch", 1, 2)
    assert "no room" in capsys.readouterr().err
    assert [row["batch"] for row in csv.DictReader(file.open(encoding="utf-8"))] == ["2"] * 3
    # The next run leaves what ended this one to the end.
    monkeypatch.setattr(towers, "paired", paired)
    towers_main(monkeypatch, *options, "--batch", 1, 3)
    assert [row["batch"] for row in csv.DictReader(file.open(encoding="utf-8"))] == ["2"] * 3 + ["3"] * 3 + ["1"] * 3


def test_a_method_that_is_wrong_or_does_not_run_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check, plain = towers.check, towers.plain

    def picky(model: Any, methods: Any, images: torch.Tensor) -> None:
        assert "EViT(keep=0.5)" not in methods, "EViT is wrong"
        check(model, methods, images)

    def refusing(variant: Any) -> Any:
        def encode(images: torch.Tensor) -> Any:
            raise RuntimeError("no kernel")

        return variant._replace(encode=encode) if variant.method == ck.Dense() else plain(variant)

    monkeypatch.setattr(towers, "check", picky)
    monkeypatch.setattr(towers, "plain", refusing)
    options = ["--models", "ViT-B-32", "--batch", 1, "--rounds", 1, "--threads", 1, "--only", "Dense()", "EViT"]
    towers_main(monkeypatch, *options, "--plain", "--out", tmp_path / "towers.csv")
    said = capsys.readouterr().out
    assert re.search(r"left out, EViT\(keep=0.5\):\nTraceback .*AssertionError: EViT is wrong", said, re.S)
    assert re.search(r"left out, Dense\(\), plain:\nTraceback .*RuntimeError: no kernel", said, re.S)
    names = [row["variant"] for row in csv.DictReader((tmp_path / "towers.csv").open(encoding="utf-8"))]
    evit = ["EViT(keep=0.7)", "EViT(keep=0.7), plain"]
    assert names == ["dense (host)", "Dense()", *evit, "dense (host) again"]


def test_some_variants_can_be_chosen_and_each_of_them_compiled(
    monkeypatch: pytest.MonkeyPatch, small: None, tmp_path: Path
) -> None:
    asked = []
    monkeypatch.setattr(torch, "compile", lambda encode, mode, dynamic: asked.append((mode, dynamic)) or encode)
    options = ["--only", "Dense", "EViT(keep=0.7)", "--compile", "default", "--compiled", "dense", "EViT"]
    options += ["--rounds", 1, "--threads", 1]
    file = tmp_path / "towers.csv"
    towers_main(monkeypatch, "--models", "ViT-B-32", "--batch", 1, *options, "--out", file)
    with file.open(encoding="utf-8", newline="") as stream:
        names = [row["variant"] for row in csv.DictReader(stream)]
    plain = ["dense (host)", "Dense()", "EViT(keep=0.7)"]
    compiled = ["dense (host), compiled default", "EViT(keep=0.7), compiled default"]
    assert names == [*plain, *compiled, "dense (host) again"]
    assert asked == [("default", False)] * 2


def test_no_plain_variant_is_compiled_for_a_compiler_would_keep_its_own_choice(
    monkeypatch: pytest.MonkeyPatch, small: None, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "compile", lambda encode, mode, dynamic: encode)
    options = ["--only", "Dense()", "--compile", "default", "--plain", "--rounds", 1, "--threads", 1]
    towers_main(monkeypatch, "--models", "ViT-B-32", "--batch", 1, *options, "--out", tmp_path / "towers.csv")
    with (tmp_path / "towers.csv").open(encoding="utf-8", newline="") as stream:
        names = {row["variant"] for row in csv.DictReader(stream)}
    assert {name for name in names if "Dense()" in name} == {"Dense()", "Dense(), plain", "Dense(), compiled default"}


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
    assert done.returncode == towers.MORE and "not begun within 0 s" in done.stdout


def test_rows_are_appended_as_they_are_measured_and_those_that_are_there_are_not_measured_again(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    options = ["-q", "--deadline", "500", "--rows", rows, "--benchmark-max-time=0.01"]
    environment = unshared({**os.environ, "OMP_NUM_THREADS": "1"})
    for chosen in ("b1 and not b16", "float32", "float32"):
        command = [sys.executable, "-m", "pytest", BENCH / "ops.py", *options]
        command += ["-k", f"bias_act_gelu-reference-B-32 and float32 and {chosen}"]
        done = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    with rows.open(newline="") as file:
        came = list(csv.DictReader(file))
    assert [row["batch"] for row in came] == ["1", "8"]
    assert all(float(row["p20"]) <= float(row["microseconds"]) <= float(row["p80"]) for row in came)
    for row in came:
        floor = float(row["bytes"]) / float(row["copy_gb_per_s"]) / 1e9
        assert float(row["of_floor"]) == pytest.approx(floor / float(row["microseconds"]) * 1e6)


def test_the_study_of_streams_runs_goes_on_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
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
