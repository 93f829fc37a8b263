"""`clipkernels train-predictor`: a predictor that ranks patches in one forward, trained on golden rankings."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TextIO, cast

import click
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from clipkernels.cli.parts.models import choose_device
from clipkernels.cli.parts.options import batch_size_option, device_option, format_option, plot_option, seed_option
from clipkernels.cli.parts.output import PathCell, check_file, opened, progress, refuse_same, write_results
from clipkernels.cli.parts.plot import draw_training, plot_format
from clipkernels.learn.patch_ranking import Rankings, fit_predictor
from clipkernels.messages import quantity

EXAMPLE = """\b
Example:
  clipkernels demo --quick --model none --save-images pictures
  clipkernels rank pictures/digits --folder-labels --limit 8 \\
    --window 4 --stride 4 --step 32 --output ranks.safetensors
  clipkernels train-predictor ranks.safetensors --epochs 5 \\
    --output predictor.safetensors
"""


@click.command(name="train-predictor", epilog=EXAMPLE)
@click.argument("rankings", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--output", type=click.Path(), required=True, help="Safetensors file; appears when complete.")
@click.option("--keep", type=float, default=0.6, show_default=True, help="Share of the patches kept.")
@click.option("--held-out", type=float, default=0.1, show_default=True, help="Share of the images not trained on.")
@click.option(
    "--margin", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Weight of a loss over pairs."
)
@click.option(
    "--epochs", type=click.IntRange(min=1), default=50, show_default=True, help="Passes over the images trained on."
)
@batch_size_option(64, "Images per step.")
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Learning rate at the start.")
@seed_option("weights and order")
@device_option
@plot_option("loss and overlap")
@format_option
def train_predictor(
    rankings: tuple[str, ...],
    output: str,
    keep: float,
    held_out: float,
    margin: float,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: str | None,
    plot: str | None,
    form: str,
) -> None:
    """Train a predictor of the patches to keep, for --method patch-ranking, on RANKINGS, the files of rank.

    Several files must be of one tower and made with the same options. An image that is in two files, with the same
    label, counts once. The overlap is measured on the images held out: of the patches that the golden rankings drop
    first, the share that the predictor drops too.
    """
    try:
        check_file(output)
        for path in rankings:
            refuse_same({"RANKINGS": path, "--output": output, "--plot": plot})
        picture_format = plot_format(plot) if plot else None
        where = choose_device(device)
        golden = read(rankings)
        images, patches = golden.ranks.shape
        start = time.perf_counter()
        with opened(plot, "--plot") if plot else nullcontext() as picture, progress() as bar:
            task = bar.add_task("training", total=epochs)

            def step(epoch: int, loss: float, overlap: float) -> None:
                description = f"training, loss {loss:.4f}" + (
                    "" if math.isnan(overlap) else f", overlap {share(overlap)}"
                )
                bar.update(task, completed=epoch, description=description)

            fitted = fit_predictor(
                golden,
                keep=keep,
                held_out=held_out,
                margin=margin,
                epochs=epochs,
                batch_size=batch_size,
                lr=lr,
                seed=seed,
                device=where,
                progress=step,
            )
            seconds = time.perf_counter() - start
            chance = 1 - math.ceil(keep * patches) / patches
            fitted.predictor.save(output)
            if picture is not None and picture_format is not None:
                title = f"predictor that keeps {keep:g} of {patches} patches, {quantity(images, 'image')}"
                draw_training(fitted.losses, fitted.overlaps, chance, title, picture.buffer, picture_format)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    trained, overlap = fitted.predictor.about["images"], fitted.overlaps[-1]
    record = {
        "file": output,
        "images": trained,
        "held_out": images - trained,
        "keep": keep,
        "parameters": sum(parameter.numel() for parameter in fitted.predictor.parameters()),
        "mmacs": round(fitted.predictor.macs / 1e6, 4),
        "loss": round(fitted.losses[-1], 6),
        "overlap": None if math.isnan(overlap) else round(overlap, 6),
        "overlap_random": round(chance, 6),
    }
    with opened(None) as stream:
        write(record, form, stream)
    summary = (
        f"{quantity(epochs, 'epoch')} on {quantity(trained, 'image')} in {seconds:.2f} s: loss {fitted.losses[-1]:.4f}"
    )
    if not math.isnan(overlap):
        summary += f", overlap {share(overlap)} (random {share(chance)})"
    click.echo(summary, err=True)


def read(paths: Sequence[str]) -> Rankings:
    """Return the rankings of all files; an image that is in several files counts once.

    Raises:
        click.UsageError: rankings made with other options than those of the first file.
        ValueError: a file that does not hold rankings.
    """
    parts = [Rankings.load(path) for path in paths]
    about = parts[0].about
    for path, part in zip(paths, parts, strict=True):
        different = [name for name in {**about, **part.about} if part.about.get(name) != about.get(name)]
        if different:
            expected = f"expected rankings that were made alike, got {path} with another {', '.join(different)}"
            raise click.UsageError(f"{expected} than {paths[0]}")
    joined = parts[0]._replace(
        ranks=torch.cat([part.ranks for part in parts]),
        features=torch.cat([part.features for part in parts]),
        sha256=torch.cat([cast(Tensor, part.sha256) for part in parts]),
    )
    assert joined.sha256 is not None
    # An image that is both trained on and held out would make the overlap too high.
    first = {digest: row for row, digest in reversed(list(enumerate(map(bytes, joined.sha256.numpy()))))}
    return joined.take(torch.tensor(sorted(first.values())))


def share(fraction: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * fraction:.1f} %"


def write(record: dict[str, Any], form: str, stream: TextIO) -> None:
    """Write one row about the training as a table, JSON or CSV."""

    def draw() -> Iterator[Table]:
        table = Table("images", "held out", "weights", "MMACs", "loss", "overlap", "random", "file")
        overlap = "" if record["overlap"] is None else share(record["overlap"])
        counts = (record["images"], record["held_out"], f"{record['parameters']:,}", f"{record['mmacs']:.2f}")
        cells = (*counts, f"{record['loss']:.4f}", overlap, share(record["overlap_random"]))
        table.add_row(*(Text(str(cell)) for cell in cells), PathCell(record["file"]))
        yield table

    write_results(form, stream, [record], record, draw)
