"""The scripts in examples/ run without arguments, and with a model and an image of the user's."""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipkernels.data import scenes

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
# Each starts another library or exports a graph; `make test-all` runs them.
SLOW = {"lora", "onnx_export", "sentence_transformers_search", "torchao_int8"}
# Arguments that shorten a run.
QUICK = {"lora": ["--steps", "2"], "timm_features": ["--rounds", "1"]}
NEEDED = {"open_clip": "open_clip_torch", "sentence_transformers": "sentence-transformers", "faiss": "faiss-cpu"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run an example with arguments, in an empty folder; return its output."""

    def run_example(name: str, *arguments: str) -> str:
        path = EXAMPLES / f"{name}.py"
        for package in packages_of(path):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{NEEDED.get(package, package)} is not installed")
        if name == "llava_prompt":
            pytest.importorskip("transformers", "5.23", reason="transformers 5.23 or later is not installed")
        if name == "onnx_export":
            pytest.importorskip("onnxscript", reason="onnxscript is not installed")
            if torch.__version__.startswith("2.6."):
                pytest.skip("torch 2.6 exports a graph that onnxruntime runs only at the batch size of the trace")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        torch.manual_seed(0)
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def packages_of(path: Path) -> set[str]:
    """Return the packages that a script imports."""
    imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = [
        alias.name if isinstance(node, ast.Import) else str(node.module) for node in imports for alias in node.names
    ]
    return {module.partition(".")[0] for module in modules}


def marked(names):
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


@pytest.mark.parametrize("name", marked(NAMES))
def test_an_example_runs_without_a_model_or_images(name, run):
    assert run(name, *QUICK.get(name, ()))


@pytest.mark.parametrize("name", marked(["open_clip_zero_shot", "own_method", "torchao_int8", "onnx_export"]))
def test_an_example_takes_a_model_and_an_image(name, run, registered, tmp_path):
    Image.fromarray(scenes.draw(1, seed=0).images[0]).save(tmp_path / "picture.png")
    picture = [] if name == "onnx_export" else ["picture.png"]
    assert run(name, *picture, "--model", registered)


@pytest.mark.slow
def test_lora_trains_on_a_folder_per_class(run, registered, tmp_path):
    for index, color in enumerate(("red", "blue", "red")):
        file = tmp_path / color / f"{index}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), color).save(file)
    output = run("lora", str(tmp_path), "--model", registered, "--steps", "1")
    assert re.search(r"step 1: loss .*\nheld-out accuracy before: .*\nheld-out accuracy after: (0|100)\.0%\n", output)


@pytest.mark.slow
def test_lora_improves_the_accuracy_on_held_out_scenes(run):
    before, after = map(float, re.findall(r"held-out accuracy \w+: (.*)%", run("lora")))
    assert after >= before + 2


def test_zero_shot_names_drawn_scenes_before_and_after(run):
    output = run("open_clip_zero_shot")
    assert "65 tokens enter, 41 leave" in output
    guesses = re.findall(r"a drawn (.*): dense (.*) \(.*, reduced (.*) \(", output)
    assert len(guesses) == 8
    assert sum(label == dense == reduced for label, dense, reduced in guesses) >= 7


def test_the_own_method_maps_as_many_patches_as_it_keeps(run):
    output = run("own_method", "--keep", "12")
    legend, *rows = output.splitlines()
    assert legend == "12 of 64 patches survive (#):"
    assert [len(row.split()) for row in rows] == [8] * 8
    assert sum(row.count("#") for row in rows) == 12


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_enough_to_read(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60
