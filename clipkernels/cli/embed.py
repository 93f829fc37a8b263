"""`clipkernels embed`: the images of a collection to Parquet."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, cast

import click
import torch

from clipkernels.artefacts.header import is_artefact, read_header
from clipkernels.cli.parts.images import exif_option
from clipkernels.cli.parts.methods import METHOD_HELP, name_of, read_methods, settle
from clipkernels.cli.parts.models import cast_towers, choose_device, load, load_clip, model_options
from clipkernels.cli.parts.options import (
    batch_size_option,
    default_workers,
    once,
    precision_option,
    predictor_option,
    workers_option,
)
from clipkernels.cli.parts.reporter import Reporter, duration
from clipkernels.cli.parts.stopping import stopping
from clipkernels.collection.checks import check_apart
from clipkernels.collection.clip_retrieval import export_clip_retrieval
from clipkernels.collection.layout import EMBEDDINGS, ERRORS
from clipkernels.collection.query import BUNDLED
from clipkernels.collection.run import Embedded
from clipkernels.collection.run import embed as embed_collection
from clipkernels.collection.settings import Name
from clipkernels.collection.sources import find_sources
from clipkernels.collection.store.shards import read_errors
from clipkernels.comparison.towers import DTYPES
from clipkernels.messages import one_line, quantity, skip_message
from clipkernels.methods import Dense
from clipkernels.patching import patch
from clipkernels.runtime.manifest import is_export, read_export

MAX_REASONS = 3
DTYPE_NAMES: dict[str | None, Any] = {None: None, "fp32": "float32", "fp16": "float16"}
EXAMPLE = """\b
Example:
  clipkernels demo --quick --model none --save-images pictures
  clipkernels embed pictures --out collection --method evit:0.7
"""


@click.command(epilog=EXAMPLE)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder of the collection.")
@model_options
@once(
    "--method", "spec", metavar="SPEC", help=f"{METHOD_HELP}  [default: dense; none where the tower is not supported]"
)
@predictor_option
@precision_option
@click.option("--compile", "compiled", is_flag=True, help="Compile the tower, on a CPU with frozen weights.")
@batch_size_option(32)
@workers_option("Loader processes per device.")
@click.option("--devices", help="Devices, such as cpu or cuda:0,cuda:1.  [default: every CUDA device, else cpu]")
@click.option("--text", metavar="COLUMN", help="Also embed the captions in this column, or in files with this suffix.")
@click.option("--column", "columns", multiple=True, help="Keep this column of the sources; may be repeated.")
@click.option("--image-column", help="Column of images in Parquet files and datasets, if there are several.")
@click.option("--id-column", help="Column of ids there.  [default: the path, or file and row]")
@click.option("--raw", is_flag=True, help="Keep the length of embeddings, which is one otherwise.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "fp16"]), help="Of the embeddings in the files.  [default: fp32 for fp32]"
)
@exif_option
@click.option("--hash", "by_content", is_flag=True, help="A file has changed if its content has, not its size or time.")
@click.option("--prune", is_flag=True, help="Remove rows of images that the sources do not have any more.")
@click.option(
    "--forget",
    multiple=True,
    metavar="SOURCE",
    help="With --prune: also remove rows of this source of earlier runs, which need not be there; may be repeated.",
)
@click.option("--retry", is_flag=True, help="Try again what failed before.")
@click.option(
    "--unit-rows", type=click.IntRange(min=1), default=1024, show_default=True, help="Images that are saved at a time."
)
@click.option(
    "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="ray: see docs/embed.md."
)
@click.option("--actors", type=click.IntRange(min=1), default=1, show_default=True, help="ray: models at a time.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["parquet", "clip-retrieval"]),
    default="parquet",
    show_default=True,
    help="clip-retrieval: also write its img_emb/, text_emb/ and metadata/.",
)
@click.pass_context
def embed(
    context: click.Context,
    sources: tuple[str, ...],
    out: str,
    library: str,
    name: str | None,
    pretrained: str | None,
    spec: str | None,
    predictor: str | None,
    precision: str,
    compiled: bool,
    batch_size: int,
    workers: int | None,
    devices: str | None,
    text: str | None,
    columns: tuple[str, ...],
    image_column: str | None,
    id_column: str | None,
    raw: bool,
    dtype: str | None,
    no_exif: bool,
    by_content: bool,
    prune: bool,
    forget: tuple[str, ...],
    retry: bool,
    unit_rows: int,
    engine: str,
    actors: int,
    form: str,
) -> None:
    """Embed the images of a collection to Parquet; run it again to go on, or to bring the collection up to date.

    SOURCES are folders, quoted globs, image files, text files of paths, Parquet files, WebDataset tars, folders of
    either, and datasets that Hugging Face's datasets saved to disk.

    DIR/embeddings/*.parquet has a row per image: id, embedding, sha256, width, height, size and modified. DIR/errors
    has a row per image that has no embedding, with the reason. Only images that are new or changed are encoded. A
    killed run loses the units in flight; Ctrl-C stops after the batch.

    The exit status is 1 if images were left out, 2 if none could be read.
    """
    try:
        [method] = read_methods([spec] if spec is not None else ["dense"], predictor, None)
        check_apart(out, sources)
        find_sources(sources, image_column=image_column, id_column=id_column)  # before a model is downloaded
        places = [choose_device(part) for part in devices.split(",")] if devices else every_device()
        tokenizer = None
        if text is None:
            model, preprocess, _ = load(library, name, pretrained)
        else:
            model, preprocess, tokenizer = load_clip(library, name, pretrained)
        if name is None:
            click.echo("note: without --model this is the bundled model for 32×32 images, a toy", err=True)
        model = cast_towers(model, places[0], DTYPES[precision])
        method = settle(model, spec, method)
        saved = name is not None and (is_artefact(name) or is_export(name))
        if spec is None and not saved:
            spec = "none" if method is None else "dense"
        if method is not None:
            patch(model, method)
        if method is not None and not isinstance(method, Dense):
            click.echo(
                f"note: {spec or name_of(method)} changes embeddings, and so which images are nearest: clipkernels "
                "search encodes a query image alike; docs/embed.md has a table of what that changes",
                err=True,
            )
        if name is None:
            names = Name(*BUNDLED, spec)
        elif saved:  # its own method needs no specification, because the folder holds it
            source = read_export(name)["name"]["library"] if is_export(name) else read_header(name).library
            names = Name(source, os.path.abspath(name), None, spec)
        else:
            names = Name(library, anywhere(name), anywhere(pretrained), spec)
        with stopping() as stop, Reporter(stop, "embedding", first="reading the sources") as report:
            result = embed_collection(
                model, sources, out, preprocess=preprocess, tokenizer=tokenizer, text=text, columns=columns,
                image_column=image_column, id_column=id_column, batch_size=batch_size, unit_rows=unit_rows,
                workers=default_workers() if workers is None else workers, raw=raw,
                dtype=DTYPE_NAMES[dtype],
                exif=not no_exif, by_content=by_content, prune=prune, forget=forget, retry=retry, compiled=compiled,
                devices=places if len(places) > 1 else None, engine=cast(Any, engine), actors=actors, name=names,
                progress=report, report=report.line,
            )  # fmt: skip
        if form == "clip-retrieval" and not result.stopped:
            export_clip_retrieval(out, out)
    except (ValueError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    close(result, out, report, retry)
    if result.stopped:
        context.exit(128 + stop[0])
    if result.all_errors:
        context.exit(1 if result.embeddings else 2)


def every_device() -> list[torch.device]:
    """Return all CUDA devices, or the CPU if there is none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", index) for index in range(count)] or [choose_device(None)]


def anywhere(name: str | None) -> str | None:
    """Return a name, that of a file or a folder as it holds in any folder."""
    return os.path.abspath(name) if name is not None and os.path.exists(name) else name


def close(result: Embedded, out: str, report: Reporter, retried: bool) -> None:
    """Say on stderr what the run did, what it left out, and where that stands."""
    for note in result.notes:
        click.echo(note, err=True)
    if result.all_errors:
        errors, _ = read_errors(Path(out))
        for error in errors.slice(0, MAX_REASONS).to_pylist():
            click.echo(skip_message(error["id"], one_line(error["reason"])), err=True)
        if result.all_errors > MAX_REASONS:
            click.echo(f"skipped {result.all_errors - MAX_REASONS} more", err=True)
    seconds = time.monotonic() - report.started
    done = result.encoded + result.errors
    parts = [f"{quantity(result.encoded, 'image')} embedded in {duration(seconds)}"]
    if done:
        parts[0] += f", {done / max(seconds, 1e-9):.1f} images/s"
    if result.stopped:
        total = 0 if report.last is None else report.last.total
        parts[0] = f"stopped after {done} of {quantity(total, 'image')}; the same command goes on"
    parts.append(f"{quantity(result.embeddings, 'embedding')} in {os.path.join(out, EMBEDDINGS)}")
    if result.removed:
        parts.append(f"{quantity(result.removed, 'row')} removed")
    if result.vanished:
        parts.append(f"{quantity(result.vanished, 'row')} whose image is not there any more (--prune)")
    if result.all_errors:
        hint = "" if retried else " (--retry)"
        parts.append(f"{quantity(result.all_errors, 'image')} left out, see {os.path.join(out, ERRORS)}{hint}")
    click.echo("; ".join(parts), err=True)
