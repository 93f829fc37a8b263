"""Benchmarks run, refuse to time wrong results, and write correct rows."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipkernels as ck
from bench import ops, runners, towers
from bench.naive import tome_peer
from bench.studies import adaptation, corruptions
from clipkernels import backend, compilation
from clipkernels.cli.parts.demo_images import QUICK, draw, save
from clipkernels.data import scenes
from clipkernels.freezing import Cost
from clipkernels.testing.inputs import Shape
from tests.subprocesses import without_xdist

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the bundled model in place of a full-size one."""
    monkeypatch.setattr(towers, "build", lambda name, dtype: ck.bundled()[0].to(dtype))


def small_source() -> Any:
    shape = Shape(tokens=21, width=128, heads=2, prefix=1, r=4)
    return ops.InputFactory(shape, batch=2, dtype=torch.float32, device=torch.device("cpu"))


def towers_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["towers.py", *map(str, arguments)])
    try:
        towers.main()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("op", ops.CASES)
def test_every_operation_passes_its_own_check(op: str) -> None:
    case, source = ops.CASES[op], small_source()
    inputs = case.inputs(source)
    ops.check(op, "reference", source, inputs, ops.flat(case.call(source, "reference", *inputs)))


@pytest.mark.parametrize("op", ["attention", "prune_tokens", "merge_tokens", "rank_tokens"])
def test_a_wrong_result_is_never_timed(op: str) -> None:
    case, source = ops.CASES[op], small_source()
    inputs = case.inputs(source)
    results = ops.flat(case.call(source, "reference", *inputs))
    results[0] = results[0] * 1.001
    with pytest.raises(AssertionError):
        ops.check(op, "reference", source, inputs, results)


def test_a_wrong_selection_is_never_timed() -> None:
    case, source = ops.CASES["match_tokens"], small_source()
    inputs = case.inputs(source)
    results = ops.flat(case.call(source, "reference", *inputs))
    results[2] = results[2].roll(1, 1)
    with pytest.raises(AssertionError):
        ops.check("match_tokens", "reference", source, inputs, results)


@pytest.mark.parametrize("op", ["attention_cls_sized", "attention_received"])
def test_sdpa_is_checked_by_its_output_only(op: str) -> None:
    source = small_source()
    inputs = ops.CASES[op].inputs(source)
    results = ops.flat(ops.build(op, "sdpa", source)(*inputs))
    ops.check(op, "sdpa", source, inputs, results)
    with pytest.raises(AssertionError):
        ops.check(op, "sdpa", source, inputs, [results[0] * 1.001])


@pytest.mark.parametrize("op", ["prune_tokens", "prune_tokens_heads_fuse_norm"])
def test_topk_pruning_keeps_the_same_patches_in_another_order(op: str) -> None:
    source = small_source()
    inputs = ops.CASES[op].inputs(source)
    tokens, index, *normed = ops.build(op, "topk", source)(*inputs)
    expected = ops.CASES[op].call(source, "reference", *inputs)
    order = index.argsort(1)
    assert torch.equal(index.gather(1, order), expected.index)
    patches = tokens[:, 1 : 1 + source.keep].gather(1, order[..., None].expand(-1, -1, 128))
    assert torch.equal(patches, expected.tokens[:, 1 : 1 + source.keep])
    if normed:
        torch.testing.assert_close(tokens[:, -1], expected.tokens[:, -1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(normed[0][:, -1], expected.normed[:, -1], atol=1e-5, rtol=1e-4)


def test_pruning_counts_only_the_bytes_of_kept_rows() -> None:
    case, source = ops.CASES["prune_tokens"], small_source()
    inputs = case.inputs(source)
    results = ops.flat(case.call(source, "reference", *inputs))
    assert case.unread_bytes is not None
    num_bytes = sum(tensor.nbytes for tensor in (*inputs, *results)) - case.unread_bytes(source)
    rows, scores, index = 2 * 15 * 128 * 4, 2 * 20 * 4, 2 * 14 * 8
    assert num_bytes == 2 * rows + scores + index


def test_benchmarks_run_under_pytest_benchmark(tmp_path: Path) -> None:
    chosen = "prune_tokens-reference-B-32-b1-float32"
    options = ["-q", "-k", chosen, "--benchmark-json", tmp_path / "ops.json", "--benchmark-max-time=0.01"]
    command = [sys.executable, "-m", "pytest", BENCH / "ops.py", *options, "--benchmark-min-rounds=2"]
    environment = without_xdist({**os.environ, "OMP_NUM_THREADS": "1"})
    done = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads((tmp_path / "ops.json").read_text())["benchmarks"]
    info = result["extra_info"]
    assert (info["op"], info["tokens"], info["batch"], info["torch"]) == ("prune_tokens", 50, 1, torch.__version__)
    assert info["gb_per_s"] == pytest.approx(info["bytes"] / result["stats"]["median"] / 1e9)


class Benchmark:
    """A stand-in for pytest-benchmark's fixture, in which every timed round takes two seconds."""

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


def test_a_paired_run_writes_rows_and_environment(monkeypatch: pytest.MonkeyPatch, small: None, tmp_path: Path) -> None:
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


def test_a_paired_run_ends_in_time_and_resumes_from_its_file(
    monkeypatch: pytest.MonkeyPatch, small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "towers.csv"
    options = ["--models", "ViT-B-32", "--batch", 1, 2, "--rounds", 1, "--threads", 1, "--only", "Dense()"]
    times = iter([0.0, 9.0])
    monkeypatch.setattr(towers, "monotonic", lambda: next(times))
    with pytest.raises(SystemExit) as caught:
        towers_main(monkeypatch, *options, "--deadline", 5, "--out", file)
    assert caught.value.code == towers.EXIT_DEADLINE and "1 of 2 left" in capsys.readouterr().out
    first = list(csv.DictReader(file.open(encoding="utf-8")))
    monkeypatch.undo()
    monkeypatch.setattr(towers, "build", lambda name, dtype: ck.bundled()[0].to(dtype))
    towers_main(monkeypatch, *options, "--out", file)
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    assert rows[:3] == first and [row["batch"] for row in rows] == ["1"] * 3 + ["2"] * 3
    with pytest.raises(SystemExit, match="was measured with other options"):
        towers_main(monkeypatch, *options[:-1], "EViT", "--out", file)


def test_a_plain_variant_runs_the_same_plan_on_the_reference(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    (variant,) = towers.vary(tiny, {"EViT": ck.EViT(0.5)}).values()
    images, backends, choose = torch.randn(2, 3, 32, 32), [], backend.choose

    def recording_choose(option: str, *arguments: Any, **options: Any) -> str:
        backends.append(backend.requested_backend(option))
        return choose(option, *arguments, **options)

    with torch.inference_mode():
        expected = variant.encode(images)
        monkeypatch.setattr(backend, "choose", recording_choose)
        actual = runners.plain(variant).encode(images)
    assert set(backends) == {"reference"} and torch.equal(actual, expected)
    assert "CLIPKERNELS_BACKEND" not in os.environ


def test_a_failing_batch_is_reported_and_the_others_measured(
    monkeypatch: pytest.MonkeyPatch, small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, paired = tmp_path / "towers.csv", towers.paired

    def failing(name: str, dtype: torch.dtype, batch: int, arguments: Any) -> Any:
        if batch == 1:
            raise torch.OutOfMemoryError("no room")
        return paired(name, dtype, batch, arguments)

    monkeypatch.setattr(towers, "paired", failing)
    options = ["--models", "ViT-B-32", "--rounds", 1, "--threads", 1, "--only", "Dense()", "--out", file]
    with pytest.raises(SystemExit, match="error: ViT-B-32 float32 b1 could not be measured"):
        towers_main(monkeypatch, *options, "--batch", 1, 2)
    assert "no room" in capsys.readouterr().err
    assert [row["batch"] for row in csv.DictReader(file.open(encoding="utf-8"))] == ["2"] * 3
    # The next run puts the case that ended this one last.
    monkeypatch.setattr(towers, "paired", paired)
    towers_main(monkeypatch, *options, "--batch", 1, 3)
    assert [row["batch"] for row in csv.DictReader(file.open(encoding="utf-8"))] == ["2"] * 3 + ["3"] * 3 + ["1"] * 3


def test_wrong_and_failing_variants_are_left_out_and_reported(
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
    printed = capsys.readouterr().out
    assert re.search(r"left out, EViT\(keep=0.5\):\nTraceback .*AssertionError: EViT is wrong", printed, re.S)
    assert re.search(r"left out, Dense\(\), plain:\nTraceback .*RuntimeError: no kernel", printed, re.S)
    names = [row["variant"] for row in csv.DictReader((tmp_path / "towers.csv").open(encoding="utf-8"))]
    evit = ["EViT(keep=0.7)", "EViT(keep=0.7), plain"]
    assert names == ["dense (host)", "Dense()", *evit, "dense (host) again"]


def test_variants_can_be_selected_and_compiled(monkeypatch: pytest.MonkeyPatch, small: None, tmp_path: Path) -> None:
    compile_options = []
    monkeypatch.setattr(
        torch, "compile", lambda encode, mode, dynamic: compile_options.append((mode, dynamic)) or encode
    )
    options = ["--only", "Dense", "EViT(keep=0.7)", "--compile", "default", "--compiled", "dense", "EViT"]
    options += ["--rounds", 1, "--threads", 1]
    file = tmp_path / "towers.csv"
    towers_main(monkeypatch, "--models", "ViT-B-32", "--batch", 1, *options, "--out", file)
    with file.open(encoding="utf-8", newline="") as stream:
        names = [row["variant"] for row in csv.DictReader(stream)]
    plain = ["dense (host)", "Dense()", "EViT(keep=0.7)"]
    compiled = ["dense (host), compiled default", "EViT(keep=0.7), compiled default"]
    assert names == [*plain, *compiled, "dense (host) again"]
    assert compile_options == [("default", False)] * 2


def test_variants_can_be_frozen(monkeypatch: pytest.MonkeyPatch, small: None, tmp_path: Path) -> None:
    class Forward:
        """A stand-in for a forward that is compiled, which fails on one method."""

        cost = Cost(1.0, None, None)

        def __init__(self, function: Any, **options: Any) -> None:
            self.function = function
            options_seen.append(options)

        def __call__(self, images: torch.Tensor) -> Any:
            if len(options_seen) == 2:
                raise RuntimeError("no compiler")
            return self.function(images)

    options_seen: list[dict[str, Any]] = []
    monkeypatch.setattr(compilation, "CompiledForward", Forward)
    options = ["--only", "Dense", "EViT(keep=0.7)", "--compile", "freeze", "--rounds", 1, "--threads", 1]
    file = tmp_path / "towers.csv"
    towers_main(monkeypatch, "--models", "ViT-B-32", "--batch", 1, *options, "--out", file)
    with file.open(encoding="utf-8", newline="") as stream:
        names = [row["variant"] for row in csv.DictReader(stream)]
    frozen = ["dense (host), frozen", "EViT(keep=0.7), frozen"]
    assert names == ["dense (host)", "Dense()", "EViT(keep=0.7)", *frozen, "dense (host) again"]
    assert options_seen == [{"freeze": True, "mode": "default", "dynamic": False}] * 3


def test_variants_run_in_other_runtimes(monkeypatch: pytest.MonkeyPatch, small: None, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    options = ["--only", "Dense", "--compile", "onnxruntime", "--rounds", 1, "--threads", 1]
    file = tmp_path / "towers.csv"
    towers_main(monkeypatch, "--models", "ViT-B-32", "--batch", 1, *options, "--out", file)
    with file.open(encoding="utf-8", newline="") as stream:
        peaks = {row["variant"]: row["peak_mib"] for row in csv.DictReader(stream)}
    exported = ["dense (host), onnxruntime", "Dense(), onnxruntime"]
    assert list(peaks) == ["dense (host)", "Dense()", *exported, "dense (host) again"]
    assert [name for name, peak in peaks.items() if not peak] == exported


def test_plain_variants_are_never_compiled(monkeypatch: pytest.MonkeyPatch, small: None, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "compile", lambda encode, mode, dynamic: encode)
    options = ["--only", "Dense()", "--compile", "default", "--plain", "--rounds", 1, "--threads", 1]
    towers_main(monkeypatch, "--models", "ViT-B-32", "--batch", 1, *options, "--out", tmp_path / "towers.csv")
    with (tmp_path / "towers.csv").open(encoding="utf-8", newline="") as stream:
        names = {row["variant"] for row in csv.DictReader(stream)}
    assert {name for name in names if "Dense()" in name} == {"Dense()", "Dense(), plain", "Dense(), compiled default"}


def test_a_tower_that_differs_from_the_host_is_never_timed(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    images = torch.randn(2, 3, 32, 32)
    original = tiny.visual.forward

    def wrong(images: torch.Tensor) -> torch.Tensor:
        return original(images) * (1.0 if ck.method_of(tiny) is None else 1.01)

    monkeypatch.setattr(tiny.visual, "forward", wrong)
    with pytest.raises(AssertionError, match=r"Dense\(\): relative error"):
        towers.check(tiny, {"Dense()": ck.Dense()}, images)


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
def test_a_wrong_option_gives_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[object], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        towers_main(monkeypatch, *arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_timms_weights_give_the_same_results_in_open_clip() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(
            tome_peer.from_timm(theirs).encode_image(images), theirs(images), rtol=1e-4, atol=1e-4
        )


def test_cases_not_started_by_the_deadline_are_skipped() -> None:
    options = ["-q", "-rs", "-k", "prune_tokens-reference-B-32-b1-float32", "--deadline", "0"]
    command = [sys.executable, "-m", "pytest", BENCH / "ops.py", *options]
    done = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, check=False)
    assert done.returncode == towers.EXIT_DEADLINE and "not started within 0 s" in done.stdout


def test_rows_are_appended_and_never_measured_again(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    options = ["-q", "--deadline", "500", "--rows", rows, "--benchmark-max-time=0.01"]
    environment = without_xdist({**os.environ, "OMP_NUM_THREADS": "1"})
    for chosen in ("b1 and not b16", "float32", "float32"):
        command = [sys.executable, "-m", "pytest", BENCH / "ops.py", *options]
        command += ["-k", f"bias_act_gelu-reference-B-32 and float32 and {chosen}"]
        done = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    with rows.open(newline="") as file:
        measured = list(csv.DictReader(file))
    assert [row["batch"] for row in measured] == ["1", "8"]
    assert all(float(row["p20"]) <= float(row["microseconds"]) <= float(row["p80"]) for row in measured)
    for row in measured:
        floor = float(row["bytes"]) / float(row["copy_gb_per_s"]) / 1e9
        assert float(row["of_floor"]) == pytest.approx(floor / float(row["microseconds"]) * 1e6)


def test_the_adaptation_study_writes_rows_resumes_and_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    save(draw(QUICK, seed=0), tmp_path)
    out = tmp_path / "study" / "shift.csv"
    arguments = ["--images", tmp_path / "digits", "--limit", 12, "--shuffles", 2, "--out", out]
    monkeypatch.setattr(sys, "argv", ["adaptation.py", *map(str, arguments)])
    before, runs = torch.get_num_threads(), []
    run = adaptation.run
    monkeypatch.setattr(
        adaptation, "run", lambda *arguments_of_run: runs.append(arguments_of_run) or run(*arguments_of_run)
    )
    try:
        adaptation.main()
        rows = list(csv.DictReader(out.open()))
        kinds = {(row["stream"], row["severity"]) for row in rows}
        assert len(kinds) == 12 and ("clean", "all") in kinds and ("shifted", "5") in kinds
        adapting = {row["variant"] for row in rows if row["orders"] == "2"}
        assert len({row["variant"] for row in rows}) == 15 and len(adapting) == 6 and len(runs) == 9 + 2 * 6
        assert all("reservoir" in name for name in adapting)
        # Without the rows of the last variant, the study runs only that one.
        content = json.loads(out.with_suffix(".json").read_text())
        last = content["rows"][-1]["variant"]
        content["rows"] = [row for row in content["rows"] if row["variant"] != last]
        out.with_suffix(".json").write_text(json.dumps(content))
        runs.clear()
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--plot", str(tmp_path / "shift.png")])
        adaptation.main()
        assert len(runs) == 2 and len(list(csv.DictReader(out.open()))) == len(rows)
        assert (tmp_path / "shift.png").stat().st_size > 10_000
        monkeypatch.setattr(sys, "argv", ["adaptation.py", *map(str, [*arguments, "--seed", 1])])
        with pytest.raises(SystemExit, match="was measured with other options or versions"):
            adaptation.main()
    finally:
        torch.set_num_threads(before)


def test_corruptions_are_deterministic_and_grow_with_severity() -> None:
    photo = Image.fromarray(scenes.draw(1, 0).images[0])
    for kind in corruptions.STRENGTHS:
        differences = []
        for severity in (1, 3, 5):
            pictures = [
                np.asarray(corruptions.corrupted(photo, kind, severity, np.random.default_rng(0))) for _ in range(2)
            ]
            assert np.array_equal(*pictures)
            differences.append(np.abs(pictures[0].astype(float) - np.asarray(photo)).mean())
        assert 0 < differences[0] < differences[2] and differences[1] <= differences[2]
