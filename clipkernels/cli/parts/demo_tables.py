"""The measurements of `clipkernels demo`, and their tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import click
import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor, nn

from clipkernels.artefacts.header import is_artefact
from clipkernels.classifier import Classifier
from clipkernels.cli.parts import demo_images
from clipkernels.cli.parts.demo_images import KINDS, LabelledImages, Size, draw, save
from clipkernels.cli.parts.methods import default_methods, methods_for
from clipkernels.cli.parts.models import LIBRARIES, cast_towers, load
from clipkernels.cli.parts.output import method_table, opened, progress, quietly, schedule, write_results
from clipkernels.comparison.towers import DTYPES
from clipkernels.data import bundled
from clipkernels.measure.environment import environment
from clipkernels.measure.timing import HOST, Speed, Times, Variant, tabulate, time_variants, vary
from clipkernels.patching import method_of, patched, tower_of, unpatch

METHODS = 5
BATCH = 128
REPEATED = "dense (host), repeated"
"""The host's own forward, timed a second time to measure how much the machine's speed varies."""
MAX_DIFFERENCE = 0.1
NOTES = (
    "dense (host) is open_clip's own forward. Speed-ups and η are against the faster of the two dense rows, paired "
    "within rounds of all rows in random order; images/s is that dense row's times the speed-up.",
    "GMACs and ideal count the published schedule; η = speed-up ÷ (GMACs that the dense baseline ran ÷ GMACs that the "
    "row ran). Where only CLS is pooled every row but dense (host) runs the last block for CLS alone, and η counts the "
    "GMACs of both sides accordingly.",
    "Accuracy is zero-shot, among 10 captions for digits and 64 for scenes; unseen are colour-shape pairs that are not "
    "in the training data. same: images that get the same class as with dense (host). Below the dense rows the method "
    "with the largest share of these comes first.",
    "These images are drawn. On photographs the order is another: of 5000 of CIFAR-10's, the bundled model classifies "
    "75.3 % correctly, with ToMe(r=7) 73.5 %, with EViT(keep=0.7) 67.3 %, with EViT(keep=0.5) 55.3 %.",
)


class Row(NamedTuple):
    """One method on one model; accuracy per kind and agreement with dense where the model is trained."""

    model: str
    precision: str
    speed: Speed
    accuracy: Mapping[str, float]
    agreement: float | None

    def record(self) -> dict[str, Any]:
        """Return the row as plain numbers."""
        return {
            "model": self.model,
            "precision": self.precision,
            **self.speed.record(),
            **{kind: self.accuracy.get(kind) for kind in KINDS},
            "agreement": self.agreement,
        }


def run(
    name: str,
    threads: int | None,
    precision: str,
    seed: int,
    quick: bool,
    save_images: str | None,
    form: str,
    output: str | None,
) -> None:
    """Measure everything and write it; the arguments are the options of `clipkernels demo`.

    Raises:
        click.UsageError: a tower that open_clip does not have or that cannot be patched, or a file that cannot be
            written.
    """
    import open_clip  # after the demo's first line, because it takes seconds

    if name != "none" and not is_artefact(name) and name not in open_clip.list_models():
        expected = "expected --model to be none, a folder of ck.save or one of open_clip's models"
        raise click.UsageError(f"{expected}, got {name!r}")
    size = demo_images.QUICK if quick else demo_images.FULL
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        full = None if name == "none" else load_full(name, seed)
        with opened(output) as stream, progress() as bar:
            pictures = draw(size, seed)
            if save_images:
                save(pictures, Path(save_images))
            batches = sum(-(-len(kind.labels) // BATCH) for kind in pictures.values())
            rounds = (size.rounds + 1) + (size.full_rounds + 1 if full is not None else 0)
            task = bar.add_task("measuring", total=METHODS * batches + (METHODS + 1) * rounds)
            step = partial(bar.advance, task)
            tables = {"bundled": bundled_rows(pictures, size, precision, seed, step)}
            if full is not None:
                tables[name] = full_rows(name, full, size, precision, seed, step)
            write(tables, form, stream)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    finally:
        torch.set_num_threads(before)


def bundled_rows(
    pictures: Mapping[str, LabelledImages], size: Size, precision: str, seed: int, step: Callable[[], object]
) -> list[Row]:
    """Return speed, accuracy and agreement with dense of the bundled model, one row per method.

    The dense rows come first, then the others, those that agree most first.
    """
    model, preprocess, tokenizer = bundled()
    dtype = DTYPES[precision]
    model = cast_towers(model, torch.device("cpu"), dtype)
    tower = tower_of(model)
    methods = default_methods(tower)
    images = {
        kind: torch.stack([preprocess(Image.fromarray(image)) for image in labelled.images]).to(dtype)
        for kind, labelled in pictures.items()
    }
    splits = torch.cat(list(images.values())).split(size.batch)
    batches = [batch for batch in splits if len(batch) == size.batch][:4]
    variants = vary(model, methods)
    times = time_with_repeat("the bundled CLIP", variants, batches, size.rounds, seed, step)
    classifiers = {
        kind: Classifier(model, tokenizer, labelled.classes, labelled.templates) for kind, labelled in pictures.items()
    }
    rows: list[Row] = []
    reference: dict[str, np.ndarray] = {}
    for speed in tabulate(times, variants, tower, size.batch):
        method = methods[speed.name]
        with patched(model, method) if method else nullcontext():
            predicted = {kind: predict(classifiers[kind], images[kind], step) for kind in KINDS}
        reference = reference or predicted
        accuracy = {kind: float(np.mean(predicted[kind] == pictures[kind].labels)) for kind in KINDS}
        same = np.concatenate([predicted[kind] == reference[kind] for kind in KINDS])
        rows.append(Row("bundled", precision, speed, accuracy, float(np.mean(same))))
    return sorted(rows, key=lambda row: (len(set(row.speed.tokens)) > 1, -(row.agreement or 0)))


def load_full(name: str, seed: int) -> nn.Module:
    """Return the model of a folder of `ck.save`, or an open_clip model with random weights.

    Raises:
        UnsupportedTower: its tower cannot be patched.
    """
    import open_clip

    if is_artefact(name):
        return load(LIBRARIES[0], name, None).model
    torch.manual_seed(seed)
    with quietly():
        model = open_clip.create_model(name, pretrained_text=False).eval()
    tower_of(model)
    return model


def full_rows(
    name: str, model: nn.Module, size: Size, precision: str, seed: int, step: Callable[[], object]
) -> list[Row]:
    """Return the speed of a full-size tower on random images, one row per method; a folder's own is the only one."""
    model = cast_towers(model, torch.device("cpu"), DTYPES[precision])
    tower = tower_of(model)
    batches = torch.randn(2, size.full_batch, 3, *tower.image_size).to(DTYPES[precision]).unbind()
    methods = methods_for(tower, (), None, None, method_of(model))
    variants = vary(unpatch(model), methods)
    times = time_with_repeat(name, variants, batches, size.full_rounds, seed, step)
    return [Row(name, precision, speed, {}, None) for speed in tabulate(times, variants, tower, size.full_batch)]


def time_with_repeat(
    name: str,
    variants: Mapping[str, Variant],
    batches: Sequence[Tensor],
    rounds: int,
    seed: int,
    step: Callable[[], object],
) -> Times:
    """Return the times of all variants and of a repetition of dense (host).

    A warning on stderr says so if the two differ by more than 10 %: by their paired ratio, as speed-ups are taken.
    """
    with_repeat = {**variants, REPEATED: variants[HOST]}
    times = time_variants(with_repeat, batches, rounds, seed=seed, progress=step)
    ratio = times.ratio(REPEATED, HOST).median
    difference = max(ratio, 1 / ratio) - 1
    if difference > MAX_DIFFERENCE:
        line = (
            f"two timings of dense (host) differ by {100 * difference:.0f} %; speed-ups are no more precise than that"
        )
        click.echo(f"warning: {name}: {line}: repeat on an idle machine", err=True)
    return times


@torch.inference_mode()
def predict(classifier: Classifier, images: Tensor, step: Callable[[], object]) -> np.ndarray:
    """Return the index of the likeliest class of every image (n,)."""
    predicted = []
    for batch in images.split(BATCH):
        predicted.append(classifier(batch).argmax(1))
        step()
    return torch.cat(predicted).numpy()


def write(tables: Mapping[str, Sequence[Row]], form: str, stream: TextIO) -> None:
    """Write all rows: tables with notes, JSON with the environment, or CSV."""
    records = [row.record() for table in tables.values() for row in table]
    document = {"environment": environment(), "rows": records, "notes": NOTES}
    write_results(form, stream, records, document, lambda: draw_tables(tables))


def draw_tables(tables: Mapping[str, Sequence[Row]]) -> Iterator[Table | str]:
    """Yield a table of speed per model, one of accuracy where there is any, and the notes."""
    threads = torch.get_num_threads()
    for name, rows in tables.items():
        scored = rows[0].agreement is not None
        weights = "saved" if is_artefact(name) else "random"
        title = "The bundled CLIP, 32×32" if scored else f"{name}, {weights} weights"
        yield draw_speed(f"{title}, {rows[0].precision}, {threads} thread{'s' * (threads > 1)}", rows)
        if scored:
            yield draw_accuracy(rows)
    yield from NOTES


def draw_speed(title: str, rows: Sequence[Row]) -> Table:
    """Return the table of one model's cost and speed."""
    return method_table(
        title,
        ("tokens", "GMACs", "ideal", "images/s", "speed-up", "η"),
        [
            (
                row.speed.name,
                schedule(row.speed.tokens),
                f"{row.speed.gmacs:.{2 if row.speed.gmacs > 1 else 4}f}",
                f"×{row.speed.ideal:.2f}",
                f"{row.speed.images_per_second:.{0 if row.speed.images_per_second > 100 else 1}f}",
                f"×{row.speed.speedup.median:.2f}",
                f"{row.speed.efficiency.median:.2f}",
            )
            for row in rows
        ],
    )


def draw_accuracy(rows: Sequence[Row]) -> Table:
    """Return the table of the accuracy on every kind of images, and of the agreement with dense."""
    cells = [
        (row.speed.name, *(f"{100 * share:.1f} %" for share in (*row.accuracy.values(), row.agreement or 0.0)))
        for row in rows
    ]
    return method_table("Its zero-shot accuracy", ("digits", "seen", "unseen", "same"), cells)
