"""The command line: stdout, stderr and exit status of demo, classify and info, and the examples of every help."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import open_clip
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

import clipkernels as ck
from clipkernels.cli import SHORT_HELPS, main
from clipkernels.cli.parts import demo_images, demo_tables
from clipkernels.cli.parts.demo_images import KINDS, QUICK, draw, save
from clipkernels.cli.parts.methods import default_methods, name_of
from clipkernels.cli.parts.options import PRECISIONS
from clipkernels.cli.parts.output import opened
from clipkernels.comparison.towers import DTYPES
from clipkernels.data import digits, scenes
from clipkernels.images import readable_formats
from clipkernels.measure import environment
from clipkernels.measure.timing import Times, gmacs_for, plan_for
from tests.cli.commands import error, run, succeed
from tests.questions.annotation_folders import write_colours

DIGITS = ",".join(digits.CLASSES)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick demo's images: a folder per kind, and in it one per class."""
    folder = tmp_path_factory.mktemp("pictures")
    save(draw(QUICK, seed=0), folder)
    return folder


@pytest.fixture(scope="module")
def demo_rows() -> list[dict[str, Any]]:
    result = run("demo", "--quick", "--model", "none", "--format", "json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["rows"]


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single batch of images in the quick demo, for tests of the output format only."""
    monkeypatch.setattr(demo_images, "QUICK", QUICK._replace(digits=6, scenes=1, unseen=1))


def expected_logits(paths: list[str], method: ck.Method | None = None) -> torch.Tensor:
    """Return the logits (n,K) that the classifier itself gives for files."""
    model, preprocess, tokenizer = ck.bundled()
    classifier = ck.Classifier(model, tokenizer, digits.CLASSES, method=method)
    with torch.inference_mode():
        return classifier(torch.stack([preprocess(Image.open(path)) for path in paths]))


def command_of(verb: str) -> click.Command:
    """The command of a verb, or of a verb of a verb."""
    command: Any = main
    for name in verb.split():
        command = command.get_command(click.Context(command), name)
    return command


def examples(verb: str) -> Iterator[list[str]]:
    """Yield the commands at the end of a verb's help."""
    text = run(verb, "--help").output.split("Example:\n")[1].replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip():
            yield shlex.split(line)


def test_the_version_is_printed() -> None:
    assert run("--version").output == f"clipkernels {ck.__version__}\n"


def test_without_a_verb_the_help_is_printed() -> None:
    result = run()
    assert result.exit_code == 0
    assert all(verb in result.stdout for verb in ("classify", "demo", "info"))


def test_the_help_has_a_whole_line_per_verb_and_imports_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from clipkernels.cli import main; main(['--help'])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    for verb, text in SHORT_HELPS.items():
        assert sum(line.split() == [verb, *text.split()] for line in lines) == 1
    assert max(map(len, lines)) <= 80 and "…" not in process.stdout and "..." not in process.stdout.split("\n", 1)[1]


@pytest.mark.parametrize("verb", [*SHORT_HELPS, "support build"])
def test_the_help_of_every_verb_is_whole_at_80_columns(verb: str) -> None:
    lines = CliRunner().invoke(main, [*verb.split(), "--help"], terminal_width=80).output.splitlines()
    assert max(map(len, lines)) <= 80 and "Example:" in " ".join(lines)


OPTIONS = {
    (verb, option.opts[0]): option
    for verb in [*SHORT_HELPS, "support build"]
    for option in command_of(verb).params
    if isinstance(option, click.Option)
}


def test_an_option_has_one_meaning_and_every_option_has_a_help() -> None:
    assert all(option.help for option in OPTIONS.values())
    for name in ("--limit", "--device", "--classes-file", "--template", "--library", "--pretrained"):
        assert len({option.help for (_, other), option in OPTIONS.items() if other == name}) == 1, name
    written = {verb: option.help for (verb, name), option in OPTIONS.items() if name == "--output"}
    assert {text for verb, text in written.items() if verb not in ("rank", "train-predictor")} == {
        "File to write instead of stdout (-); it appears when complete."
    }
    limits = {verb: option.default for (verb, name), option in OPTIONS.items() if name == "--limit"}
    verbs = ("classify", "show", "rank", "recover", "support build")
    assert limits == {"bench": 256, "tune": 1000, "export": 300, **dict.fromkeys(verbs)}


def test_precisions_are_those_that_are_measured() -> None:
    assert tuple(DTYPES) == PRECISIONS
    taken = {verb for verb, name in OPTIONS if name == "--precision"}
    # Those of an export are the runtimes'.
    assert taken - {"export"} == {
        "demo",
        "classify",
        "bench",
        "check",
        "embed",
        "evaluate",
        "show",
        "rank",
        "support build",
        "tune",
    }


def test_every_verb_is_named_like_its_module() -> None:
    context = click.Context(main)
    assert all(main.get_command(context, verb).name == verb for verb in SHORT_HELPS)  # type: ignore[union-attr]
    assert main.get_command(context, "nothing") is None


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "clipkernels", "nothing"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=Path(ck.__file__).parent.parent, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (2, "", "error: No such command 'nothing'.\n")


def _verbs() -> Iterator[Any]:
    """Every verb; those that measure, check or export everything are slow and have their own tests."""
    for verb in sorted(SHORT_HELPS):
        yield pytest.param(verb, marks=[pytest.mark.slow] if verb in ("bench", "check", "demo", "export") else [])


@pytest.mark.parametrize("verb", list(_verbs()))
def test_the_examples_of_a_help_run(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if verb == "export":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    monkeypatch.chdir(tmp_path)
    if verb == "distill":  # annotations are the user's: no verb writes some
        write_colours(tmp_path / "snli_ve", "snli-ve", 12)
    commands = list(examples(verb))
    assert commands[-1][:2] == ["clipkernels", verb]
    for _, *arguments in commands:
        result = run(*arguments)
        assert result.exit_code == 0, result.output


def test_the_demo_has_a_row_per_method_with_its_cost(demo_rows: list[dict[str, Any]]) -> None:
    tower = ck.tower_of(ck.bundled()[0])
    chosen = default_methods(tower)
    assert {row["variant"] for row in demo_rows} == set(chosen) and len(demo_rows) == 5
    for row in demo_rows:
        method = chosen[row["variant"]]
        plan = (method or ck.Dense()).plan(tokens=65, blocks=6)
        assert row["tokens"] == list(plan.tokens)
        assert row["gmacs"] == pytest.approx(plan.gmacs(128, patch=4, out=128), abs=1e-5)
        assert row["ideal_speedup"] == pytest.approx(plan.ideal_speedup(128, patch=4, out=128), abs=1e-4)


def test_the_demos_efficiency_follows_from_its_columns(demo_rows: list[dict[str, Any]]) -> None:
    baseline = next(row for row in demo_rows if row["variant"] == row["baseline"])
    assert baseline["speedup"] == baseline["efficiency"] == 1.0
    for row in demo_rows:
        assert row["efficiency"] == pytest.approx(row["speedup"] * row["gmacs_run"] / baseline["gmacs_run"], rel=2e-2)


def test_the_demos_accuracy_is_that_of_the_classifier(demo_rows: list[dict[str, Any]]) -> None:
    model, preprocess, tokenizer = ck.bundled()
    pictures = draw(QUICK, seed=0)
    accuracy: dict[str, dict[str, float]] = {"dense (host)": {}, "EViT(keep=0.5)": {}}
    same = []
    for kind, images in pictures.items():
        source = digits if kind == "digits" else scenes
        batch = torch.stack([preprocess(Image.fromarray(image)) for image in images.images])
        predicted = {}
        for name, method in (("dense (host)", None), ("EViT(keep=0.5)", ck.EViT(0.5))):
            classifier = ck.Classifier(model, tokenizer, source.CLASSES, source.TEMPLATES, method)
            with torch.inference_mode():
                predicted[name] = classifier(batch).argmax(1).numpy()
            accuracy[name][kind] = float((predicted[name] == images.labels).mean())
        ck.unpatch(model)
        same += list(predicted["dense (host)"] == predicted["EViT(keep=0.5)"])
    for row in demo_rows:
        if row["variant"] in accuracy:
            assert {kind: row[kind] for kind in KINDS} == pytest.approx(accuracy[row["variant"]], abs=0.03)
    assert demo_rows[0]["agreement"] == 1.0
    agreements = {row["variant"]: row["agreement"] for row in demo_rows}
    assert agreements["EViT(keep=0.5)"] == pytest.approx(sum(same) / len(same), abs=0.02)


def test_the_demo_begins_with_the_methods_that_change_least(demo_rows: list[dict[str, Any]]) -> None:
    assert {row["variant"] for row in demo_rows[:2]} == {"dense (host)", "Dense()"}
    agreements = [row["agreement"] for row in demo_rows[2:]]
    assert agreements == sorted(agreements, reverse=True)


@pytest.mark.parametrize(("tokens", "blocks", "width"), [(65, 6, 128), (197, 12, 768), (257, 24, 1024)])
def test_tome_costs_what_evit_costs_in_the_demo(tokens: int, blocks: int, width: int) -> None:
    from types import SimpleNamespace

    tower: Any = SimpleNamespace(
        num_tokens=tokens, blocks=range(blocks), prefix=1, width=width, patch=16, out=512, mlp_ratio=4.0
    )
    chosen = default_methods(tower)
    tome = next(method for method in chosen.values() if isinstance(method, ck.ToMe))
    target = gmacs_for(tower, plan_for(tower, ck.EViT(0.7)))
    distance = {r: abs(gmacs_for(tower, plan_for(tower, ck.ToMe(r))) - target) for r in range(1, 40)}
    assert distance[int(tome.r)] == min(distance.values())  # type: ignore[arg-type]


def test_the_demo_writes_csv_with_both_towers(few_images: None, tmp_path: Path) -> None:
    result = run("demo", "--quick", "--model", "ViT-S-32-alt", "--format", "csv", "--output", tmp_path / "demo.csv")
    assert (result.exit_code, result.stdout) == (0, "")
    rows = list(csv.DictReader((tmp_path / "demo.csv").open(encoding="utf-8")))
    assert [row["model"] for row in rows] == 5 * ["bundled"] + 5 * ["ViT-S-32-alt"]
    assert rows[8]["tokens"].split()[:5] == ["50", "50", "50", "50", "37"]
    assert all(row["digits"] == row["agreement"] == "" for row in rows[5:])


def test_the_demos_table_shows_every_method(few_images: None) -> None:
    result = run("demo", "--quick", "--model", "none")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in default_methods(ck.tower_of(ck.bundled()[0])))
    assert "65→47→35→26" in result.stdout


def test_the_demo_casts_towers_and_images(few_images: None, monkeypatch: pytest.MonkeyPatch) -> None:
    timed, casts = demo_tables.time_variants, []

    def record(variants: Any, batches: Any, *arguments: Any, **options: Any) -> Times:
        casts.append({batch.dtype for batch in batches})
        return timed(variants, batches, *arguments, **options)

    monkeypatch.setattr(demo_tables, "time_variants", record)
    command = ("demo", "--quick", "--model", "ViT-S-32-alt", "--precision", "bf16", "--format", "json")
    rows = json.loads(succeed(*command).stdout)["rows"]
    assert [row["precision"] for row in rows] == ["bf16"] * 10
    assert casts == [{torch.bfloat16}] * 2


def test_the_demo_sets_the_threads_and_restores_them(few_images: None) -> None:
    torch.set_num_threads(2)
    try:
        result = run("demo", "--quick", "--model", "none", "--threads", 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert "1 thread" in result.stdout and "threads" not in result.stdout


def demo_error(*arguments: object) -> str:
    """Return the line on stderr after the demo's first."""
    result = run("demo", "--quick", *arguments)
    first, line = result.stderr.splitlines()
    assert (result.exit_code, result.stdout) == (2, "") and first.startswith("Timing the bundled CLIP")
    return line


def test_an_unknown_full_size_tower_is_one_line() -> None:
    assert "got 'ViT-X-1'" in demo_error("--model", "ViT-X-1")


def test_an_unsupported_full_size_tower_is_one_line(resnet: str) -> None:
    assert "got ModifiedResNet" in demo_error("--model", resnet)


def test_the_demos_rates_and_speed_ups_agree(demo_rows: list[dict[str, Any]]) -> None:
    baseline = next(row for row in demo_rows if row["variant"] == row["baseline"])
    assert baseline["images_per_second"] == pytest.approx(1e3 * QUICK.batch / baseline["milliseconds"], rel=1e-3)
    for row in demo_rows:
        rate = baseline["images_per_second"] * row["speedup"]
        assert row["images_per_second"] == pytest.approx(rate, rel=1e-3)


def test_the_demo_says_what_it_does_before_it_imports_torch() -> None:
    # With torch hidden the verb fails, after its line has gone into the pipe.
    code = (
        "import sys; sys.modules['torch'] = None; from clipkernels.cli import main; main(['demo', '--model', 'none'])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    first = process.stderr.splitlines()[0]
    assert first == "Timing the bundled CLIP, dense and with every method: less than a minute on a CPU."
    assert process.returncode == 1 and "torch" in process.stderr.splitlines()[-1]


@pytest.mark.parametrize(("ratio", "warns"), [(1.05, False), (1.2, True), (0.8, True)])
def test_two_dense_timings_that_differ_by_a_tenth_warn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ratio: float, warns: bool
) -> None:
    def fake(variants: Any, *_: Any, **options: Any) -> Times:
        return Times({name: [ratio if name == demo_tables.REPEATED else 1.0] for name in variants})

    monkeypatch.setattr(demo_tables, "time_variants", fake)
    variants: Any = {"dense (host)": None, "Dense()": None}
    times = demo_tables.time_with_repeat("a tower", variants, [], 1, 0, lambda: None)
    assert list(times.seconds) == [*variants, demo_tables.REPEATED]
    line = capsys.readouterr().err
    percent = round(100 * (max(ratio, 1 / ratio) - 1))
    expected = (
        f"warning: a tower: two timings of dense (host) differ by {percent} %; speed-ups are no more precise than "
    )
    assert line == (f"{expected}that: repeat on an idle machine\n" if warns else "")


def test_classify_gives_path_and_the_two_best_classes(pictures: Path) -> None:
    path = min((pictures / "digits").rglob("*.png"))
    result = run("classify", path, "--classes", DIGITS, "--format", "csv")
    assert result.exit_code == 0
    header, row = csv.reader(io.StringIO(result.stdout))
    assert header == ["path", "class", "probability", "second_class", "second_probability"]
    top = expected_logits([str(path)]).softmax(1)[0].topk(2)
    assert [row[0], row[1], row[3]] == [str(path), *(digits.CLASSES[k] for k in top.indices)]
    assert [float(row[2]), float(row[4])] == pytest.approx(top.values.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "method"),
    [
        (["--method", "evit:0.5:blocks=1/2"], ck.EViT(0.5, blocks=(1, 2))),
        (["--method", "tome:5"], ck.ToMe(5)),
        (["--method", "none"], None),
    ],
)
def test_classify_runs_the_chosen_method(pictures: Path, options: list[str], method: ck.Method | None) -> None:
    paths = sorted(map(str, (pictures / "digits").rglob("*.png")))[:8]
    result = run("classify", *paths, "--classes", DIGITS, "--format", "jsonl", *options)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    top = expected_logits(paths, method).softmax(1).max(1)
    assert [row["path"] for row in rows] == paths
    assert [row["probability"] for row in rows] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert (name_of(method) if method else "the host library, dense") in result.stderr


def test_batches_and_workers_do_not_change_the_answers(pictures: Path) -> None:
    folder = pictures / "scenes_unseen"
    common = ["classify", folder, "--classes", "red circle,blue star", "--format", "jsonl"]
    results = [run(*common, "--batch-size", size, "--workers", workers) for size, workers in ((1, 0), (7, 1))]
    one, seven = ([json.loads(line) for line in result.stdout.splitlines()] for result in results)
    assert len(one) == QUICK.unseen
    assert [row["path"] for row in one] == [row["path"] for row in seven]
    assert [row["probability"] for row in one] == pytest.approx([row["probability"] for row in seven], abs=1e-4)


def test_json_is_one_list_of_the_objects_of_jsonl(pictures: Path) -> None:
    common = ("classify", pictures / "digits", "--classes", DIGITS, "--folder-labels", "--format")
    rows = json.loads(run(*common, "json").stdout)
    assert rows == [json.loads(line) for line in run(*common, "jsonl").stdout.splitlines()] and len(rows) == 60


def test_a_limit_draws_images_and_a_larger_one_adds_to_them(pictures: Path) -> None:
    common = ("classify", pictures / "digits", "--classes", DIGITS, "--format", "json")

    def paths(*options: object) -> list[str]:
        return [row["path"] for row in json.loads(run(*common, *options).stdout)]

    everything, three, five = paths(), paths("--limit", 3), paths("--limit", 5)
    assert three == paths("--limit", 3, "--shuffle", 0) == five[:3] and three != paths("--limit", 3, "--shuffle", 1)
    assert everything == sorted(everything) and sorted(paths("--limit", 100)) == everything
    assert len(set(five)) == 5 and five != everything[:5]


def test_templates_change_the_prompts(pictures: Path) -> None:
    path = min((pictures / "digits").rglob("*.png"))
    rows = [
        json.loads(run("classify", path, "--classes", DIGITS, "--format", "jsonl", *options).stdout)
        for options in ([], ["--template", "a photo of a {}."], ["--template", "{}.", "--template", "the digit {}."])
    ]
    assert rows[0] == rows[1] != rows[2]


def test_classes_come_from_a_file(pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("red circle\n\n  blue star \n", encoding="utf-8")
    path = min((pictures / "scenes_seen").rglob("*.png"))
    by_name = run("classify", path, "--classes", "red circle,blue star", "--format", "csv")
    assert run("classify", path, "--classes-file", file, "--format", "csv").stdout == by_name.stdout


def test_a_single_class_has_no_second(pictures: Path) -> None:
    path = min((pictures / "digits").rglob("*.png"))
    result = run("classify", path, "--classes", "zero", "--format", "jsonl")
    assert json.loads(result.stdout) == {"path": str(path), "class": "zero", "probability": 1.0}


def test_a_named_file_is_tried_whatever_its_name(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 30))
    (tmp_path / "b" / "c").mkdir(parents=True)
    picture.save(tmp_path / "b" / "c" / "deep.JPG", "JPEG")
    picture.save(tmp_path / "b" / "grey.png")
    picture.save(tmp_path / "b" / "nameless", "PNG")
    (tmp_path / "b" / "notes.txt").write_text("no image")
    common = ["--classes", DIGITS, "--format", "jsonl"]
    paths = [json.loads(line)["path"] for line in run("classify", tmp_path / "b", *common).stdout.splitlines()]
    assert paths == [str(tmp_path / "b" / "c" / "deep.JPG"), str(tmp_path / "b" / "grey.png")]
    result = run("classify", tmp_path / "b" / "nameless", *common)
    assert json.loads(result.stdout)["path"] == str(tmp_path / "b" / "nameless")


def test_a_quoted_glob_is_expanded_in_order(pictures: Path) -> None:
    result = run("classify", pictures / "digits" / "t*" / "*.png", "--classes", DIGITS, "--format", "jsonl")
    paths = [json.loads(line)["path"] for line in result.stdout.splitlines()]
    assert paths == sorted(str(path) for name in ("two", "three") for path in (pictures / "digits" / name).iterdir())


def test_files_that_are_not_images_are_skipped(pictures: Path, tmp_path: Path) -> None:
    good = min((pictures / "digits").rglob("*.png"))
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(whole, "JPEG")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "short.jpg").write_bytes(whole.getvalue()[:900])
    (tmp_path / "empty.jpg").touch()
    files = [tmp_path / "text.png", good, tmp_path / "short.jpg", tmp_path / "empty.jpg"]
    result = run("classify", *files, "--classes", DIGITS, "--format", "jsonl")
    assert result.exit_code == 1
    assert [json.loads(line)["path"] for line in result.stdout.splitlines()] == [str(good)]
    skipped = re.findall(r"^skipped (.*?): ", result.stderr, re.MULTILINE)
    assert skipped == [str(files[0]), str(files[2]), str(files[3])]
    assert "3 files skipped" in result.stderr


def test_a_photograph_stored_sideways_is_classified_upright(pictures: Path, tmp_path: Path) -> None:
    upright = Image.open(min((pictures / "digits" / "seven").iterdir())).convert("RGB")
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "stored.png")
    exif = Image.Exif()
    exif[274] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "tagged.png", exif=exif)
    common = ("--classes", DIGITS, "--format", "jsonl")
    logits = expected_logits([str(tmp_path / name) for name in ("stored.png", "upright.png")])
    stored, right = logits.softmax(1).amax(1).tolist()
    for options, probability in ((("--no-exif",), stored), ((), right)):
        result = run("classify", tmp_path / "tagged.png", *common, *options)
        assert json.loads(result.stdout)["probability"] == pytest.approx(probability, abs=1e-5)
    assert abs(stored - right) > 1e-3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_folder_with_everything_in_it_is_classified(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    good = min((pictures / "digits" / "two").iterdir())
    for name in ("a.png", "._a.png", ".hidden.png"):
        (folder / name).write_bytes(good.read_bytes())
    os.mkfifo(folder / "pipe.png")
    (folder / "endless.png").symlink_to("/dev/zero")
    Image.new("L", (1, 60000), 7).save(folder / "strip.png")
    Image.fromarray(np.full((4, 4), 1e9, np.float32)).save(folder / "wild.tiff")
    (folder / "phone.heic").write_bytes(b"not really")
    (folder / "linked").symlink_to(pictures / "digits" / "one")
    (folder / "loop").symlink_to(tmp_path)
    result = run("classify", folder, "--classes", DIGITS, "--format", "jsonl", "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 1
    rows = [json.loads(line)["path"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    linked = [str(folder / "linked" / path.name) for path in sorted((pictures / "digits" / "one").iterdir())]
    assert rows == [str(folder / "a.png"), *linked]
    skipped = dict(re.findall(r"^skipped .*?pictures/(\S+): (.*)$", result.stderr, re.MULTILINE))
    assert skipped == {
        "endless.png": "not a regular file",
        "pipe.png": "not a regular file",
        "strip.png": "1×60000 pixels, sides beyond 200:1",
        "wild.tiff": "grey floats from 1000000000.0 to 1000000000.0, expected 0 to 1",
    }
    if "HEIF" not in readable_formats():
        assert result.stderr.endswith("\nskipped 1 .heic: install pillow-heif\n")


def test_grey_transparent_palette_and_cmyk_images_are_read(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "1", "LA"):
        Image.new(mode, (20, 20)).save(tmp_path / f"{mode}.png")
    Image.new("CMYK", (20, 20)).save(tmp_path / "CMYK.jpg")
    result = run("classify", tmp_path, "--classes", DIGITS, "--format", "jsonl")
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 6)


def test_folder_labels_give_the_accuracy(pictures: Path) -> None:
    folder = pictures / "digits"
    result = run("classify", folder, "--classes", DIGITS, "--folder-labels", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert all(row["label"] == Path(row["path"]).parent.name for row in rows)
    correct = sum(row["label"] == row["class"] for row in rows)
    assert f"accuracy {100 * correct / len(rows):.2f} % ({correct} of {len(rows)})" in result.stderr


def test_folder_labels_alone_make_the_folders_the_classes(pictures: Path) -> None:
    common = ("classify", pictures / "digits", "--folder-labels", "--format", "csv")
    named = succeed(*common, "--classes", ",".join(sorted(digits.CLASSES)))
    alone = succeed(*common)
    assert alone.stdout == named.stdout and "accuracy " in alone.stderr


def test_a_model_that_cannot_be_downloaded_is_a_failure(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: Any, **options: Any) -> Any:
        raise OSError("no network\nanywhere")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", offline)
    options = ("--classes", "a,b", "--model", "ViT-B-16", "--pretrained", "openai")
    line = error(run("classify", pictures / "digits", *options), status=1)
    assert line == "error: expected a model that loads, got ViT-B-16 with openai: no network anywhere"


def test_the_summary_names_images_speed_and_token_counts(pictures: Path) -> None:
    result = run("classify", pictures / "digits", "--classes", DIGITS, "--method", "evit")
    assert re.search(r"60 images in [\d.]+ s: [\d.]+ images/s end to end, [\d.]+ in the model", result.stderr)
    assert "EViT(keep=0.7)" in result.stderr and "tokens 65→47→35→26" in result.stderr


def test_the_table_shows_paths_literally(tmp_path: Path) -> None:
    path = tmp_path / "[red] :smile: [b].png"
    Image.new("RGB", (8, 8)).save(path)
    result = run("classify", path, "--classes", DIGITS)
    assert result.exit_code == 0
    assert "[red] :smile: [b].png" in result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not take arbitrary bytes as a file name")
def test_a_path_that_is_not_text_keeps_its_bytes(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/\xff\xfe.png"
    with open(raw, "wb") as file:
        Image.new("RGB", (8, 8)).save(file, "PNG")
    result = run("classify", tmp_path, "--classes", DIGITS, "--format", "csv")
    assert result.exit_code == 0
    assert raw in result.stdout_bytes


def test_an_output_file_holds_the_results_of_stdout(pictures: Path, tmp_path: Path) -> None:
    path, file = min((pictures / "digits").rglob("*.png")), tmp_path / "out.csv"
    common = ["classify", path, "--classes", DIGITS, "--format", "csv"]
    result = run(*common, "--output", file)
    assert result.stdout == ""
    assert file.read_text(encoding="utf-8") == run(*common).stdout
    assert list(tmp_path.iterdir()) == [file]


def test_a_run_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "out.csv"
    file.write_text("old")
    with pytest.raises(RuntimeError), opened(str(file)) as stream:
        stream.write("new")
        raise RuntimeError
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_checkpoint_file_is_loaded(registered: str, pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, _, preprocess = open_clip.create_model_and_transforms(registered)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    path = min((pictures / "digits").rglob("*.png"))
    checkpoint = ["--model", registered, "--pretrained", tmp_path / "model.safetensors"]
    result = run("classify", path, "--classes", DIGITS, "--format", "jsonl", *checkpoint)
    assert result.exit_code == 0, result.output
    classifier = ck.Classifier(model.eval(), open_clip.get_tokenizer(registered), digits.CLASSES)
    with torch.inference_mode():
        expected = classifier(preprocess(Image.open(path))[None]).softmax(1).max().item()
    assert json.loads(result.stdout)["probability"] == pytest.approx(expected, abs=1e-4)


def test_a_model_without_weights_says_so(registered: str, pictures: Path) -> None:
    path = min((pictures / "digits").rglob("*.png"))
    result = run("classify", path, "--classes", DIGITS, "--model", registered)
    assert result.exit_code == 0
    assert f"warning: {registered} has random weights" in result.stderr


class Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_a_checkpoint_that_would_run_code_is_refused(registered: str, pictures: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": Trap(str(tmp_path / "sprung"))}, tmp_path / "bad.pt")
    result = run("classify", pictures, "--classes", DIGITS, "--model", registered, "--pretrained", tmp_path / "bad.pt")
    assert "expected a model that loads, got" in error(result, status=1)
    assert not (tmp_path / "sprung").exists()


def test_an_unsupported_tower_runs_in_its_library(resnet: str, pictures: Path) -> None:
    path = min((pictures / "digits").rglob("*.png"))
    common = ["classify", path, "--classes", DIGITS, "--model", resnet]
    assert "the host's own ModifiedResNet" in run(*common).stderr
    result = run(*common, "--method", "evit")
    assert result.exit_code == 2
    assert "got ModifiedResNet" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", ""], "classes must name at least one class, got none"),
        (["--classes", "one,two,one"], "classes must differ, got 'one' 2 times"),
        ([], "or --classes-file, got neither: give --folder-labels if the folders are named like the classes"),
        (["--method", "evit:0.7", "--method", "tome:8"], "expected one --method, got evit:0.7 and tome:8"),
        (["--precision", "fp32", "--precision", "bf16"], "expected one --precision, got fp32 and bf16"),
        (["--classes", "a", "--classes", "b", "--classes", "c"], "expected one --classes, got a, b and c"),
        (["--classes", "a", "--template", "a photo"], "templates must hold {} in place of the class name"),
        (["--classes", "a", "--method", "evit:0"], "got 'evit:0': keep must be a number in (0, 1], got 0.0"),
        (["--classes", "a", "--method", "evit:0.7:blocks=6"], "blocks must be ints in [0, 5]"),
        (["--classes", "a", "--method", "prune"], "schedule.json, dense or none, got 'prune': no such method"),
        (["--classes", "a", "--limit", "0"], "--limit"),
        (["--classes", "a", "--device", "abacus"], "expected a device of this machine, got 'abacus'"),
        (["--classes", "a", "--model", "ViT-B-61"], "expected one of open_clip's models (ViT-B-16"),
        (["--classes", "a", "--model", "ViT-B-16", "--pretrained", "nobody"], "or one of ViT-B-16's tags (openai"),
        (["--classes", "a", "--pretrained", "openai"], "expected --model with --pretrained openai"),
        (["--classes", "a", "--folder-labels"], "expected folders named like the classes, got"),
        (["--classes", "a", "--output", "nowhere/out.csv"], "expected a file that can be written for --output"),
        (["--classes", "a", "--output", "."], "expected a file for --output, got the folder"),
        (["--classes", "a", "--batch-size", "0"], "--batch-size"),
        (["--classes", "a", "--what"], "No such option"),
    ],
)
def test_a_wrong_option_is_one_line(pictures: Path, options: list[str], message: str) -> None:
    assert message in error(run("classify", min((pictures / "digits").rglob("*.png")), *options))


def test_a_path_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "which matches nothing" in error(run("classify", tmp_path / "gone.png", "--classes", "a"))
    assert "got none under" in error(run("classify", tmp_path / "empty", "--classes", "a"))


def test_info_names_the_backend_of_every_device() -> None:
    result = json.loads(run("info", "--format", "json").stdout)
    assert result["versions"]["clipkernels"] == ck.__version__
    assert result["versions"]["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert result["devices"][0]["device"] == "cpu"
    for device in result["devices"]:
        assert (device["backend"], device["why"]) == ck.backend.explain(torch.device(device["device"]))


def test_a_backend_that_cannot_run_is_one_line(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPKERNELS_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    result = run("classify", pictures / "digits", "--classes", DIGITS)
    warning, line = result.stderr.splitlines()
    assert (result.exit_code, result.stdout) == (1, "")
    assert warning.startswith("warning: block 0 could not be verified: CLIPKERNELS_BACKEND=triton is set, but")
    assert line.startswith("error: CLIPKERNELS_BACKEND=triton is set, but the tensors are on the CPU")


def test_the_commit_is_never_that_of_an_enclosing_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPKERNELS_COMMIT", "given")
    outputs = {"rev-parse": str(Path(ck.__file__).parents[1]), "describe": "abc-dirty"}
    monkeypatch.setattr(environment, "_output", lambda *command: outputs.get(command[1]))
    assert environment.environment()["commit"] == "abc-dirty"
    outputs["rev-parse"] = str(tmp_path)
    assert environment.environment()["commit"] == "given"


def test_info_as_a_table_names_backend_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPKERNELS_BACKEND", "reference")
    result = run("info")
    assert "CLIPKERNELS_BACKEND=reference is set" in result.stdout
    assert ck.__version__ in result.stdout


STREAM = ("--folder-labels", "--shuffle", 1, "--classes", DIGITS, "--adapt", "tca", "--format", "jsonl")


def test_a_stream_adapts_and_resumes_from_its_file(pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "reservoir.safetensors"
    first = run("classify", pictures / "digits", *STREAM, "--reservoir", file, "--batch-size", 16)
    assert first.exit_code == 0, first.output
    cached = int(re.search(r"mean entropy [0-9.]+, (\d+) images cached", first.stderr)[1])
    assert "TCA(rate=0.035)" in first.stderr and 10 < cached <= 30
    # The same through the library, in the same order.
    paths = [json.loads(line)["path"] for line in first.stdout.splitlines()]
    assert paths != sorted(paths) and len(paths) == 60
    model, preprocess, tokenizer = ck.bundled()
    classifier = ck.Classifier(model, tokenizer, digits.CLASSES, method=ck.TCA(0.035), head=ck.Reservoir)
    images = torch.stack([preprocess(Image.open(path)) for path in paths])
    with torch.inference_mode():
        logits = torch.cat([classifier(batch) for batch in images.split(16)])
    actual = [json.loads(line)["probability"] for line in first.stdout.splitlines()]
    assert actual == pytest.approx(logits.softmax(1).amax(1).tolist(), abs=1e-4)
    second = run("classify", pictures / "digits", *STREAM, "--reservoir", file)
    assert f"{file}: resumed: 60 images seen, {cached} cached" in second.stderr
    assert second.stdout != first.stdout
    assert ck.Reservoir(classifier.head.zero_shot.text).load(file).seen == 120
    before = file.read_bytes()
    frozen = run("classify", pictures / "digits", *STREAM, "--reservoir", file, "--frozen")
    assert frozen.exit_code == 0 and file.read_bytes() == before


def test_tda_adapts_to_a_stream_and_resumes_from_its_file(pictures: Path, tmp_path: Path) -> None:
    file, options = tmp_path / "caches.safetensors", [word if word != "tca" else "tda" for word in STREAM]
    first = run("classify", pictures / "digits", *options, "--reservoir", file, "--batch-size", 16)
    assert first.exit_code == 0, first.output
    cached = int(re.search(r"mean entropy [0-9.]+, (\d+) images cached", first.stderr)[1])
    assert "Dense()" in first.stderr and 10 < cached <= 30
    rows = [json.loads(line) for line in first.stdout.splitlines()]
    model, preprocess, tokenizer = ck.bundled()
    classifier = ck.Classifier(model, tokenizer, digits.CLASSES, head=ck.TDA)
    with torch.inference_mode():
        logits = classifier(torch.stack([preprocess(Image.open(row["path"])) for row in rows]))  # one batch
    actual = [row["probability"] for row in rows]
    assert actual == pytest.approx(logits.softmax(1).amax(1).tolist(), abs=1e-4)
    second = run("classify", pictures / "digits", *options, "--reservoir", file, "--method", "none")
    assert f"{file}: resumed: 60 images seen, {cached} cached" in second.stderr
    head = ck.TDA(classifier.head.zero_shot.text).load(file)
    assert head.seen == 120 and head.negative_counts.sum() > 0
    before = file.read_bytes()
    frozen = run("classify", pictures / "digits", *options, "--reservoir", file, "--frozen", "--preset", "dtd")
    assert frozen.exit_code == 0 and file.read_bytes() == before
    other = error(run("classify", pictures / "digits", *STREAM, "--reservoir", file))
    assert f"expected a reservoir (clipkernels.reservoir.2), got {file} with format 'clipkernels.tda.1'" in other


def test_an_interrupted_stream_keeps_its_reservoir(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "reservoir.safetensors"
    call, calls = ck.Reservoir.__call__, []

    def interrupted(self: ck.Reservoir, features: ck.Encoded) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return call(self, features)

    monkeypatch.setattr(ck.Reservoir, "__call__", interrupted)
    result = run("classify", pictures / "digits", *STREAM, "--reservoir", file, "--batch-size", 8)
    assert result.exit_code != 0
    model, _, tokenizer = ck.bundled()
    head = ck.Classifier(model, tokenizer, digits.CLASSES, head=ck.Reservoir).head
    assert head.load(file).seen == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--reservoir", "x"), "expected --adapt with --reservoir, got none"),
        (("--preset", "dtd"), "expected --adapt or --head calip with --preset, got none"),
        (("--adapt", "tca", "--frozen"), "expected --reservoir with a file that exists for --frozen, got None"),
        (
            ("--adapt", "tca", "--reservoir", "no/such/file"),
            "expected a file that can be read and written for --reservoir",
        ),
        (("--adapt", "tca", "--reservoir", "."), "expected a file for --reservoir, got the folder ."),
        (("--adapt", "tca", "--reservoir", __file__), "expected a safetensors file, got"),
        (("--adapt", "tca", "--method", "tca:0.9"), "valid rates are"),
        (("--adapt", "tca", "--method", "none"), "expected any method but none with --adapt tca, got --method none"),
    ],
)
def test_a_wrong_option_of_a_stream_is_one_line(options: tuple[object, ...], message: str, pictures: Path) -> None:
    assert message in error(run("classify", pictures / "digits", "--classes", DIGITS, *options))


def test_a_stream_sorted_by_class_is_warned_of(pictures: Path) -> None:
    folder = pictures / "digits"
    common = ("--classes", DIGITS, "--adapt", "tca", "--format", "jsonl")
    few = [min((folder / name).iterdir()) for name in ("two", "one")]
    warning = "warning: the images come folder by folder (2 folders), but --adapt learns from earlier images: mix them"
    assert f"{warning} with --shuffle 0\n" in run("classify", *few, *common).stderr
    other = max((folder / "two").iterdir())
    for arguments in ((*few, other), (few[0], other), (*few, "--shuffle", 1), (*few, "--limit", 2)):
        assert "folder by folder" not in run("classify", *arguments, *common).stderr
    assert "folder by folder" not in run("classify", *few, "--classes", DIGITS).stderr


def test_one_class_is_warned_of(pictures: Path) -> None:
    good = min((pictures / "digits" / "two").iterdir())
    warning = "warning: one class, 'two': every image is given it, so name others too\n"
    assert warning in run("classify", good, "--classes", "two").stderr
    assert "one class" not in run("classify", good, "--classes", "one,two").stderr


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"cat\n\xff\xfe\n", "'utf-8' codec can't decode byte 0xff"),
        (b"\n  \n", "classes must name at least one class, got none"),
        (b"cat\ndog\ncat\n", "classes must differ, got 'cat' 2 times"),
    ],
)
def test_errors_of_a_file_of_classes_name_the_file(content: bytes, reason: str, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(content)
    line = error(run("classify", pictures / "digits", "--classes-file", tmp_path / "classes.txt"))
    assert line.startswith(f"error: expected class names in --classes-file {tmp_path / 'classes.txt'}, got an error: ")
    assert reason in line


@pytest.mark.parametrize("verb", ["classify", "rank", "bench", "support build"])
def test_the_help_of_image_files_says_how_they_are_read(verb: str) -> None:
    text = " ".join(run(*verb.split(), "--help").output.split())
    assert "--no-exif" in text and "--limit" in text
    if verb == "classify":
        assert "512 MiB" in text and "sides beyond 200:1" in text and "Pillow's limit (89 million)" in text
    else:
        assert "as in classify, with its limits of size and format" in text


def test_tca_condenses_without_a_reservoir(pictures: Path) -> None:
    result = run("classify", pictures / "digits", "--classes", DIGITS, "--method", "tca:0.1")
    assert result.exit_code == 0 and "TCA(rate=0.1)" in result.stderr and "cached" not in result.stderr
