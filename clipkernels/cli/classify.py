"""`clipkernels classify`: the class of every image in files and folders."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import click
import torch
from rich.text import Text
from torch import nn
from torch.utils.data import DataLoader

from clipkernels.adapters import find_exported
from clipkernels.classifier import Classifier
from clipkernels.cli.parts.classes import choose_classes, read_labels, warn_of_one
from clipkernels.cli.parts.guesses import Guess, guess_writer
from clipkernels.cli.parts.heads import STREAM_HEADS, ReservoirFile, check_head, choose_head
from clipkernels.cli.parts.images import close, exif_option, find, warn_of_sorted
from clipkernels.cli.parts.methods import METHOD_HELP, is_supported, name_of, read_methods, settle
from clipkernels.cli.parts.models import cast_towers, choose_device, load_clip, model_options
from clipkernels.cli.parts.options import (
    FORMATS,
    batch_size_option,
    classes_file_option,
    classes_option,
    device_option,
    limit_option,
    once,
    output_option,
    precision_option,
    predictor_option,
    shuffle_option,
    template_option,
    tokens_option,
)
from clipkernels.cli.parts.output import opened, progress, schedule
from clipkernels.comparison.towers import DTYPES
from clipkernels.heads import TDA, Reservoir
from clipkernels.heads.presets import CALIP_PRESETS, RESERVOIR_PRESETS
from clipkernels.images import Reader, draw_images
from clipkernels.images.batches import Pictures, collate, image_shape
from clipkernels.measure.timing import plan_for
from clipkernels.messages import quantity, skip_message
from clipkernels.methods import Dense
from clipkernels.patching import method_of, tower_of
from clipkernels.support import SupportSet

MIN_IMAGES_FOR_WORKERS = 256
PRESETS = sorted({*RESERVOIR_PRESETS, *CALIP_PRESETS})

EXAMPLE = """\b
Example:
  clipkernels demo --quick --model none --save-images pictures
  clipkernels classify pictures/digits --folder-labels --adapt tca --shuffle 0
  clipkernels classify pictures/digits --method evit:0.7 --format csv \\
    --classes zero,one,two,three,four,five,six,seven,eight,nine
"""


@click.command(epilog=EXAMPLE)
@click.argument("images", nargs=-1, required=True)
@classes_option(default="the folders, with --folder-labels")
@classes_file_option
@template_option
@model_options
@once(
    "--method",
    "spec",
    metavar="SPEC",
    help=f"{METHOD_HELP}  [default: dense; tca with --adapt tca; none where the tower is not supported]",
)
@predictor_option
@tokens_option
@click.option(
    "--head",
    type=click.Choice(["zero-shot", "calip", "tip", "tipx"]),
    help="calip reads the patches, too; tip (Tip-Adapter) and tipx (TIP-X) read a support set.  [default: zero-shot]",
)
@click.option("--support", type=click.Path(exists=True, file_okay=False), help="The folder of support build.")
@click.option(
    "--adapt",
    type=click.Choice(list(STREAM_HEADS)),
    help="Adapt to the images: cache the most confident ones of each class; tda also caches uncertain ones.",
)
@click.option(
    "--preset",
    type=click.Choice(PRESETS),
    metavar="NAME",
    default="imagenet",
    show_default=True,
    help=f"Published settings, for --adapt and --head calip: {', '.join(PRESETS)}.",
)
@click.option("--reservoir", help="With --adapt: resume from this file if it exists; it is updated on the way.")
@click.option("--frozen", is_flag=True, help="With --reservoir: use its images, cache no others.")
@limit_option()
@shuffle_option
@exif_option
@batch_size_option(32)
@click.option("--workers", type=click.IntRange(min=0), help="Loader processes.  [default: up to 4, 0 for few images]")
@device_option
@precision_option
@click.option("--folder-labels", is_flag=True, help="Report the accuracy; a file's folder is its true class.")
@click.option(
    "--format",
    "form",
    type=click.Choice([*FORMATS, "jsonl"]),
    default="table",
    show_default=True,
    help="Format of the results; jsonl is an object per line.",
)
@output_option
@click.pass_context
def classify(
    context: click.Context,
    images: tuple[str, ...],
    classes: str | None,
    classes_file: str | None,
    templates: tuple[str, ...],
    library: str,
    name: str | None,
    pretrained: str | None,
    spec: str | None,
    predictor: str | None,
    tokens: str | None,
    head: str | None,
    support: str | None,
    adapt: str | None,
    preset: str,
    reservoir: str | None,
    frozen: bool,
    limit: int | None,
    shuffle: int | None,
    no_exif: bool,
    batch_size: int,
    workers: int | None,
    device: str | None,
    precision: str,
    folder_labels: bool,
    form: str,
    output: str | None,
) -> None:
    """Name the class of every image.

    Each row has the path, the likeliest class and its probability, and the second class with its probability. `csv` and
    `jsonl` rows appear one by one, a table or `json`, a list, when complete. Logits have the scale and the bias of the
    model. Where it has a bias, as SigLIP, probabilities are sigmoids and need not sum to one: a table heads them
    sigmoid, other rows have "probabilities": "sigmoid".

    IMAGES are files, folders or quoted globs. A folder, with those below it and those it links to, is searched for
    files whose names end like an image's (.jpg, .png, .webp, …); the others are counted on stderr. Hidden files are
    taken only when named. A file that is named, or matched by a glob, is always tried.

    JPEG, JPEG 2000, PNG, GIF, WebP, TIFF, BMP, PPM, AVIF where Pillow reads it, and HEIF where pillow-heif is installed
    are read, turned upright by their EXIF orientation. Files of more than 512 MiB, images of more pixels than Pillow's
    limit (89 million), images with sides beyond 200:1 and everything that is not a regular file are refused. A file
    that cannot be read as an image is reported on stderr and skipped, and the exit status is then 1.

    With --adapt the order matters: earlier images help to classify later ones, so do not sort them by class; --shuffle
    mixes them.
    """
    try:
        check_head(context, head, adapt, preset, reservoir, frozen)
        by_name = support is None or classes is not None or classes_file is not None
        found = find(images)
        class_names = choose_classes(found.paths, classes, classes_file, folder_labels) if by_name else None
        paths = draw_images(found.paths, limit, shuffle)
        if spec == "none" and adapt == "tca":
            raise click.UsageError("expected any method but none with --adapt tca, got --method none")
        specified = read_methods([spec] if spec is not None else [], predictor, tokens)
        [method] = specified or read_methods(["tca" if adapt == "tca" else "dense"], None, None)
        where = choose_device(device)
        model, preprocess, tokenizer = load_clip(library, name, pretrained)
        model = cast_towers(model, where, DTYPES[precision])
        method = settle(model, spec, method)
        support_set = None if support is None else SupportSet.load(support, model)
        if support_set:
            check_reader(support_set, Reader(not no_exif))
        names = list(support_set.classes) if support_set else class_names or []
        if support_set and class_names and set(class_names) != set(names):
            expected = f"expected the classes of {support} ({', '.join(names)})"
            raise click.UsageError(f"{expected}, got {', '.join(class_names)}")
        labels = read_labels(paths, names) if folder_labels else None
        prompts = templates or (support_set.prompts if support_set else ("a photo of a {}.",))
        make_head = choose_head(head, adapt, preset, frozen, support_set)
        classifier = Classifier(model, tokenizer, names, prompts, method, make_head)
        if workers is None:
            workers = min(4, os.cpu_count() or 1) if len(paths) >= MIN_IMAGES_FOR_WORKERS else 0
        loader = DataLoader(
            Pictures(paths, preprocess, image_shape(model, preprocess), exif=not no_exif),
            batch_size,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=where.type == "cuda",
        )
        with ReservoirFile(classifier.head, reservoir) as file, opened(output) as stream:
            warn_of_one(names)
            if adapt and not frozen and limit is None and shuffle is None:
                warn_of_sorted(paths)
            dtype = DTYPES[precision]
            failures = run(classifier, loader, paths, labels, dtype, where, form, stream, file.save_if_due)
        close(found)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if failures:
        context.exit(1)


def check_reader(support_set: SupportSet, reader: Reader) -> None:
    """Raise click.UsageError unless the photographs of a support set were read by the rules of a reader."""
    rules = support_set.about["reader"]
    if support_set.about["kind"] == "LC" and rules not in ("given", reader.rules):
        raise click.UsageError(
            f"expected a support set of images that were read alike (reader {reader.rules!r}), got {rules!r}: build it "
            "again, or give --no-exif to both or to neither"
        )


@torch.inference_mode()
def run(
    classifier: Classifier,
    loader: DataLoader[Any],
    paths: Sequence[str],
    labels: Sequence[str] | None,
    dtype: torch.dtype,
    device: torch.device,
    form: str,
    stream: TextIO,
    after_batch: Callable[[], None],
) -> int:
    """Write the guess of every image to the stream and a summary to stderr; return the number of skipped files."""
    write = guess_writer(form, stream, classifier.sigmoid)
    done, correct, failures, model_seconds, entropy = 0, 0, 0, 0.0, 0.0
    start = time.perf_counter()
    with progress(quiet=form != "table" and stream.isatty()) as bar:
        task = bar.add_task("classifying", total=len(paths))
        for batch in loader:
            for index, reason in batch.failed:
                failures += 1
                bar.console.print(Text(skip_message(paths[index], reason)), soft_wrap=True)
            if batch.images is not None:
                before = time.perf_counter()
                logits = classifier(batch.images.to(device, dtype)).cpu()
                model_seconds += time.perf_counter() - before
                logs = logits.log_softmax(1)
                entropy -= (logs.exp() * logs).nan_to_num(0.0).sum().item()
                after_batch()
                top = logits.topk(min(2, len(classifier.classes))).indices  # probabilities may be too small to differ
                probabilities = classifier.probabilities(logits).gather(1, top)
                for index, values, classes in zip(batch.indices, probabilities.tolist(), top.tolist(), strict=True):
                    names = [classifier.classes[k] for k in classes]
                    label = labels[index] if labels else None
                    correct += label == names[0]
                    write(Guess(paths[index], list(zip(names, values, strict=True)), label))
                done += len(batch.indices)
                bar.update(task, description=f"classifying, mean entropy {entropy / done:.2f}")
            bar.advance(task, len(batch.indices) + len(batch.failed))
    write(None)
    seconds = time.perf_counter() - start
    summary = [f"{quantity(done, 'image')} in {seconds:.2f} s: {done / seconds:.1f} images/s end to end"]
    if done:
        summary[0] += f", {done / model_seconds:.1f} in the model"
        if isinstance(classifier.head, (Reservoir, TDA)):
            cached = int(classifier.head.counts.sum())
            summary.append(f"mean entropy {entropy / done:.3f}, {quantity(cached, 'image')} cached")
        if classifier.sigmoid:
            summary.append("probabilities are sigmoids, one for each class by itself")
        if labels:
            summary.append(f"accuracy {100 * correct / done:.2f} % ({correct} of {done})")
    if failures:
        summary.append(f"{quantity(failures, 'file')} skipped")
    click.echo("; ".join([*summary[:1], describe(classifier.model), *summary[1:]]), err=True)
    return failures


def describe(model: nn.Module) -> str:
    """Return the method that a model runs and its token counts, for people."""
    exported = find_exported(model)
    if exported is not None:
        return f"{exported.method or 'dense'} in {exported.runtime}"
    if not is_supported(model):
        return f"the host's own {type(model.visual).__name__}"
    method, tower = method_of(model), tower_of(model)
    name = name_of(method) if method else "the host library, dense"
    return f"{name}, tokens {schedule(plan_for(tower, method or Dense()).tokens)}"
