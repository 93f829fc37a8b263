"""`clipkernels classify --head`: the answers of the heads themselves, and options that do not belong together."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import torch
from click.testing import Result
from PIL import Image

import clipkernels as ck
from clipkernels import support
from clipkernels.cli.parts.demo_images import QUICK, draw, save
from clipkernels.data import digits
from tests.cli import commands
from tests.cli.commands import error

DIGITS = ",".join(digits.CLASSES)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick demo's digits, a folder per class."""
    folder = tmp_path_factory.mktemp("pictures")
    save({"digits": draw(QUICK, seed=0)["digits"]}, folder)
    return folder / "digits"


@pytest.fixture(scope="module")
def known(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A support set of these digits, its classes in another order than their folders."""
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    folder = tmp_path_factory.mktemp("support")
    prompts = support.photo(digits.CLASSES, digits.TEMPLATES)
    model, preprocess, tokenizer = ck.bundled()
    cache = folder / "cache.safetensors"
    built = support.retrieve(model, preprocess, tokenizer, prompts, pictures, per_class=4, cache=cache, shared=True)
    built.save(folder / "set")
    return folder / "set"


def run(*arguments: object) -> Result:
    return commands.run("classify", *arguments)


def expected(pictures: Path, head: ck.heads.Head, model: torch.nn.Module) -> tuple[list[str], torch.Tensor]:
    """Return the files in order and the probabilities (n,K) of their classes."""
    preprocess = ck.bundled()[1]
    files = sorted(pictures.rglob("*.png"))
    images = torch.stack([preprocess(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        return [str(file) for file in files], head(ck.encode_image(model, images, tokens=True)).softmax(1)


@pytest.mark.parametrize("method", ["dense", "evit:0.5"])
@pytest.mark.parametrize("head", ["zero-shot", "calip", "tip", "tipx"])
def test_answers_are_those_of_the_head(pictures: Path, known: Path, head: str, method: str) -> None:
    options = ("--support", known) if head.startswith("tip") else ("--classes", DIGITS, "--template", "{}")
    result = run(pictures, "--head", head, *options, "--method", method, "--format", "csv")
    assert result.exit_code == 0, result.stderr
    model, _, tokenizer = ck.bundled()
    ck.patch(model, ck.Dense() if method == "dense" else ck.EViT(0.5))
    known_set = support.SupportSet.load(known, model)
    text = support.class_embeddings(
        model, tokenizer, known_set.prompts if head.startswith("tip") else support.photo(digits.CLASSES, ("{}",))
    )
    makers = {
        "zero-shot": lambda: ck.ZeroShot(text, model.logit_scale.exp().item()),
        "calip": lambda: ck.CALIP(text),
        "tip": lambda: ck.TipAdapter(text, known_set.features, known_set.labels),
        "tipx": lambda: ck.TipX(text, known_set.features, known_set.labels),
    }
    files, probabilities = expected(pictures, makers[head](), model)
    rows = {row["path"]: row for row in csv.DictReader(io.StringIO(result.stdout))}
    assert sorted(rows) == files
    for file, row in zip(files, probabilities, strict=True):
        assert rows[file]["class"] == digits.CLASSES[int(row.argmax())]
        assert float(rows[file]["probability"]) == pytest.approx(float(row.max()), abs=1e-4)


def test_a_preset_changes_the_answers_of_calip(pictures: Path) -> None:
    options = (pictures, "--head", "calip", "--classes", DIGITS, "--format", "csv")
    assert run(*options).stdout != run(*options, "--preset", "eurosat").stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--head", "tip", "--classes", DIGITS), "expected --support with --head tip, got none"),
        (("--head", "calip", "--adapt", "tca", "--classes", DIGITS), "expected --adapt or --head, got both"),
        (("--head", "calip", "--preset", "imagenet_a", "--classes", "a"), "expected --preset to be one of caltech101"),
        (("--head", "tip", "--preset", "dtd", "--support", "KNOWN"), "expected --adapt or --head calip with --preset"),
        (("--support", "KNOWN"), "expected --head tip or tipx with --support, got none"),
        (("--head", "tipx", "--support", "KNOWN", "--classes", "a,b"), "(zero, one, two,"),
        (("--head", "tipx", "--support", "PICTURES"), "manifest.json"),
        (("--head", "calip"), "expected --classes or --classes-file, got neither"),
    ],
)
def test_options_that_do_not_belong_together_are_one_line(
    pictures: Path, known: Path, options: tuple[str, ...], message: str
) -> None:
    places = {"KNOWN": str(known), "PICTURES": str(pictures)}
    result = run(pictures, *(places.get(option, option) for option in options))
    assert message in error(result)
