"""The command line: what goes to stdout, what to stderr, and the exit status."""

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
from importlib import import_module
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file

import clipkernels as ck
from clipkernels.cli import main
from clipkernels.cli.parts.demo_images import KINDS, QUICK, draw, save
from clipkernels.cli.parts.methods import choose_methods
from clipkernels.cli.parts.output import opened
from clipkernels.data import digits, scenes
from clipkernels.measure import environment
from clipkernels.measure.timing import gmacs_for, plan_for

DIGITS = ",".join(digits.CLASSES)
pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def error(result: Result) -> str:
    """The one line that a failed command leaves on stderr."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    line = result.stderr.removesuffix("\n")
    assert line.startswith("error: ") and "\n" not in line
    return line


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
    """A single batch of images in the quick demo, for tests of its form alone."""
    monkeypatch.setattr(import_module("clipkernels.cli.demo"), "QUICK", QUICK._replace(digits=6, scenes=1, unseen=1))


def expected_logits(paths: list[str], method: ck.Method | None = None) -> torch.Tensor:
    """What the classifier itself says of some files."""
    model, preprocess, tokenizer = ck.bundled()
    classifier = ck.Classifier(model, tokenizer, digits.CLASSES, method=method)
    with torch.inference_mode():
        return classifier(torch.stack([preprocess(Image.open(path)) for path in paths]))


def examples(verb: str) -> Iterator[list[str]]:
    """The commands at the end of a verb's help."""
    text = run(verb, "--help").output.split("Example:\n")[1].replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip():
            yield shlex.split(line)


def test_the_version_is_printed() -> None:
    assert run("--version").output == f"clipkernels {ck.__version__}\n"


def test_no_verb_prints_the_help() -> None:
    result = run()
    assert result.exit_code == 0
    assert all(verb in result.stdout for verb in ("classify", "demo", "info"))


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "clipkernels", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(ck.__file__).parent.parent, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: No such command 'nothing'.\n")


def _verbs() -> Iterator[Any]:
    """Every verb; the three that measure or check everything are slow, and have tests of their own."""
    for verb in sorted(main.commands):
        yield pytest.param(verb, marks=[pytest.mark.slow] if verb in ("bench", "check", "demo") else [])


@pytest.mark.parametrize("verb", list(_verbs()))
def test_the_example_at_the_end_of_a_help_runs(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = list(examples(verb))
    assert commands[-1][:2] == ["clipkernels", verb]
    for _, *arguments in commands:
        result = run(*arguments)
        assert result.exit_code == 0, result.output


def test_the_demo_has_a_row_per_method_with_the_cost_of_its_plan(demo_rows: list[dict[str, Any]]) -> None:
    tower = ck.tower_of(ck.bundled()[0])
    chosen = choose_methods(tower)
    assert [row["variant"] for row in demo_rows] == list(chosen)
    for row, method in zip(demo_rows, chosen.values(), strict=True):
        plan = (method or ck.Dense()).plan(tokens=65, blocks=6)
        assert row["tokens"] == list(plan.tokens)
        assert row["gmacs"] == pytest.approx(plan.gmacs(128, patch=4, out=128), abs=1e-5)
        assert row["ideal_speedup"] == pytest.approx(plan.ideal_speedup(128, patch=4, out=128), abs=1e-4)


def test_the_demos_efficiency_follows_from_its_own_columns(demo_rows: list[dict[str, Any]]) -> None:
    baseline = next(row for row in demo_rows if row["variant"] == row["baseline"])
    assert baseline["speedup"] == baseline["efficiency"] == 1.0
    for row in demo_rows:
        assert row["efficiency"] == pytest.approx(row["speedup"] * row["gmacs_run"] / baseline["gmacs_run"], rel=2e-2)


def test_the_demos_accuracy_and_agreement_are_those_of_the_classifier(demo_rows: list[dict[str, Any]]) -> None:
    model, preprocess, tokenizer = ck.bundled()
    drawn = draw(QUICK, seed=0)
    right: dict[str, dict[str, float]] = {"dense (host)": {}, "EViT(keep=0.5)": {}}
    same = []
    for kind, images in drawn.items():
        source = digits if kind == "digits" else scenes
        batch = torch.stack([preprocess(Image.fromarray(image)) for image in images.images])
        found = {}
        for name, method in (("dense (host)", None), ("EViT(keep=0.5)", ck.EViT(0.5))):
            classifier = ck.Classifier(model, tokenizer, source.CLASSES, source.TEMPLATES, method)
            with torch.inference_mode():
                found[name] = classifier(batch).argmax(1).numpy()
            right[name][kind] = float((found[name] == images.labels).mean())
        ck.unpatch(model)
        same += list(found["dense (host)"] == found["EViT(keep=0.5)"])
    for row in demo_rows:
        if row["variant"] in right:
            assert {kind: row[kind] for kind in KINDS} == pytest.approx(right[row["variant"]], abs=0.03)
    assert demo_rows[0]["agreement"] == 1.0
    assert demo_rows[3]["agreement"] == pytest.approx(sum(same) / len(same), abs=0.02)


@pytest.mark.parametrize(("tokens", "blocks", "width"), [(65, 6, 128), (197, 12, 768), (257, 24, 1024)])
def test_tome_costs_what_evit_costs_in_the_demo(tokens: int, blocks: int, width: int) -> None:
    from types import SimpleNamespace

    tower: Any = SimpleNamespace(
        tokens=tokens, blocks=range(blocks), prefix=1, width=width, patch=16, out=512, mlp_ratio=4.0
    )
    chosen = choose_methods(tower)
    tome = next(method for method in chosen.values() if isinstance(method, ck.ToMe))
    target = gmacs_for(tower, plan_for(tower, ck.EViT(0.7)))
    off = {r: abs(gmacs_for(tower, plan_for(tower, ck.ToMe(r))) - target) for r in range(1, 40)}
    assert off[int(tome.r)] == min(off.values())  # type: ignore[arg-type]


def test_the_demo_writes_csv_with_both_towers(few_images: None, tmp_path: Path) -> None:
    result = run("demo", "--quick", "--model", "ViT-S-32-alt", "--format", "csv", "--output", tmp_path / "demo.csv")
    assert (result.exit_code, result.stdout) == (0, "")
    rows = list(csv.DictReader((tmp_path / "demo.csv").open(encoding="utf-8")))
    assert [row["model"] for row in rows] == 5 * ["bundled"] + 5 * ["ViT-S-32-alt"]
    assert rows[7]["tokens"].split()[:5] == ["50", "50", "50", "50", "37"]
    assert all(row["digits"] == row["agreement"] == "" for row in rows[5:])


def test_the_demos_table_shows_every_method(few_images: None) -> None:
    result = run("demo", "--quick", "--model", "none")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in choose_methods(ck.tower_of(ck.bundled()[0])))
    assert "65→47→35→26" in result.stdout


def test_the_demo_sets_the_threads_and_puts_them_back(few_images: None) -> None:
    torch.set_num_threads(2)
    try:
        result = run("demo", "--quick", "--model", "none", "--threads", 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert "1 thread" in result.stdout and "threads" not in result.stdout


def test_an_unknown_full_size_tower_is_one_line() -> None:
    assert "got 'ViT-X-1'" in error(run("demo", "--quick", "--model", "ViT-X-1"))


def test_a_full_size_tower_that_cannot_be_served_is_one_line(resnet: str) -> None:
    assert "got ModifiedResNet" in error(run("demo", "--quick", "--model", resnet))


def test_classify_gives_path_best_class_and_next(pictures: Path) -> None:
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
        (["--method", "evit", "--keep", "0.5", "--blocks", "1,2"], ck.EViT(0.5, blocks=(1, 2))),
        (["--method", "tome", "--r", "5"], ck.ToMe(5)),
        (["--method", "none"], None),
    ],
)
def test_classify_runs_the_method_that_was_asked_for(
    pictures: Path, options: list[str], method: ck.Method | None
) -> None:
    paths = sorted(map(str, (pictures / "digits").rglob("*.png")))[:8]
    result = run("classify", *paths, "--classes", DIGITS, "--format", "jsonl", *options)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    top = expected_logits(paths, method).softmax(1).max(1)
    assert [row["path"] for row in rows] == paths
    assert [row["probability"] for row in rows] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert (repr(method) if method else "the host library, dense") in result.stderr


def test_batches_and_workers_do_not_change_the_answers(pictures: Path) -> None:
    folder = pictures / "scenes_unseen"
    common = ["classify", folder, "--classes", "red circle,blue star", "--format", "jsonl"]
    results = [run(*common, "--batch-size", size, "--workers", workers) for size, workers in ((1, 0), (7, 1))]
    one, seven = ([json.loads(line) for line in result.stdout.splitlines()] for result in results)
    assert len(one) == QUICK.unseen
    assert [row["path"] for row in one] == [row["path"] for row in seven]
    assert [row["probability"] for row in one] == pytest.approx([row["probability"] for row in seven], abs=1e-4)


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


def test_a_folder_is_searched_for_image_names_and_a_named_file_is_always_tried(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 30))
    (tmp_path / "b" / "c").mkdir(parents=True)
    picture.save(tmp_path / "b" / "c" / "deep.JPG", "JPEG")
    picture.save(tmp_path / "b" / "grey.png")
    picture.save(tmp_path / "b" / "nameless", "PNG")
    (tmp_path / "b" / "notes.txt").write_text("no image")
    common = ["--classes", DIGITS, "--format", "jsonl"]
    found = [json.loads(line)["path"] for line in run("classify", tmp_path / "b", *common).stdout.splitlines()]
    assert found == [str(tmp_path / "b" / "c" / "deep.JPG"), str(tmp_path / "b" / "grey.png")]
    named = run("classify", tmp_path / "b" / "nameless", *common)
    assert json.loads(named.stdout)["path"] == str(tmp_path / "b" / "nameless")


def test_a_quoted_glob_is_expanded_in_order(pictures: Path) -> None:
    result = run("classify", pictures / "digits" / "t*" / "*.png", "--classes", DIGITS, "--format", "jsonl")
    found = [json.loads(line)["path"] for line in result.stdout.splitlines()]
    assert found == sorted(str(path) for name in ("two", "three") for path in (pictures / "digits" / name).iterdir())


def test_files_that_are_no_image_are_named_and_the_others_still_run(pictures: Path, tmp_path: Path) -> None:
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
    named = re.findall(r"^no image: (.*?): ", result.stderr, re.MULTILINE)
    assert named == [str(files[0]), str(files[2]), str(files[3])]
    assert "3 no image" in result.stderr


def test_grey_transparent_palette_and_cmyk_images_are_read(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "1", "LA"):
        Image.new(mode, (20, 20)).save(tmp_path / f"{mode}.png")
    Image.new("CMYK", (20, 20)).save(tmp_path / "CMYK.jpg")
    result = run("classify", tmp_path, "--classes", DIGITS, "--format", "jsonl")
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 6)


def test_folder_names_are_labels_and_the_accuracy_is_reported(pictures: Path) -> None:
    folder = pictures / "digits"
    result = run("classify", folder, "--classes", DIGITS, "--folder-labels", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert all(row["label"] == Path(row["path"]).parent.name for row in rows)
    right = sum(row["label"] == row["class"] for row in rows)
    assert f"accuracy {100 * right / len(rows):.2f} % ({right} of {len(rows)})" in result.stderr


def test_the_summary_names_images_speed_and_token_counts(pictures: Path) -> None:
    result = run("classify", pictures / "digits", "--classes", DIGITS, "--method", "evit")
    assert re.search(r"60 images in [\d.]+ s: [\d.]+ images/s end to end, [\d.]+ in the model", result.stderr)
    assert "EViT(keep=0.7" in result.stderr and "tokens 65→47→35→26" in result.stderr


def test_the_table_shows_paths_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "[red] :smile: [b].png"
    Image.new("RGB", (8, 8)).save(path)
    result = run("classify", path, "--classes", DIGITS)
    assert result.exit_code == 0
    assert "[red] :smile: [b].png" in result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not take arbitrary bytes as a file name")
def test_a_path_that_is_no_text_comes_back_byte_for_byte(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/\xff\xfe.png"
    with open(raw, "wb") as file:
        Image.new("RGB", (8, 8)).save(file, "PNG")
    result = run("classify", tmp_path, "--classes", DIGITS, "--format", "csv")
    assert result.exit_code == 0
    assert raw in result.stdout_bytes


def test_results_go_to_a_file_that_appears_whole(pictures: Path, tmp_path: Path) -> None:
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
    assert "expected a model that loads, got" in error(result)
    assert not (tmp_path / "sprung").exists()


def test_a_tower_that_cannot_be_served_runs_as_the_host_has_it(resnet: str, pictures: Path) -> None:
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
        ([], "expected --classes or --classes-file, got neither"),
        (["--classes", "a", "--template", "a photo"], "templates must hold {} in place of the class name"),
        (["--classes", "a", "--method", "evit", "--keep", "0"], "keep must be a number in (0, 1], got 0.0"),
        (["--classes", "a", "--method", "tome", "--r", "-1"], "r must be a non-negative int"),
        (
            ["--classes", "a", "--method", "tome", "--keep", "0.5"],
            "expected --method evit or patch-ranking with --keep, got tome",
        ),
        (["--classes", "a", "--r", "4"], "expected --method tome with --r, got no --method"),
        (["--classes", "a", "--method", "evit", "--blocks", "3,x"], "expected --blocks such as 3,6,9, got '3,x'"),
        (["--classes", "a", "--method", "evit", "--blocks", "6"], "blocks must be ints in [0, 5]"),
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
    found = json.loads(run("info", "--format", "json").stdout)
    assert found["versions"]["clipkernels"] == ck.__version__
    assert found["versions"]["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert found["devices"][0]["device"] == "cpu"
    for device in found["devices"]:
        assert (device["backend"], device["why"]) == ck.backend.explain(torch.device(device["device"]))


def test_a_backend_that_cannot_serve_is_one_line(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPKERNELS_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    result = run("classify", pictures / "digits", "--classes", DIGITS)
    said = "error: CLIPKERNELS_BACKEND=triton is set, but the tensors are on the CPU"
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith(said)


def test_the_commit_is_that_of_this_package_and_of_no_checkout_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPKERNELS_COMMIT", "given")
    said = {"rev-parse": str(Path(ck.__file__).parents[1]), "describe": "abc-dirty"}
    monkeypatch.setattr(environment, "_output", lambda *command: said.get(command[1]))
    assert environment.environment()["commit"] == "abc-dirty"
    said["rev-parse"] = str(tmp_path)
    assert environment.environment()["commit"] == "given"


def test_info_as_a_table_holds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPKERNELS_BACKEND", "reference")
    result = run("info")
    assert "CLIPKERNELS_BACKEND=reference is set" in result.stdout
    assert ck.__version__ in result.stdout


STREAM = ("--folder-labels", "--shuffle", 1, "--classes", DIGITS, "--adapt", "tca", "--format", "jsonl")


def test_a_stream_adapts_and_goes_on_from_its_file(pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "reservoir.safetensors"
    first = run("classify", pictures / "digits", *STREAM, "--reservoir", file, "--batch-size", 16)
    assert first.exit_code == 0, first.output
    remembered = int(re.search(r"mean entropy [0-9.]+, (\d+) images remembered", first.stderr)[1])
    assert "TCA(rate=0.035" in first.stderr and 10 < remembered <= 30
    # The same through the library, in the same order.
    paths = [json.loads(line)["path"] for line in first.stdout.splitlines()]
    assert paths != sorted(paths) and len(paths) == 60
    model, preprocess, tokenizer = ck.bundled()
    classifier = ck.Classifier(model, tokenizer, digits.CLASSES, method=ck.TCA(0.035), head=ck.Reservoir)
    images = torch.stack([preprocess(Image.open(path)) for path in paths])
    with torch.inference_mode():
        logits = torch.cat([classifier(batch) for batch in images.split(16)])
    came = [json.loads(line)["probability"] for line in first.stdout.splitlines()]
    assert came == pytest.approx(logits.softmax(1).amax(1).tolist(), abs=1e-4)
    again = run("classify", pictures / "digits", *STREAM, "--reservoir", file)
    assert f"{file}: goes on after 60 images, {remembered} remembered" in again.stderr
    assert again.stdout != first.stdout
    assert ck.Reservoir(classifier.head.zero_shot.text).load(file).seen == 120
    before = file.read_bytes()
    frozen = run("classify", pictures / "digits", *STREAM, "--reservoir", file, "--frozen")
    assert frozen.exit_code == 0 and file.read_bytes() == before


def test_a_stream_that_is_interrupted_keeps_what_it_learnt(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "reservoir.safetensors"
    see, calls = ck.Reservoir.__call__, []

    def interrupted(self: ck.Reservoir, features: ck.Encoded) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return see(self, features)

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
        (("--adapt", "tca", "--rate", 0.9), "valid rates are"),
        (("--adapt", "tca", "--method", "none"), "expected a method that condenses, reduces or is dense with --adapt"),
        (("--rate", 0.1), "expected --method tca with --rate, got no --method"),
        (("--method", "tome", "--blocks", "1"), "expected --method evit or tca with --blocks, got tome"),
    ],
)
def test_options_that_do_not_fit_a_stream_are_named(options: tuple[object, ...], message: str, pictures: Path) -> None:
    assert message in error(run("classify", pictures / "digits", "--classes", DIGITS, *options))


def test_tca_condenses_without_adapting_where_asked_to(pictures: Path) -> None:
    result = run("classify", pictures / "digits", "--classes", DIGITS, "--method", "tca", "--rate", 0.1)
    assert result.exit_code == 0 and "TCA(rate=0.1" in result.stderr and "remembered" not in result.stderr
