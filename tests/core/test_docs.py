"""The code in README, CONTRIBUTING and docs/ runs as printed, and its numbers are those of the results."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from PIL import Image

import clipkernels as ck
from bench import readme_picture, speed_picture
from bench.gpu.report import BEGIN, END, NOTHING
from bench.readme_picture import PICTURE
from bench.speed_picture import ROWS
from clipkernels.cli import main
from clipkernels.cli.parts.demo_images import QUICK, draw, save
from clipkernels.cli.parts.methods import GRAMMARS

ROOT = Path(__file__).parents[2]
GUIDES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
# Extra packages that a block needs, by a word in the block.
PACKAGES = {"ck.export": "onnxscript", "torch.onnx": "onnxscript", "support.retrieve": "faiss", "from peft": "peft"}
PACKAGES |= {"duckdb": "duckdb", '"collection"': "pyarrow", "ck.search": "faiss"}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
# As deep as the real tower and with as many tokens, but narrow.
B16 = {"image_size": 224, "layers": 12, "width": 64, "patch_size": 16}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(name), flags=re.S)


PYTHON = [pytest.param(block, id=f"{name}-{at}") for name in GUIDES for at, block in enumerate(blocks(name))]
COMMANDS = [
    line
    for name in GUIDES
    for block in blocks(name, "sh")
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("clipkernels ")
]


@pytest.fixture
def guide_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with photos/, where open_clip has no weights to download and small models of known names."""
    import open_clip

    create = open_clip.create_model_and_transforms

    def with_random_weights(name: str, pretrained: str | None = None, **options: Any) -> Any:
        assert pretrained in open_clip.list_pretrained_tags_by_model(name)
        return create(name, **options)

    configs = open_clip.factory._MODEL_CONFIGS
    monkeypatch.setitem(configs, "ViT-B-16", {"embed_dim": 512, "vision_cfg": B16, "text_cfg": TEXT})
    monkeypatch.setitem(configs, "RN50", {"embed_dim": 32, "vision_cfg": RESNET, "text_cfg": TEXT})
    monkeypatch.setattr(open_clip, "create_model_and_transforms", with_random_weights)
    save({"digits": draw(QUICK, seed=0)["digits"]}, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("block", PYTHON)
def test_a_python_block_of_the_guides_runs_alone(block: str, guide_folder: None) -> None:
    for word, package in PACKAGES.items():
        if word in block:
            pytest.importorskip(package, reason=f"{package} is not installed")
    if "hand_over" in block:
        pytest.importorskip("transformers", "5.23", reason="transformers 5.23 or later is not installed")
    if "collection" in block and "ck.embed" not in block:
        model, preprocess, _ = ck.bundled()
        Path("photos", "broken.png").write_bytes(b"no image")
        ck.embed(model, ["photos"], "collection", preprocess=preprocess)
        shutil.copy(next(Path("photos", "digits").rglob("*.png")), "query.png")
    exec(block, {})


def test_the_six_lines_of_the_readme_say_how_many_tokens_leave(guide_folder: None) -> None:
    (block,) = blocks("README.md")
    scope: dict[str, Any] = {}
    exec(block, scope)
    entering, leaving = map(int, re.search(r"(\d+) tokens enter, (\d+) leave", block).groups())  # type: ignore[union-attr]
    (method,) = re.findall(r"ck\.patch\(model, (.*?\))\)", block)
    ck.patch(scope["model"], eval(method, scope))
    tokens = ck.encode_image(scope["model"], scope["images"], tokens=True).tokens
    assert tokens is not None and tokens.shape[1] == leaving
    assert ck.tower_of(scope["model"]).num_tokens == entering
    assert tuple(scope["features"].shape) == (8, 512)


@torch.no_grad()
def test_the_method_in_fifteen_lines_drops_five_patches_per_block(images: torch.Tensor) -> None:
    scope: dict[str, Any] = {}
    exec(blocks("CONTRIBUTING.md")[0], scope)
    plan = scope["Taper"](5).plan(tokens=65, blocks=6)
    assert plan.tokens == (65, 60, 55, 50, 45, 40, 35)
    encoded = ck.encode_image(scope["model"], images, tokens=True, source=True)
    assert encoded.tokens is not None and encoded.tokens.shape == (3, 35, 128)
    assert encoded.source is not None
    assert ((encoded.source >= 0).sum(-1) == torch.tensor([59, 54, 49, 44, 39, 34])).all()
    definition = blocks("CONTRIBUTING.md")[0].split("@dataclass")[1].split("model, preprocess")[0]
    assert sum(bool(line.strip()) for line in definition.splitlines()) <= 15


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_guides_has_options_that_exist(command: str) -> None:
    words = shlex.split(command, comments=True)[1:]
    verb: click.Command | None = main
    while isinstance(verb, click.Group):
        verb = verb.get_command(click.Context(verb), words.pop(0))
    assert verb is not None
    names = {name for parameter in verb.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= names | {"--help"}
    for option, value in pairwise(words):
        if option == "--method":
            assert value.endswith(".json") or value.partition(":")[0] in GRAMMARS


def test_the_make_targets_of_the_guides_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), flags=re.M))
    for name in GUIDES:
        named = re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", text_of(name), flags=re.M)
        assert {first or second for first, second in named} <= targets


@pytest.mark.parametrize("name", [*GUIDES, "bench/results/README.md", "bench/results/amd-epyc-2-cores/README.md"])
def test_every_link_inside_the_repository_resolves(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text_of(name), flags=re.S)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_the_readme_is_read_in_a_minute() -> None:
    readme = text_of("README.md")
    assert len(readme.splitlines()) <= 130
    assert len(readme.split()) <= 900
    assert PICTURE.stat().st_size < 100_000
    assert f"](docs/{PICTURE.name})" in readme


def test_the_table_of_the_readme_has_the_measured_numbers() -> None:
    speed = {row["variant"]: row for row in _rows(ROWS) if row["batch"] == "8"}
    accuracy = {row["method"]: row for row in _rows(ROWS.parent / "classify.csv")}
    rows = re.findall(r"^\| (?:`ck\.(.*?)`|(open_clip as it is)) \|(.*)\|$", text_of("README.md"), flags=re.M)
    assert len(rows) == len(speed) - 1  # the host is timed twice
    for method, host, cells in rows:
        tokens, speedup, bundled = (cell.strip() for cell in cells.split("|"))
        measured = speed["dense (host)" if host else method.replace("predictor, ", "")]
        assert (tokens, speedup) == (measured["tokens"].split()[-1], f"×{float(measured['speedup']):.2f}")
        if "%" in bundled:
            same_method = re.search(r"`(r=\d+)`", bundled)
            result = accuracy[re.sub(r"r=\d+", same_method.group(1), method) if same_method else method]
            assert bundled.split()[0].rstrip(",") == result["tokens"]
            assert bundled.endswith(f"{100 * float(result['accuracy']):.1f} %")


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_no_table_begins_with_a_method_that_loses_much(name: str) -> None:
    rows = re.findall(r"^\| `(?:ck\.)?(\w+)\(.*[ (](\d+\.\d) % \|$", text_of(name), flags=re.M)
    (_, dense), *reduced = [(method, float(accuracy)) for method, accuracy in rows]
    losses = [dense - accuracy for _, accuracy in reduced]
    assert rows[0][0] == "Dense" and len(losses) == 5
    assert losses[0] < 2 and losses[0] < max(losses) / 5


def test_the_chart_is_drawn_from_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr("sys.argv", ["speed_picture", "--batch", "1", "--out", str(tmp_path / "picture.png")])
    speed_picture.main()
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    (row,) = (row for row in _rows(ROWS) if row["variant"] == "EViT(keep=0.7)" and row["batch"] == "8")
    dot = speed_picture.dot_of(row)
    assert (dot.entering, dot.leaving) == (197, 72)
    # The ideal line follows the GMACs except for attention, which is not proportional to the tokens.
    assert 1 / dot.share == pytest.approx(float(row["ideal_speedup"]), rel=0.01)
    monkeypatch.setattr("sys.argv", ["speed_picture", "--batch", "7"])
    with pytest.raises(SystemExit, match="expected rows of batch 7"):
        speed_picture.main()


def test_the_picture_of_the_readme_is_drawn_by_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["readme_picture", "--out", str(tmp_path / "kept.png")])
    readme_picture.main()
    committed, drawn = (np.array(Image.open(path)) for path in (PICTURE, tmp_path / "kept.png"))
    assert committed.shape == drawn.shape
    # Where two patches are almost equally good, another version of torch may keep the other one.
    assert (committed == drawn).all(-1).mean() > 0.9


def test_the_readme_says_that_no_gpu_was_measured_until_one_was() -> None:
    summary = text_of("docs/results.md").partition(BEGIN)[2].partition(END)[0]
    assert ("GPU figures: none yet" in text_of("README.md")) == (summary == f"\n{NOTHING}")


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))
