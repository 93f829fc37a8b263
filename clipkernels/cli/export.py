"""`clipkernels export`: a model with a method to a folder for ONNX Runtime, OpenVINO or torch.export."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import click
from rich.table import Table
from torch import Tensor

from clipkernels.artefacts.folders import check_replaceable
from clipkernels.cli.parts.images import close, exif_option, find, no_images
from clipkernels.cli.parts.methods import METHOD_HELP, read_methods, settle
from clipkernels.cli.parts.models import model_options
from clipkernels.cli.parts.options import format_option, limit_option, once, predictor_option, tokens_option
from clipkernels.cli.parts.output import opened, progress, quietly, write_results
from clipkernels.cli.parts.whole_models import load_whole
from clipkernels.data import Preprocess
from clipkernels.exporting.export import export as export_model
from clipkernels.exporting.graphs import RUNTIMES
from clipkernels.exporting.header import EXPORTS
from clipkernels.exporting.precision import PRECISIONS
from clipkernels.exporting.report import Report
from clipkernels.images.batches import Pictures, collate, image_shape
from clipkernels.images.walker import draw_images
from clipkernels.messages import printable, quantity, skip_message
from clipkernels.patching import patch

DEFAULT_LIMIT = 300
NOTE = "note: without --model this is the bundled model for 32×32 images, a toy"
EXAMPLE = """\b
Example:
  clipkernels export --method tome:4 --out exported
"""


@click.command(epilog=EXAMPLE)
@click.option(
    "--out", required=True, type=click.Path(file_okay=False), help="Folder to write; an exported one is replaced."
)
@model_options
@once("--method", "spec", metavar="SPEC", help=f"{METHOD_HELP}  [default: that of the folder in --model, else dense]")
@predictor_option
@tokens_option
@click.option("--to", type=click.Choice(RUNTIMES), default=RUNTIMES[0], show_default=True, help="Runtime.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default=PRECISIONS[0],
    show_default=True,
    help="bf16 needs openvino or pt2; int8 needs --calibrate.",
)
@click.option("--calibrate", multiple=True, help="Files, folders or quoted globs of images for INT8; may be repeated.")
@click.option(
    "--check", multiple=True, help="Images to compare with PyTorch.  [default: those of --calibrate, or noise]"
)
@click.option(
    "--min-cosine",
    type=click.FloatRange(0, 1),
    help="Least first percentile of the cosine with fp32; OpenVINO's INT8 keeps products in float for it.",
)
@click.option("--layout", type=click.Choice(["immich"]), help="The files that immich reads, with --to onnx.")
@limit_option(DEFAULT_LIMIT)
@exif_option
@format_option
@click.pass_context
def export(
    context: click.Context,
    out: str,
    library: str,
    name: str | None,
    pretrained: str | None,
    spec: str | None,
    predictor: str | None,
    tokens: str | None,
    to: str,
    precision: str,
    calibrate: tuple[str, ...],
    check: tuple[str, ...],
    min_cosine: float | None,
    layout: str | None,
    limit: int,
    no_exif: bool,
    form: str,
) -> None:
    """Export a model with a method to a folder that runs without torch and without clipkernels.

    OUT has the image tower and the text tower with a free batch size, preprocessing and tokenizer as data, and a copy
    of the runtime: `python OUT/runtime photo.jpg` embeds a photograph. The graphs are compared with PyTorch before the
    folder appears; the table shows how close they are. --limit is for --calibrate and --check alike.

    A file that cannot be read as an image is reported on stderr and skipped, and the exit status is then 1.
    """
    try:
        [method] = read_methods([spec if spec is not None else "dense"], predictor, tokens)
        check_replaceable(Path(os.path.abspath(out)), EXPORTS)
        model, preprocess, parts = load_whole(library, name, pretrained)
        if name is None:
            click.echo(NOTE, err=True)
        method = settle(model, spec, method)
        if method is not None:
            patch(model, method)
        images, skipped = {}, 0
        for option, paths in (("calibrate", calibrate), ("check", check)):
            if paths:
                images[option], failures = read_images(paths, model, preprocess, limit, not no_exif)
                skipped += failures
        with quietly(), progress() as bar:
            task = bar.add_task("", total=None)
            report = export_model(
                model, out, to=to, precision=precision, min_cosine=min_cosine, layout=layout,
                tokenizer=parts.get("tokenizer"), preprocess=preprocess, config=name,
                progress=lambda step: bar.update(task, advance=1, description=step), **images,
            )  # fmt: skip
    except (ValueError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    with opened(None) as stream:
        write(report, out, form, stream)
    click.echo(summary(report, out), err=True)
    if skipped:
        context.exit(1)


def read_images(
    sources: Sequence[str], model: Any, preprocess: Preprocess, limit: int, exif: bool
) -> tuple[Tensor, int]:
    """Return the preprocessed images (n,3,S,S) of files, and the number of files that are skipped.

    Raises:
        click.UsageError: none of the files is an image.
    """
    found = find(sources)
    paths = draw_images(found.paths, limit, 0)
    pictures = Pictures(paths, preprocess, image_shape(model, preprocess), exif=exif)
    loaded = collate([pictures[index] for index in range(len(paths))])
    for index, reason in loaded.failed:
        click.echo(skip_message(paths[index], reason), err=True)
    close(found)
    if loaded.images is None:
        raise no_images(paths)
    return loaded.images, len(loaded.failed)


def write(report: Report, out: str, form: str, stream: TextIO) -> None:
    """Write the parity of each tower as a table or CSV, and the whole report as JSON."""
    document = {"folder": out, "runtime": report.runtime, "precision": report.precision, **report.record()}
    rows = [{"tower": kind, **document[kind]} for kind in ("image", "text") if document[kind] is not None]

    def draw() -> Iterator[Table]:
        title = f"{report.runtime}, {report.precision}: cosine with PyTorch in fp32"
        columns = ("tower", "inputs", "mean", "first percentile", "least", "≥ .9999")
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            figures = (f"{row[name]:.5f}" for name in ("cosine_mean", "cosine_p1", "cosine_min"))
            table.add_row(row["tower"], str(row["inputs"]), *figures, f"{row['near']:.1%}")
        yield table

    write_results(form, stream, rows, document, draw)


def summary(report: Report, out: str) -> str:
    """Return one line about an exported folder."""
    parts = [f"{sum(report.sizes.values()) / 2**20:.1f} MiB"]
    if report.peak_memory is not None:
        parts.append(f"{report.peak_memory / 2**20:.0f} MiB of memory at batch 8")
    if report.products is not None:
        parts.append(f"{quantity(report.products.quantised, 'product')} in INT8")
        if report.products.float_names:
            parts.append(f"{len(report.products.float_names)} kept in float")
    return "; ".join([*parts, f"the folder is {printable(out)}"])
