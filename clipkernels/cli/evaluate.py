"""`clipkernels evaluate`: accuracy of every method and head on labelled data sets, beside published figures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from clipkernels.cli.parts.evaluation_report import draw_scores, notes_of, records_of, write_report
from clipkernels.cli.parts.methods import METHOD_HELP, is_supported, methods_for, name_of, read_methods
from clipkernels.cli.parts.models import BUNDLED_NOTE, cast_towers, choose_device, load_clip, model_options
from clipkernels.cli.parts.options import (
    batch_size_option,
    default_workers,
    device_option,
    format_option,
    once,
    precision_option,
    predictor_option,
    threads_option,
    tokens_option,
    workers_option,
)
from clipkernels.cli.parts.output import opened, write_results
from clipkernels.cli.parts.reporter import Reporter, duration
from clipkernels.cli.parts.stopping import stopping
from clipkernels.comparison.towers import DTYPES
from clipkernels.evaluation.captions import Captions, read_captions
from clipkernels.evaluation.datasets import DATASETS, Dataset, read_dataset
from clipkernels.evaluation.evaluate import evaluate as evaluate_model
from clipkernels.evaluation.heads import HEADS
from clipkernels.evaluation.plan import Combinations, Model
from clipkernels.evaluation.published import Figure, published_figures
from clipkernels.evaluation.results import Progress, Row
from clipkernels.evaluation.speed import measure_speeds, noise_batch
from clipkernels.measure.environment import environment
from clipkernels.measure.timing import HOST
from clipkernels.messages import quantity
from clipkernels.methods import Method
from clipkernels.patching import method_of, tower_of, unpatch
from clipkernels.support import ENSEMBLE, SupportSet

STATE = "state"
EXAMPLE = """\b
Example:
  clipkernels demo --quick --model none --save-images pictures
  clipkernels evaluate --data digits=pictures/digits --method tome:4 \\
    --heads zero-shot,calip --out results
"""


@click.command(epilog=EXAMPLE)
@click.option(
    "--data",
    "sources",
    multiple=True,
    metavar="[NAME=]PATH",
    help=f"A data set in its own layout; may be repeated. NAME is one of {', '.join(DATASETS)}. Any other name, or a "
    "path alone, is a folder with a sub-folder per class, or with train, val and test above those.",
)
@click.option(
    "--support",
    "supported",
    multiple=True,
    metavar="NAME=FOLDER",
    help="A folder of support build for a data set, which tip and tipx read with shots of 0; may be repeated.",
)
@click.option(
    "--captions",
    "captioned",
    multiple=True,
    metavar="[NAME=]FILE",
    help="Captions for retrieval: COCO's or Karpathy's JSON, Flickr30k's token file, or CSV; may be repeated.",
)
@click.option(
    "--images",
    "images_folder",
    type=click.Path(exists=True, file_okay=False),
    help="Folder of the images of --captions.  [default: beside the file]",
)
@click.option(
    "--out", required=True, type=click.Path(file_okay=False), help="Folder of the results and of their state."
)
@once(
    "--prompts",
    type=click.Choice(["single", "ensemble"]),
    default="single",
    show_default=True,
    help="Prompts of a class: the single template of the data set, or the seven of Tip-Adapter and SuS-X.",
)
@click.option("--method", "specs", multiple=True, metavar="SPEC", help=f"{METHOD_HELP} May be repeated.")
@predictor_option
@tokens_option
@model_options
@once(
    "--heads",
    metavar="NAME,…",
    default="zero-shot",
    show_default=True,
    help=f"Heads: {', '.join(HEADS)}.",
)
@once(
    "--shots",
    metavar="N,…",
    default="0",
    show_default=True,
    help="Labelled images per class, from the train split; 0 is for the heads that read none.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Draws of labelled images, and orders of a stream.",
)
@batch_size_option(64)
@click.option(
    "--rounds",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Timed runs per method; 0 times nothing.",
)
@workers_option()
@device_option
@precision_option
@threads_option
@format_option
@click.pass_context
def evaluate(
    context: click.Context,
    sources: tuple[str, ...],
    supported: tuple[str, ...],
    captioned: tuple[str, ...],
    images_folder: str | None,
    out: str,
    prompts: str,
    specs: tuple[str, ...],
    predictor: str | None,
    tokens: str | None,
    library: str,
    name: str | None,
    pretrained: str | None,
    heads: str,
    shots: str,
    seeds: int,
    batch_size: int,
    rounds: int,
    workers: int | None,
    device: str | None,
    precision: str,
    threads: int | None,
    form: str,
) -> None:
    """Score every method and head on labelled data sets, beside the published figures.

    Each row is the accuracy of a method and head on the test split, with its 95 % bootstrap interval, the spread over
    draws or orders, and the published figure of the same method, head and model where one is known; ? marks figures
    that were not compared with their papers. --captions gives recall at 1, 5 and 10 between images and captions.

    Weights of heads are searched on the validation split alone; the column weights says so, and how many images it
    has. Without that split they are the published ones. Few-shot draws are seeded and nested.

    OUT gets results.csv, results.json, results.md and accuracy.png. OUT/state keeps features and scores: the same
    command goes on after Ctrl-C or a kill, and more data, methods, heads or shots add to what is there. The exit status
    is 1 if an image could not be read, or if a combination has no score. Nothing is downloaded.
    """
    began, before = time.monotonic(), torch.get_num_threads()
    folder = Path(os.path.abspath(out))
    try:
        if not sources and not captioned:
            raise click.UsageError("expected --data or --captions, got neither")
        torch.set_num_threads(threads or before)
        chosen, counts = choose_heads(heads), choose_shots(shots)
        data = read_named(sources, read_dataset, "--data")
        if prompts == "ensemble":
            data = {each: content._replace(templates=ENSEMBLE) for each, content in data.items()}
        captions = read_named(captioned, partial(read_named_captions, images_folder), "--captions")
        where = choose_device(device)
        if name is None:
            click.echo(BUNDLED_NOTE, err=True)
        loaded, preprocess, tokenizer = load_clip(library, name, pretrained)
        methods = choose_methods(loaded, specs, predictor, tokens)
        model = cast_towers(unpatch(loaded) if is_supported(loaded) else loaded, where, DTYPES[precision])
        model.eval()
        count = default_workers() if workers is None else workers
        settings = Model(model, tokenizer, preprocess, batch_size, count, precision)
        scored = {label: method for label, method in methods.items() if label != "Dense()" or "dense" in specs}
        supports = read_named(supported, lambda _, path: SupportSet.load(path, model), "--support")
        for each in supports.keys() - data.keys():
            raise click.UsageError(f"expected --support of a data set in --data, got {each}")
        plan = Combinations(list(data.values()), supports, captions, scored, chosen, counts, seeds)
        folder.mkdir(parents=True, exist_ok=True)
        with stopping("part") as stop, Reporter(stop, "evaluating") as report:
            results = evaluate_model(plan, settings, folder / STATE, lambda progress: show(report, progress))
            speeds = {}
            if rounds and not results.stopped and is_supported(model):
                report.begin("timing")
                speeds = measure_speeds(settings, methods, noise_batch(settings), rounds, folder / STATE)
    except (ValueError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    finally:
        torch.set_num_threads(before)
    if results.stopped:
        click.echo(f"stopped in {report.activity}; the same command goes on", err=True)
        context.exit(128 + stop[0])
    records = records_of(results, speeds, partial(published_of, f"{name} {pretrained}"))
    notes = notes_of(results, records, [f"{each.name}: {note}" for each in data.values() for note in each.notes])
    title = f"{name or 'the bundled CLIP'}, {precision}"
    document = {
        "environment": environment(), "model": name or "bundled", "pretrained": pretrained, "library": library,
        "precision": precision, "batch": batch_size, "seeds": seeds, "notes": notes,
        "data": {each.name: describe(each) for each in data.values()},
        "rows": records,
    }  # fmt: skip
    write_report(folder, records, document, notes, title)
    with opened(None) as stream:
        write_results(form, stream, records, document, lambda: [draw_scores(records, title), *notes])
    seconds = duration(time.monotonic() - began)
    click.echo(f"{quantity(len(records), 'row')} in {seconds}: {folder / 'results.md'}", err=True)
    if results.skips or any(results.unread.values()):
        context.exit(1)


def choose_methods(
    model: nn.Module, specs: Sequence[str], predictor: str | None, tokens: str | None
) -> dict[str, Method | None]:
    """Return the methods by name: the host's own forward, Dense(), and those of --method or of a saved model.

    Raises:
        click.UsageError: as in `methods_for`, or methods for a tower that cannot be patched.
        ValueError: as in `methods_for`.
    """
    if is_supported(model):
        own = method_of(model)
        return methods_for(tower_of(model), specs or ([] if own else ["none"]), predictor, tokens, own)
    if specs:
        raise click.UsageError(f"expected no --method for a {type(model.visual).__name__}, got {specs[0]}")
    return {HOST: None}


def describe(data: Dataset) -> dict[str, Any]:
    """Return what JSON says of a data set."""
    images = {split: len(items.names) for split, items in data.splits.items()}
    return {"layout": data.layout, "classes": len(data.classes), "templates": data.templates, "images": images}


def choose_heads(text: str) -> list[str]:
    """Return the names of --heads; click.UsageError for an unknown one."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [each for each in names if each not in HEADS]
    if unknown:
        raise click.UsageError(f"expected --heads of {', '.join(HEADS)}, got {unknown[0]!r}")
    return names


def choose_shots(text: str) -> list[int]:
    """Return the numbers of --shots, ascending; click.UsageError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.UsageError(f"expected --shots of numbers such as 0,1,4,16, got {text!r}")
    return sorted({int(part) for part in parts})


def read_named(values: Sequence[str], read: Callable[[str, str], Any], option: str) -> dict[str, Any]:
    """Return what NAME=PATH options name, by name; a path alone has the name of its last part.

    Raises:
        click.UsageError: two of one name.
        ValueError: as the reader raises it.
    """
    contents: dict[str, Any] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or os.sep in name:
            name, path = Path(os.path.abspath(value)).name, value
        if name in contents:
            raise click.UsageError(f"expected different names with {option}, got {name} twice")
        contents[name] = read(name, path)
    return contents


def read_named_captions(images: str | None, name: str, path: str) -> Captions:
    """Return the captions of a file whose images are in a folder."""
    return read_captions(path, images)


def published_of(model: str, row: Row) -> Figure | None:
    """Return the published figure of a row, a verified one if there is one; None if no paper printed it."""
    figures = [
        figure
        for figure in published_figures()
        if (figure.data, figure.model, figure.head, figure.shots) == (row.data, model, row.head, row.shots)
        and figure.metric == row.metric
        and method_name(figure.method) == row.method
    ]
    return min(figures, key=lambda figure: not figure.verified, default=None)


@cache
def method_name(spec: str) -> str | None:
    """Return the name in rows of a published method, or None if ours computes something else."""
    try:
        return name_of(read_methods([spec], None, None)[0])
    except click.UsageError:
        return None


def show(report: Reporter, progress: Progress) -> bool:
    """Show how far an evaluation is; return true once a signal has come."""
    report.begin(progress.phase)
    return report(progress)
