"""The code in README and CONTRIBUTING runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

import clipkernels as ck
from clipkernels.cli.parts.demo_images import QUICK, draw, save

ROOT = Path(__file__).parents[2]


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_every_python_block_runs_after_those_before_it(name, tmp_path, monkeypatch):
    if name == "README.md":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed, by which torch exports to ONNX")
        pytest.importorskip("faiss", reason="faiss-cpu is not installed")
        save({"digits": draw(QUICK, seed=0)["digits"]}, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    scope = {}
    assert blocks(name)
    for block in blocks(name):
        exec(block, scope)


@torch.no_grad()
def test_the_method_in_fifteen_lines_drops_five_patches_per_block(images):
    scope = {}
    exec(blocks("CONTRIBUTING.md")[0], scope)
    plan = scope["Taper"](5).plan(tokens=65, blocks=6)
    assert plan.tokens == (65, 60, 55, 50, 45, 40, 35)
    encoded = ck.encode_image(scope["model"], images, tokens=True, source=True)
    assert encoded.tokens.shape == (3, 35, 128)
    assert ((encoded.source >= 0).sum(-1) == torch.tensor([59, 54, 49, 44, 39, 34])).all()
    definition = blocks("CONTRIBUTING.md")[0].split("@dataclass")[1].split("model, preprocess")[0]
    assert sum(bool(line.strip()) for line in definition.splitlines()) <= 15


def test_the_readme_says_how_many_tokens_leave():
    entered, left = map(int, re.search(r"(\d+) tokens enter, (\d+) leave", blocks("README.md")[0]).groups())
    plan = ck.EViT(keep=0.7).plan(tokens=65, blocks=6)
    assert (plan.tokens[0], plan.tokens[-1]) == (entered, left)
