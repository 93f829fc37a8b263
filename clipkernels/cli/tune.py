"""`clipkernels tune`: the cheapest schedule of a tower that keeps a budget, on a user's own photographs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor

from clipkernels.classifier import class_embeddings, prompts_of
from clipkernels.cli.parts.captions import embed_captions, read_captions
from clipkernels.cli.parts.classes import choose_classes, read_labels
from clipkernels.cli.parts.images import close, exif_option, find, no_images
from clipkernels.cli.parts.models import cast_towers, choose_device, load, load_clip, model_options
from clipkernels.cli.parts.options import (
    batch_size_option,
    classes_file_option,
    classes_option,
    default_workers,
    device_option,
    format_option,
    limit_option,
    once,
    output_option,
    plot_option,
    precision_option,
    seed_option,
    template_option,
    threads_option,
    workers_option,
)
from clipkernels.cli.parts.output import check_file, opened, refuse_same
from clipkernels.cli.parts.plot import draw_frontier, plot_format
from clipkernels.cli.parts.reporter import Reporter, duration
from clipkernels.cli.parts.stopping import stopping
from clipkernels.cli.parts.tune_report import write_tuning
from clipkernels.comparison.towers import DTYPES
from clipkernels.images import draw_images
from clipkernels.images.batches import Pictures, collate, image_shape
from clipkernels.images.loaders import Loader
from clipkernels.messages import quantity, skip_message
from clipkernels.patching import unpatch
from clipkernels.tuning.budget import parse_budget
from clipkernels.tuning.effects import FAMILIES
from clipkernels.tuning.results import Progress, Tuned
from clipkernels.tuning.state import FOLDER
from clipkernels.tuning.tune import tune as tune_tower

DEFAULT_LIMIT = 1000
BUDGET_HELP = (
    "Terms separated by commas, all fractions: recall@1>=.99, cosine_p1>=.98, cosine_mean>=.99, accuracy_drop<=.005 "
    "(with --folder-labels), text_recall@10>=.8 (with --text), speedup>=1.5, gmacs<=11."
)
NOTE = (
    "note: without --model this is the bundled model for 32×32 images, a toy; a schedule is for the tower that it was "
    "tuned on"
)
EXAMPLE = """\b
Example:
  clipkernels demo --quick --model none --save-images pictures
  clipkernels tune pictures --budget "cosine_mean>=.98" --cost gmacs \\
    --evaluations 20 --out schedule.json
"""


class Source(NamedTuple):
    """The photographs (n,3,S,S), their files, and the number of files that cannot be read."""

    images: Tensor
    paths: list[str]
    failures: int


@click.command(epilog=EXAMPLE)
@click.argument("images", nargs=-1, required=True)
@once("--budget", required=True, help=BUDGET_HELP)
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="File of the schedule, for --method.")
@model_options
@once(
    "--cost",
    metavar="FILE|gmacs",
    help="Table of measured costs, written if it is not there; or gmacs: operations count, and nothing is timed.  "
    "[default: measure, keep nothing]",
)
@click.option(
    "--against",
    type=click.Choice(["dense", "same"]),
    default="dense",
    show_default=True,
    help="Index that reduced queries search, for recall@K: that of dense embeddings, or the reduced one.",
)
@once("--families", metavar="NAME,…", help=f"Kinds of steps to try.  [default: {','.join(FAMILIES)}]")
@click.option("--folder-labels", is_flag=True, help="The folder of an image is its true class, for accuracy_drop.")
@classes_option(default="the folders, with --folder-labels")
@classes_file_option
@template_option
@once("--text", metavar="SUFFIX", help="Captions are in files beside the images, such as txt; for text_recall.")
@click.option(
    "--evaluations",
    type=click.IntRange(min=8),
    default=100,
    show_default=True,
    help="Plans that are run on the photographs of the search, at most.",
)
@batch_size_option(8, "Images per batch of the tower's use, for which cost and speed are measured.")
@precision_option
@limit_option(DEFAULT_LIMIT)
@seed_option("the draw of --limit and of the halves")
@exif_option
@device_option
@workers_option()
@threads_option
@click.option("--state", type=click.Path(file_okay=False), help="Folder that keeps each forward.  [default: OUT.state]")
@format_option
@output_option
@plot_option("the frontier, with the published schedules")
@click.pass_context
def tune(
    context: click.Context,
    images: tuple[str, ...],
    budget: str,
    out: str,
    library: str,
    name: str | None,
    pretrained: str | None,
    cost: str | None,
    against: str,
    families: str | None,
    folder_labels: bool,
    classes: str | None,
    classes_file: str | None,
    templates: tuple[str, ...],
    text: str | None,
    evaluations: int,
    batch_size: int,
    precision: str,
    limit: int,
    seed: int,
    no_exif: bool,
    device: str | None,
    workers: int | None,
    threads: int | None,
    state: str | None,
    form: str,
    output: str | None,
    plot: str | None,
) -> None:
    """Find the cheapest schedule of a tower that keeps a budget on your photographs.

    IMAGES are files, folders or quoted globs, as in classify, with its limits of size and format. One half of them is
    searched; the promise is checked on the other half, with a 95 % bootstrap bound. Merges, prunes and condensations of
    every block are tried beside the published schedules. Cost is measured on this device, in this precision and batch,
    and no schedule is written that is slower than the dense tower.

    The table has the frontier of cost and quality on the half that is searched, and the published schedules. The lines
    after it are the promise, and the option that uses the schedule.

    Each forward is kept in OUT.state. The same command goes on after Ctrl-C or a kill, and ends with the same schedule
    if --cost is the same; OUT.state is removed when OUT is there. The exit status is 1 if no schedule keeps the budget,
    or if a file cannot be read as an image, which is reported on stderr and skipped.
    """
    began = time.monotonic()
    folder = Path(os.path.abspath(state if state is not None else f"{out}.state"))
    before = torch.get_num_threads()
    try:
        constraints = parse_budget(budget)
        chosen = choose_families(families)
        refuse_same({"--out": out, "--output": None if output == "-" else output, "--plot": plot, "--cost": cost})
        for path, option in ((out, "--out"), *([(cost, "--cost")] if cost not in (None, "gmacs") else [])):
            check_file(path, option)
        picture_format = plot_format(plot) if plot else None
        FOLDER.check(folder)
        found = find(images)
        labelled = any(constraint.name == "accuracy_drop" for constraint in constraints)
        captioned = any(constraint.name == "text_recall" for constraint in constraints)
        if labelled and not folder_labels:
            raise click.UsageError("expected --folder-labels with accuracy_drop, got none")
        if captioned and text is None:
            raise click.UsageError(
                "expected --text with text_recall, got none: --text txt reads photo.txt beside photo.jpg"
            )
        names = choose_classes(found.paths, classes, classes_file, folder_labels) if labelled else []
        paths = draw_images(found.paths, limit, seed)
        where = choose_device(device)
        torch.set_num_threads(threads or before)
        if name is None:
            click.echo(NOTE, err=True)
        if labelled or captioned:
            model, preprocess, tokenizer = load_clip(library, name, pretrained)
        else:
            (model, preprocess, _), tokenizer = load(library, name, pretrained), None
        model = cast_towers(unpatch(model), where, DTYPES[precision])
        source = read(paths, Pictures(paths, preprocess, image_shape(model, preprocess), exif=not no_exif), workers)
        extras: dict[str, Any] = {}
        if labelled:
            labels = read_labels(source.paths, names)
            prompts = prompts_of(names, templates or ("a photo of a {}.",))
            extras["labels"] = torch.tensor([names.index(label) for label in labels])
            extras["classes"] = class_embeddings(model, tokenizer, prompts)
        if captioned and text is not None:
            captions, ids = embed_captions(model, tokenizer, read_captions(source.paths, text))
            extras |= {"captions": captions, "caption_ids": ids}
        with stopping("forward") as stop, Reporter(stop, "embedding", "forward") as report:
            result = tune_tower(
                model, source.images, constraints, against=against, cost=cost, families=chosen,  # type: ignore[arg-type]
                evaluations=evaluations, batch_size=batch_size, seed=seed, state=folder,
                progress=lambda progress: show(report, progress), **extras,
            )  # fmt: skip
        if not result.stopped:
            if result.schedule is not None:
                result.schedule.save(out)
            FOLDER.remove(folder)
    except (ValueError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    finally:
        torch.set_num_threads(before)
    close(found)
    if result.stopped:
        click.echo(f"stopped in {report.activity}; the same command goes on", err=True)
        context.exit(128 + stop[0])
    with opened(output) as stream, opened(plot, "--plot") if plot else nullcontext() as picture:
        run = {"model": name or "bundled", "budget": budget, "batch": batch_size}
        write_tuning(result, constraints, run, out, form, stream)
        if picture is not None and picture_format is not None:
            draw_frontier(
                result.rows,
                [each.text for each in constraints if each.is_quality],
                budget,
                picture.buffer,
                picture_format,
            )
    click.echo(summary(result, source, time.monotonic() - began), err=True)
    if source.failures or result.schedule is None:
        context.exit(1)


def choose_families(text: str | None) -> list[str]:
    """Return the kinds of steps of --families; click.UsageError for an unknown one."""
    names = list(FAMILIES) if text is None else list(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise click.UsageError(f"expected --families of {', '.join(FAMILIES)}, got {unknown[0]!r}")
    return names


def read(paths: Sequence[str], pictures: Pictures, workers: int | None) -> Source:
    """Return the images of files; a file that cannot be read is named on stderr.

    Raises:
        click.UsageError: none of the files is an image.
    """
    count = default_workers() if workers is None else workers
    loader: Loader[Any] = Loader(pictures, count if len(paths) >= 256 else 0, batch_size=32, collate_fn=collate)
    images, read_paths, failures = [], [], 0
    for batch in loader:
        for index, reason in batch.failed:
            click.echo(skip_message(paths[index], reason), err=True)
        failures += len(batch.failed)
        images += [] if batch.images is None else [batch.images]
        read_paths += [paths[index] for index in batch.indices]
    if not images:
        raise no_images(paths)
    return Source(torch.cat(images), read_paths, failures)


def show(report: Reporter, progress: Progress) -> bool:
    """Show how far a tuning is; return true once a signal has come."""
    report.begin(progress.phase)
    return report(progress, progress.note)


def summary(result: Tuned, source: Source, seconds: float) -> str:
    """Return one line about a run that is done."""
    parts = [
        f"{quantity(result.evaluations, 'plan')} on {quantity(len(source.images), 'image')} in {duration(seconds)}"
    ]
    if source.failures:
        parts.append(f"{quantity(source.failures, 'file')} skipped")
    if result.schedule is None:
        parts.append("no schedule was written")
    return "; ".join(parts)
