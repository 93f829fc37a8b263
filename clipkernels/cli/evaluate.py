"""`clipkernels evaluate`: accuracy of every method and head on labelled data sets, beside published figures."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import click
import torch

from clipkernels.cli.parts.cloud_sheet import draw_clouds
from clipkernels.cli.parts.evaluation_options import (
    STATE,
    check_clouds,
    check_combinations,
    choose_methods,
    choose_shots,
    read_named,
    read_named_captions,
)
from clipkernels.cli.parts.evaluation_report import describe, notes_of, published_of, records_of
from clipkernels.cli.parts.evaluation_tables import FILES, draw, write_report
from clipkernels.cli.parts.methods import METHOD_HELP, is_supported
from clipkernels.cli.parts.models import BUNDLED_NOTE, cast_towers, choose_device, load_clip, model_options
from clipkernels.cli.parts.options import (
    batch_size_option,
    choose_names,
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
from clipkernels.cli.parts.output import check_file, check_out, opened, write_results
from clipkernels.cli.parts.reporter import Reporter, duration
from clipkernels.cli.parts.stopping import stopping
from clipkernels.comparison.towers import DTYPES
from clipkernels.evaluation.datasets import DATASETS, read_dataset
from clipkernels.evaluation.evaluate import evaluate as evaluate_model
from clipkernels.evaluation.heads import HEADS
from clipkernels.evaluation.plan import Combinations, Model
from clipkernels.evaluation.published import published_model
from clipkernels.evaluation.results import Progress
from clipkernels.evaluation.speed import measure_speeds, noise_batch
from clipkernels.measure.environment import environment
from clipkernels.messages import quantity
from clipkernels.patching import unpatch
from clipkernels.pictures.files import check_suffix, save_picture
from clipkernels.run_folder import RUN
from clipkernels.support import ENSEMBLE, SupportSet

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
    "--views",
    type=click.Choice(["6", "10"]),
    help="Depth maps of each point cloud, of modelnet40 and scanobjectnn.  [default: 6]",
)
@once(
    "--picture",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Draw the views of the first point clouds of every set.",
)
@once(
    "--prompts",
    type=click.Choice(["single", "ensemble"]),
    default="single",
    show_default=True,
    help="Prompts of a class: the single template of the data set, or the seven of Tip-Adapter and SuS-X. Point clouds "
    "keep their template.",
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
    help="Labelled images per class, from the train split; 0 is for tip and tipx with --support.",
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
    views: str | None,
    picture: str | None,
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
    has. Without that split they are published ones, and the column says for which data. Few-shot draws are seeded and
    nested. A second table has GMACs, images/s, speed-up and η of the methods.

    modelnet40 and scanobjectnn hold point clouds. The heads zero-shot, calip and tip read the depth maps of a cloud and
    add up their logits, with weights of the views that are searched on a part of the training clouds.

    OUT gets results.csv, results.json, results.md and accuracy.png, with the rows of the last command. OUT/state keeps
    features and scores: the same command goes on after Ctrl-C or a kill, and more data, methods, heads or shots are
    scored beside what is there. The exit status is 1 if an image could not be read, or if a combination has no score.
    Nothing is downloaded.
    """
    began, before = time.monotonic(), torch.get_num_threads()
    folder = Path(os.path.abspath(out))
    try:
        if not sources and not captioned:
            raise click.UsageError("expected --data or --captions, got neither")
        torch.set_num_threads(threads or before)
        if images_folder is not None and not captioned:
            raise click.UsageError(f"expected --captions with --images {images_folder}, got none: add it")
        check_out(folder, FILES, f"{STATE}/{RUN}", "an evaluation")
        chosen, counts = choose_names(heads, "--heads", HEADS), choose_shots(shots)
        if picture is not None:
            check_suffix(picture)
        data = read_named(sources, partial(read_dataset, views=int(views or 6)), "--data")
        clouds = [content for content in data.values() if content.views > 1]
        check_clouds(clouds, views, picture)
        if prompts == "ensemble":
            photos = {each: content for each, content in data.items() if content.views == 1}
            data |= {each: content._replace(templates=ENSEMBLE) for each, content in photos.items()}
        if data:
            names = [value.partition("=")[0] for value in supported]
            check_combinations(chosen, counts, data.keys(), names)
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
        plan = Combinations(list(data.values()), supports, captions, scored, chosen, counts, seeds)
        folder.mkdir(parents=True, exist_ok=True)
        if picture is not None:
            check_file(picture, "--picture")  # only now, because it may be in OUT
            save_picture(draw_clouds(clouds), picture)
        with stopping("part") as stop, Reporter(stop, "evaluating") as report:
            results = evaluate_model(plan, settings, folder / STATE, lambda progress: show(report, progress))
            if not results.stopped and not results.rows:
                reasons = list(dict.fromkeys(skip.reason for skip in results.skips))
                raise click.UsageError(
                    f"expected a head that some data set has a score for, got none: {'; '.join(reasons)}"
                )
            speeds = {}
            if rounds and not results.stopped and is_supported(model):
                batch = noise_batch(settings)
                timed = measure_speeds(
                    settings, methods, batch, rounds, folder / STATE, lambda progress: show(report, progress)
                )
                speeds, results = timed or {}, results._replace(stopped=timed is None)
    except (ValueError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    finally:
        torch.set_num_threads(before)
    if results.stopped:
        click.echo(f"stopped in {report.activity}; the same command goes on", err=True)
        context.exit(128 + stop[0])
    records = records_of(results, speeds, partial(published_of, published_model(name, pretrained)))
    notes = notes_of(results, records, data, captions)
    title = f"{name or 'the bundled CLIP'}, {precision}"
    document = {
        "environment": environment(), "model": name or "bundled", "pretrained": pretrained, "library": library,
        "precision": precision, "batch": batch_size, "seeds": seeds, "notes": notes,
        "data": {each.name: describe(each) for each in data.values()},
        "rows": records,
    }  # fmt: skip
    write_report(folder, records, document, notes, title)
    with opened(None) as stream:
        write_results(form, stream, records, document, lambda: draw(records, notes, title))
    seconds = duration(time.monotonic() - began)
    click.echo(f"{quantity(len(records), 'row')} in {seconds}: {folder / 'results.md'}", err=True)
    if results.skips or any(row.unread for row in results.rows):
        context.exit(1)


def show(report: Reporter, progress: Progress) -> bool:
    """Show how far an evaluation is; return true once a signal has come."""
    report.begin(progress.phase)
    report.item = progress.item
    return report(progress)
