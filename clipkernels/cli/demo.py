"""`clipkernels demo`: what each method costs, saves and loses, on the bundled model and one full-size tower."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import click
import numpy as np
import torch
from PIL import Image
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from clipkernels.classifier import Classifier
from clipkernels.cli.parts.methods import choose_methods
from clipkernels.cli.parts.output import opened, progress, quietly, schedule, write_table
from clipkernels.data import bundled, digits, scenes
from clipkernels.files import write_csv
from clipkernels.measure.environment import environment
from clipkernels.measure.timing import Speed, tabulate, time_variants, vary
from clipkernels.patching import patched, tower_of

HELD_OUT_SEED = 1_000_000
METHODS = 5
BATCH = 128
KINDS = ("digits", "scenes_seen", "scenes_unseen")
NOTES = (
    "dense (host) is open_clip's own forward. Speed-ups and η are against the faster of the two dense rows, paired "
    "within rounds of all rows in random order; images/s are medians.",
    "GMACs and ideal count the published schedule; η = speed-up ÷ (GMACs that the dense baseline ran ÷ GMACs that the "
    "row ran). Where only CLS is pooled every row but dense (host) runs the last block for CLS alone, and η counts it "
    "so for each side that did.",
    "Accuracy is zero-shot, choosing among 10 captions for digits and 64 for scenes; unseen are colour-shape pairs "
    "never trained on. same: images that get the class that dense (host) gives.",
)


class Size(NamedTuple):
    """How much the demo measures."""

    digits: int
    scenes: int
    unseen: int
    batch: int
    rounds: int
    full_batch: int
    full_rounds: int


FULL = Size(digits=899, scenes=640, unseen=320, batch=64, rounds=15, full_batch=8, full_rounds=5)
QUICK = Size(digits=60, scenes=40, unseen=20, batch=8, rounds=2, full_batch=1, full_rounds=1)


class Row(NamedTuple):
    """One method on one model; accuracy per kind and agreement with dense where the model can tell images apart."""

    model: str
    speed: Speed
    accuracy: Mapping[str, float]
    agreement: float | None

    def record(self) -> dict[str, Any]:
        """The row as plain numbers."""
        return {
            "model": self.model,
            **self.speed.record(),
            **{kind: self.accuracy.get(kind) for kind in KINDS},
            "agreement": self.agreement,
        }


class Pictures(NamedTuple):
    """One data set: raw images (n,32,32,3) uint8, their labels (n,), and the prompts."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    templates: tuple[str, ...]


EXAMPLE = """\b
Example:
  clipkernels demo --quick --format csv --output demo.csv
"""


@click.command(epilog=EXAMPLE)
@click.option("--model", default="ViT-B-16", show_default=True, help="Full-size open_clip tower, or none.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads  [default: torch's choice]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of images, weights and order.")
@click.option("--quick", is_flag=True, help="Few images and rounds: shows that all of it runs, measures nothing.")
@click.option("--save-images", type=click.Path(file_okay=False), help="Also write the images here, a folder per class.")
@click.option("--format", "form", type=click.Choice(["table", "json", "csv"]), default="table", show_default=True)
@click.option("--output", type=click.Path(), help="Write here instead of to stdout.")
def demo(
    model: str,
    threads: int | None,
    seed: int,
    quick: bool,
    save_images: str | None,
    form: str,
    output: str | None,
) -> None:
    """Speed and accuracy of every method, with nothing downloaded.

    The small CLIP that ships with the package names held-out digits and scenes; one full-size tower with random
    weights shows the speed, since the small one has too few tokens to.
    """
    import open_clip  # here, so that the other verbs need none of it

    if model != "none" and model not in open_clip.list_models():
        raise click.UsageError(f"expected --model to be none or one of open_clip's models, got {model!r}")
    size = QUICK if quick else FULL
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        full = None if model == "none" else load_full(model, seed)
        with opened(output) as stream, progress() as bar:
            pictures = draw(size, seed)
            if save_images:
                save(pictures, Path(save_images))
            batches = sum(-(-len(kind.labels) // BATCH) for kind in pictures.values())
            rounds = (size.rounds + 1) + (size.full_rounds + 1 if full is not None else 0)
            task = bar.add_task("measuring", total=METHODS * (batches + rounds))
            step = partial(bar.advance, task)
            tables = {"bundled": bundled_rows(pictures, size, seed, step)}
            if full is not None:
                tables[model] = full_rows(model, full, size, seed, step)
            write(tables, form, stream)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    finally:
        torch.set_num_threads(before)


def draw(size: Size, seed: int) -> dict[str, Pictures]:
    """The images of every kind in KINDS, none of which the bundled model was trained on."""
    seed += HELD_OUT_SEED
    drawn = (
        digits.draw(size.digits, seed),
        scenes.draw(size.scenes, seed),
        scenes.draw(size.unseen, seed, tuple(sorted(scenes.UNSEEN))),
    )
    prompts = ((digits.CLASSES, digits.TEMPLATES), *[(scenes.CLASSES, scenes.TEMPLATES)] * 2)
    return {kind: Pictures(*images, *prompt) for kind, images, prompt in zip(KINDS, drawn, prompts, strict=True)}


def save(pictures: Mapping[str, Pictures], folder: Path) -> None:
    """The images as folder/kind/class/number.png."""
    for kind, (images, labels, classes, _) in pictures.items():
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / kind / classes[label] / f"{index:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


def bundled_rows(pictures: Mapping[str, Pictures], size: Size, seed: int, step: Callable[[], object]) -> list[Row]:
    """Speed, accuracy and agreement with dense of the bundled model, one row per method."""
    model, preprocess, tokenizer = bundled()
    tower = tower_of(model)
    methods = choose_methods(tower)
    images = {
        kind: torch.stack([preprocess(Image.fromarray(image)) for image in drawn.images])
        for kind, drawn in pictures.items()
    }
    everything = torch.cat(list(images.values())).split(size.batch)
    batches = [batch for batch in everything if len(batch) == size.batch][:4]
    variants = vary(model, methods)
    times = time_variants(variants, batches, size.rounds, seed=seed, progress=step)
    classifiers = {
        kind: Classifier(model, tokenizer, drawn.classes, drawn.templates) for kind, drawn in pictures.items()
    }
    rows: list[Row] = []
    reference: dict[str, np.ndarray] = {}
    for speed in tabulate(times, variants, tower, size.batch):
        method = methods[speed.name]
        with patched(model, method) if method else nullcontext():
            predicted = {kind: predict(classifiers[kind], images[kind], step) for kind in KINDS}
        reference = reference or predicted
        right = {kind: float(np.mean(predicted[kind] == pictures[kind].labels)) for kind in KINDS}
        same = np.concatenate([predicted[kind] == reference[kind] for kind in KINDS])
        rows.append(Row("bundled", speed, right, float(np.mean(same))))
    return rows


def load_full(name: str, seed: int) -> nn.Module:
    """An open_clip model with random weights.

    Raises:
        UnsupportedTower: its tower cannot be patched.
    """
    import open_clip

    torch.manual_seed(seed)
    with quietly():
        model = open_clip.create_model(name, pretrained_text=False).eval()
    tower_of(model)
    return model


def full_rows(name: str, model: nn.Module, size: Size, seed: int, step: Callable[[], object]) -> list[Row]:
    """Speed of a full-size tower on random images, one row per method."""
    tower = tower_of(model)
    batches = torch.randn(2, size.full_batch, 3, *tower.image_size).unbind()
    variants = vary(model, choose_methods(tower))
    times = time_variants(variants, batches, size.full_rounds, seed=seed, progress=step)
    return [Row(name, speed, {}, None) for speed in tabulate(times, variants, tower, size.full_batch)]


@torch.inference_mode()
def predict(classifier: Classifier, images: Tensor, step: Callable[[], object]) -> np.ndarray:
    """Index of the class of every image (n,)."""
    found = []
    for batch in images.split(BATCH):
        found.append(classifier(batch).argmax(1))
        step()
    return torch.cat(found).numpy()


def write(tables: Mapping[str, Sequence[Row]], form: str, stream: TextIO) -> None:
    """All rows: as tables with their notes, as JSON with the environment, or as CSV."""
    records = [row.record() for table in tables.values() for row in table]
    if form == "csv":
        write_csv(records, stream)
    elif form == "json":
        json.dump({"environment": environment(), "rows": records, "notes": NOTES}, stream, indent=2)
        stream.write("\n")
    else:
        for name, rows in tables.items():
            write_table(draw_table(name, rows), stream)
        stream.write("\n".join(NOTES) + "\n")


def draw_table(name: str, rows: Sequence[Row]) -> Table:
    """One model's rows for people."""
    scored = rows[0].agreement is not None
    title = "the bundled CLIP, 32×32" if scored else f"{name}, random weights"
    threads = torch.get_num_threads()
    header = ["method", "tokens", "GMACs", "ideal", "images/s", "speed-up", "η"]
    table = Table(title=f"{title}, fp32, {threads} thread{'s' * (threads > 1)}", title_justify="left")
    for column in header + (["digits", "seen", "unseen", "same"] if scored else []):
        table.add_column(column, justify="left" if column in ("method", "tokens") else "right")
    for row in rows:
        speed = row.speed
        cells = [
            speed.name,
            schedule(speed.tokens),
            f"{speed.gmacs:.{2 if speed.gmacs > 1 else 4}f}",
            f"×{speed.ideal:.2f}",
            f"{speed.images_per_second:.{0 if speed.images_per_second > 100 else 1}f}",
            f"×{speed.speedup.median:.2f}",
            f"{speed.efficiency.median:.2f}",
        ]
        if row.agreement is not None:
            cells += [f"{100 * share:.1f} %" for share in (*row.accuracy.values(), row.agreement)]
        table.add_row(*map(Text, cells))
    return table
