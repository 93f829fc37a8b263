"""`clipkernels train-predictor`: what ranks patches in one forward, learnt from golden rankings."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, TextIO, cast

import click
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from clipkernels.cli.parts.models import choose_device
from clipkernels.cli.parts.output import check_file, opened, progress, refuse_same, write_table
from clipkernels.cli.parts.plot import draw_training, plot_format
from clipkernels.files import write_csv
from clipkernels.learn.patch_ranking import Rankings, fit_predictor

EXAMPLE = """\b
Example:
  clipkernels demo --quick --model none --save-images pictures
  clipkernels rank pictures/digits --folder-labels --window 4 --stride 4 --step 32 --limit 8 --output ranks.safetensors
  clipkernels train-predictor ranks.safetensors --epochs 5 --output predictor.safetensors
"""


@click.command(name="train-predictor", epilog=EXAMPLE)
@click.argument("rankings", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--output", type=click.Path(), required=True, help="Safetensors file; appears when complete.")
@click.option("--keep", type=float, default=0.6, show_default=True, help="Share of the patches that stay.")
@click.option("--held-out", type=float, default=0.1, show_default=True, help="Share of the images not trained on.")
@click.option(
    "--margin", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Weight of a loss over pairs."
)
@click.option("--epochs", type=int, default=50, show_default=True)
@click.option("--batch-size", type=int, default=64, show_default=True)
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Learning rate at the start.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of weights and order.")
@click.option("--device", help="Such as cpu or cuda:1  [default: cuda where there is one]")
@click.option("--plot", type=click.Path(), help="Also draw loss and overlap into this .png, .svg or .pdf.")
@click.option("--format", "form", type=click.Choice(["table", "json", "csv"]), default="table", show_default=True)
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
    """Train a predictor of what stays, for classify --method patch-ranking, on the RANKINGS that rank left.

    Several files must be of one tower and the same options; an image that is in two, with the same label, counts once.
    The overlap is the share of the patches that golden rankings let go first, on the images held out, that the
    predictor lets go, too.
    """
    try:
        check_file(output)
        for path in rankings:
            refuse_same({"RANKINGS": path, "--output": output, "--plot": plot})
        drawn = plot_format(plot) if plot else None
        where = choose_device(device)
        found = read(rankings)
        images, patches = found.ranks.shape
        start = time.perf_counter()
        with opened(plot, "--plot") if plot else nullcontext() as picture, progress() as bar:
            task = bar.add_task("training", total=epochs)

            def step(epoch: int, loss: float, overlap: float) -> None:
                so_far = f"training, loss {loss:.4f}" + ("" if math.isnan(overlap) else f", overlap {share(overlap)}")
                bar.update(task, completed=epoch, description=so_far)

            fitted = fit_predictor(
                found,
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
            if picture is not None and drawn is not None:
                title = f"a predictor of what stays, {keep:g} of {patches} patches, of {images} images"
                draw_training(fitted.losses, fitted.overlaps, chance, title, picture.buffer, drawn)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        came = f"{error.filename or output}: {error.strerror or error}"
        raise click.UsageError(f"expected files that can be read and written, got {came}") from error
    trained, overlap = fitted.predictor.about["images"], fitted.overlaps[-1]
    record = {
        **{"file": output, "images": trained, "held_out": images - trained, "keep": keep},
        "parameters": sum(parameter.numel() for parameter in fitted.predictor.parameters()),
        "mmacs": round(fitted.predictor.macs / 1e6, 4),
        "loss": round(fitted.losses[-1], 6),
        "overlap": None if math.isnan(overlap) else round(overlap, 6),
        "overlap_random": round(chance, 6),
    }
    with opened(None) as stream:
        write(record, form, stream)
    took = f"{epochs} epochs on {trained} images in {seconds:.2f} s: loss {fitted.losses[-1]:.4f}"
    click.echo(took if math.isnan(overlap) else f"{took}, overlap {share(overlap)} (random {share(chance)})", err=True)


def read(paths: Sequence[str]) -> Rankings:
    """The rankings of all files, those of an image that is in several once.

    Raises:
        click.UsageError: rankings that were made otherwise than those of the first.
        ValueError: a file of something else.
    """
    found = [Rankings.load(path) for path in paths]
    about = found[0].about
    for path, each in zip(paths, found, strict=True):
        differs = [name for name in {**about, **each.about} if each.about.get(name) != about.get(name)]
        if differs:
            wanted = f"expected rankings that were made alike, got {path} with another {', '.join(differs)}"
            raise click.UsageError(f"{wanted} than {paths[0]}")
    joined = found[0]._replace(
        ranks=torch.cat([each.ranks for each in found]),
        features=torch.cat([each.features for each in found]),
        sha256=torch.cat([cast(Tensor, each.sha256) for each in found]),
    )
    assert joined.sha256 is not None
    # An image that was both trained on and held out would make the overlap better than it is.
    first = {digest: row for row, digest in reversed(list(enumerate(map(bytes, joined.sha256.numpy()))))}
    return joined.take(torch.tensor(sorted(first.values())))


def share(part: float) -> str:
    """A share for people."""
    return f"{100 * part:.1f} %"


def write(record: dict[str, Any], form: str, stream: TextIO) -> None:
    """What came out, as a table, as JSON or as CSV."""
    if form == "csv":
        write_csv([record], stream)
    elif form == "json":
        json.dump(record, stream, indent=2)
        stream.write("\n")
    else:
        table = Table("trained on", "held out", "parameters", "MMACs", "loss", "overlap", "random", "file")
        overlap = "" if record["overlap"] is None else share(record["overlap"])
        counts = (record["images"], record["held_out"], f"{record['parameters']:,}", f"{record['mmacs']:.2f}")
        shares = (overlap, share(record["overlap_random"]), record["file"])
        table.add_row(*(Text(str(cell)) for cell in (*counts, f"{record['loss']:.4f}", *shares)))
        write_table(table, stream)
