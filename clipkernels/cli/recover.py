"""`clipkernels recover`: a reduced tower, trained to its own dense embeddings on images without labels."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import click
import torch
from rich.table import Table
from torch import Tensor

from clipkernels.artefacts.folders import check_replaceable
from clipkernels.artefacts.save import save
from clipkernels.cli.parts.images import close, exif_option, find
from clipkernels.cli.parts.methods import METHOD_HELP, name_of, read_methods, settle
from clipkernels.cli.parts.models import BUNDLED_NOTE, choose_device, model_options
from clipkernels.cli.parts.options import (
    batch_size_option,
    default_workers,
    device_option,
    format_option,
    limit_option,
    once,
    predictor_option,
    seed_option,
    threads_option,
    tokens_option,
    workers_option,
)
from clipkernels.cli.parts.output import opened, write_results
from clipkernels.cli.parts.reporter import Reporter, duration
from clipkernels.cli.parts.stopping import stopping
from clipkernels.cli.parts.whole_models import check_saving, load_whole
from clipkernels.images import draw_images
from clipkernels.images.batches import Pictures, image_shape
from clipkernels.learn.recovery import Progress, Recovered
from clipkernels.learn.recovery import recover as recover_tower
from clipkernels.learn.recovery.state import FOLDER
from clipkernels.messages import printable, quantity, skip_message
from clipkernels.patching import patch

MAX_NAMED = 10
"""Skipped files that are named."""
EXAMPLE = """\b
Example:
  clipkernels demo --quick --model none --save-images pictures
  clipkernels recover pictures --method evit:0.7 --epochs 1 --out recovered
"""


class ShareOrCount(click.ParamType):
    """A share in (0, 1) with a point, or a number of images."""

    name = "SHARE|N"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float | int:
        if isinstance(value, float | int):
            return value
        try:
            return int(value) if value.isdecimal() else float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a share such as 0.05 nor a number of images", param, context)


@click.command(epilog=EXAMPLE)
@click.argument("images", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder of ck.save for the tower.")
@once("--method", "spec", metavar="SPEC", help=f"{METHOD_HELP}  [default: that of the folder in --model]")
@predictor_option
@tokens_option
@model_options
@click.option("--epochs", type=click.IntRange(min=1), default=3, show_default=True, help="Passes over the images.")
@batch_size_option(64, "Images per step.")
@click.option("--lr", type=float, default=2e-4, show_default=True, help="Largest learning rate.")
@click.option("--warmup", type=float, default=0.05, show_default=True, help="Share of the steps in which it rises.")
@click.option("--weight-decay", type=float, default=0.0, show_default=True, help="Weight decay of matrices.")
@click.option(
    "--contrast",
    type=float,
    default=0.005,
    show_default=True,
    help="Weight of finding the own dense embedding in a batch.",
)
@click.option(
    "--held-out",
    type=ShareOrCount(),
    default=0.05,
    show_default=True,
    help="Images not trained on: a share, or a number of them.",
)
@click.option(
    "--patience",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Stop after so many epochs without a closer one.",
)
@click.option("--lora", type=click.IntRange(min=1), metavar="RANK", help="Train LoRA adapters alone; needs peft.")
@click.option("--state", type=click.Path(file_okay=False), help="Folder of checkpoints.  [default: OUT.state]")
@limit_option()
@seed_option("the draw, of the images held out and of the order")
@exif_option
@device_option
@workers_option()
@threads_option
@format_option
@click.pass_context
def recover(
    context: click.Context,
    images: tuple[str, ...],
    out: str,
    spec: str | None,
    predictor: str | None,
    tokens: str | None,
    library: str,
    name: str | None,
    pretrained: str | None,
    epochs: int,
    batch_size: int,
    lr: float,
    warmup: float,
    weight_decay: float,
    contrast: float,
    held_out: float | int,
    patience: int,
    lora: int | None,
    state: str | None,
    limit: int | None,
    seed: int,
    no_exif: bool,
    device: str | None,
    workers: int | None,
    threads: int | None,
    form: str,
) -> None:
    """Train a reduced tower to give the embeddings that it gives dense, so that an index of those stays valid.

    IMAGES are files, folders or quoted globs, as in classify, with its limits of size and format; labels do not count.
    The images that are held out decide which epoch is kept, and give the figures before and after. OUT is a folder of
    ck.save: pass it as --model to any verb.

    Checkpoints are written to OUT.state about once a minute and with every epoch. The same command goes on after
    Ctrl-C or a kill, and ends with the same bits; OUT.state is removed when OUT is there. A file that cannot be read
    as an image is reported on stderr and skipped, and the exit status is then 1.
    """
    began = time.monotonic()
    report: Reporter | None = None
    folder = Path(os.path.abspath(state if state is not None else f"{os.path.normpath(out)}.state"))
    try:
        [method] = read_methods([spec] if spec is not None else ["dense"], predictor, tokens)
        check_replaceable(Path(os.path.abspath(out)))
        FOLDER.check(folder)
        found = find(images)
        paths = draw_images(found.paths, limit, seed if limit is not None else None)
        where = choose_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        model, preprocess, parts = load_whole(library, name, pretrained)
        if name is None:
            click.echo(BUNDLED_NOTE, err=True)
        model = model.to(where)
        method = settle(model, spec, method)
        if method is None or (spec is None and name_of(method) == "Dense()"):
            raise click.UsageError("expected --method with a reduction to recover, such as evit:0.7, got none")
        patch(model, method)
        check_saving(model, out, parts)
        pictures = Pictures(paths, preprocess, image_shape(model, preprocess), exif=not no_exif)
        with stopping() as stop, Reporter(stop, "embedding") as report:
            result = recover_tower(
                model, Decoded(pictures), epochs=epochs, batch_size=batch_size, lr=lr, warmup=warmup,
                weight_decay=weight_decay, contrast=contrast, held_out=held_out, patience=patience,
                lora=lora, seed=seed, workers=default_workers() if workers is None else workers, state=folder,
                progress=lambda progress: show(report, progress),
            )  # fmt: skip
        if not result.stopped:
            settings = {
                "epochs": epochs, "batch_size": batch_size, "lr": lr, "warmup": warmup, "weight_decay": weight_decay,
                "contrast": contrast,
                "held_out": held_out, "patience": patience, "lora": lora, "seed": seed,
            }  # fmt: skip
            save(model, out, **parts, fidelity={"recovery": {**about(result), "settings": settings}})
            FOLDER.remove(folder)
    except (ValueError, ImportError) as error:
        if report is not None and report.last is not None and report.last.errors == report.last.total:
            name_skipped(pictures, range(len(paths)))
        raise click.UsageError(str(error)) from error
    name_skipped(pictures, result.skipped)
    close(found)
    if result.stopped:
        assert report.last is not None
        done, total = report.last.done, report.last.total
        click.echo(
            f"stopped after {report.activity} {done} of {quantity(total, 'image')}; the same command goes on", err=True
        )
        context.exit(128 + stop[0])
    with opened(None) as stream:
        write(result, name_of(method), out, form, stream)
    click.echo(summary(result, out, time.monotonic() - began), err=True)
    if result.skipped:
        context.exit(1)


class Decoded(Sequence[Tensor | None]):
    """Preprocessed images (3,S,S) of files, each read when it is indexed; a file that cannot be read is None."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: Any) -> Any:
        image = self.pictures[index][1]
        return None if isinstance(image, str) else image


def name_skipped(pictures: Pictures, indices: Sequence[int]) -> None:
    """Say on stderr why the first of the files at indices are skipped, and count the others."""
    for index in indices[:MAX_NAMED]:
        click.echo(skip_message(pictures.paths[index], str(pictures[index][1])), err=True)
    if len(indices) > MAX_NAMED:
        click.echo(f"skipped {len(indices) - MAX_NAMED} more", err=True)


def show(report: Reporter, progress: Progress) -> bool:
    """Show how far a recovery is; return true once a signal has come."""
    report.begin(progress.phase)
    notes = [f"loss {progress.loss:.5f}"] if progress.phase == "training" else []
    notes += [f"cosine {progress.cosine:.4f}"] if progress.cosine else []
    return report(progress, ", ".join(notes))


def about(result: Recovered) -> dict[str, Any]:
    """Return a result for JSON."""
    assert result.before is not None and result.after is not None
    return {
        "images": result.images,
        "held_out": result.held_out,
        "skipped": len(result.skipped),
        "steps": result.steps,
        "best_step": result.best_step,
        "before": rounded(result.before),
        "after": rounded(result.after),
        "history": [
            {"step": each.step, "loss": round(each.loss, 6), **rounded(each.closeness)} for each in result.history
        ],
    }


def rounded(closeness: Any) -> dict[str, float]:
    """Return a closeness with six decimals."""
    return {name: round(value, 6) for name, value in closeness._asdict().items()}


def write(result: Recovered, method: str, out: str, form: str, stream: TextIO) -> None:
    """Write the closeness before and after as a table or CSV, and everything about the run as JSON."""
    document = {"folder": out, "method": method, **about(result)}
    rows = [{"tower": when, "held_out": result.held_out, **document[when]} for when in ("before", "after")]

    def draw() -> Iterator[Table]:
        title = f"{method}, {quantity(result.held_out, 'image')} held out"
        table = Table("tower", "cosine", "first percentile", "least", "R@1", title=title, title_justify="left")
        for row in rows:
            figures = (row[name] for name in ("cosine", "cosine_p1", "cosine_min", "recall_at_1"))
            table.add_row(row["tower"], *(f"{figure:.4f}" for figure in figures))
        yield table

    write_results(form, stream, rows, document, draw)


def summary(result: Recovered, out: str, seconds: float) -> str:
    """Return one line about a run that is done."""
    parts = [f"{quantity(result.steps, 'step')} on {quantity(result.images, 'image')} in {duration(seconds)}"]
    if result.skipped:
        parts.append(f"{quantity(len(result.skipped), 'file')} skipped")
    if not result.best_step:
        parts.append("no epoch came closer, so the weights are as they were: lower --lr, or use more images")
    return "; ".join([*parts, f"the tower is in {printable(out)}"])
