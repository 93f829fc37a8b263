"""`clipkernels classify`: the class of every image in some files and folders."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import click
import torch
from rich.text import Text
from torch import nn
from torch.utils.data import DataLoader

from clipkernels.adapters import UnsupportedTower
from clipkernels.classifier import Classifier
from clipkernels.cli.parts.classes import read_classes, read_labels
from clipkernels.cli.parts.guesses import Guess, writer
from clipkernels.cli.parts.heads import check_head, choose_head, kept
from clipkernels.cli.parts.methods import choose_method
from clipkernels.cli.parts.models import choose_device, load_clip
from clipkernels.cli.parts.output import opened, progress, schedule
from clipkernels.heads import Reservoir
from clipkernels.heads.presets import CALIP_PRESETS, RESERVOIR_PRESETS
from clipkernels.images import Pictures, collate, find_images
from clipkernels.measure.timing import plan_for
from clipkernels.measure.towers import DTYPES
from clipkernels.methods import Dense
from clipkernels.patching import method_of, tower_of
from clipkernels.support import SupportSet

MIN_IMAGES_FOR_WORKERS = 256


EXAMPLE = """\b
Example:
  clipkernels demo --quick --model none --save-images pictures
  clipkernels classify pictures/digits --folder-labels --method evit --keep 0.7 \\
    --classes zero,one,two,three,four,five,six,seven,eight,nine
  clipkernels classify pictures/digits --folder-labels --shuffle 0 --adapt tca --reservoir digits.safetensors \\
    --classes zero,one,two,three,four,five,six,seven,eight,nine
  clipkernels support build support --from-folder pictures/digits --per-class 4 \\
    --classes zero,one,two,three,four,five,six,seven,eight,nine
  clipkernels classify pictures/digits --folder-labels --head tipx --support support
  clipkernels rank pictures/digits --folder-labels --window 4 --stride 4 --step 32 --limit 8 --output ranks.safetensors
  clipkernels train-predictor ranks.safetensors --epochs 5 --output predictor.safetensors
  clipkernels classify pictures/digits --folder-labels --method patch-ranking --predictor predictor.safetensors \\
    --classes zero,one,two,three,four,five,six,seven,eight,nine
"""


@click.command(epilog=EXAMPLE)
@click.argument("images", nargs=-1, required=True)
@click.option("--classes", help="Class names, separated by commas.")
@click.option("--classes-file", type=click.Path(exists=True, dir_okay=False), help="Class names, one per line.")
@click.option("--template", "templates", multiple=True, help="Prompt with {} for the class; may be repeated.")
@click.option("--model", "name", help="open_clip model  [default: the small one that ships with the package]")
@click.option("--pretrained", help="open_clip's tag for weights, which it downloads, or a checkpoint file.")
@click.option(
    "--method",
    type=click.Choice(["dense", "evit", "tome", "tca", "patch-ranking", "none"]),
    help="none is the host library's own forward  [default: dense; tca with --adapt; none where the tower cannot be "
    "served]",
)
@click.option(
    "--keep",
    type=float,
    help="Share of patches kept, by evit in every step, by patch-ranking in its one  [default: 0.7; for "
    "patch-ranking the share that its predictor was trained for]",
)
@click.option("--r", type=int, default=8, show_default=True, help="tome: tokens merged per block.")
@click.option("--rate", type=float, default=0.035, show_default=True, help="tca: what is dropped, such as 0.1.")
@click.option("--blocks", help="evit, tca: zero-based blocks that prune, such as 3,6,9.")
@click.option(
    "--predictor", type=click.Path(exists=True, dir_okay=False), help="patch-ranking: what train-predictor made."
)
@click.option(
    "--tokens", type=click.Path(exists=True, dir_okay=False), help="patch-ranking: learnt tokens, as fit_tokens saves."
)
@click.option(
    "--head",
    type=click.Choice(["zero-shot", "calip", "tip", "tipx"]),
    help="calip reads the patches, too; tip (Tip-Adapter) and tipx (TIP-X) a support set  [default: zero-shot]",
)
@click.option("--support", "support", type=click.Path(exists=True, file_okay=False), help="What support build made.")
@click.option("--adapt", type=click.Choice(["tca"]), help="Learn from the stream: remember the surest of each class.")
@click.option(
    "--preset",
    type=click.Choice(sorted({*RESERVOIR_PRESETS, *CALIP_PRESETS})),
    default="imagenet",
    show_default=True,
    help="Published settings, for --adapt and --head calip.",
)
@click.option("--reservoir", help="With --adapt: go on from this file where it exists; kept up to date as it learns.")
@click.option("--frozen", is_flag=True, help="With --reservoir: use what was learnt, learn nothing more.")
@click.option("--shuffle", type=int, metavar="SEED", help="Take the images in a random order.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--workers", type=click.IntRange(min=0), help="Loader processes  [default: up to 4, 0 for few images]")
@click.option("--device", help="Such as cpu or cuda:1  [default: cuda where there is one]")
@click.option("--precision", type=click.Choice(list(DTYPES)), default="fp32", show_default=True)
@click.option("--folder-labels", is_flag=True, help="A file's folder is its true class: report the accuracy.")
@click.option("--format", "form", type=click.Choice(["table", "csv", "jsonl"]), default="table", show_default=True)
@click.option("--output", type=click.Path(), help="Write here instead of to stdout; appears when complete.")
@click.pass_context
def classify(
    context: click.Context,
    images: tuple[str, ...],
    classes: str | None,
    classes_file: str | None,
    templates: tuple[str, ...],
    name: str | None,
    pretrained: str | None,
    method: str | None,
    keep: float | None,
    r: int,
    rate: float,
    blocks: str | None,
    predictor: str | None,
    tokens: str | None,
    head: str | None,
    support: str | None,
    adapt: str | None,
    preset: str,
    reservoir: str | None,
    frozen: bool,
    shuffle: int | None,
    batch_size: int,
    workers: int | None,
    device: str | None,
    precision: str,
    folder_labels: bool,
    form: str,
    output: str | None,
) -> None:
    """Name the class of every image.

    Per image: the path, then the likeliest class and its probability, then the next.

    IMAGES are files, folders or quoted globs. A folder is searched through for files whose names end like an image's
    (.jpg, .png, .webp, …); a file that is named, or matched by a glob, is always tried. A file that is no image is
    named on stderr, the others still run, and the exit status is then 1.

    With --adapt images are a stream: what comes first helps with what follows, and what is sorted by class misleads.
    """
    try:
        check_head(context, head, adapt, preset, reservoir, frozen)
        by_name = support is None or classes is not None or classes_file is not None
        named = read_classes(classes, classes_file) if by_name else None
        paths = list(find_images(images))
        if shuffle is not None:
            random.Random(shuffle).shuffle(paths)
        if method == "none" and adapt:
            raise click.UsageError("expected a method that condenses, reduces or is dense with --adapt, got none")
        chosen = choose_method(context, method, keep, r, rate, blocks, predictor, tokens, adapt)
        where = choose_device(device)
        model, preprocess, tokenizer = load_clip(name, pretrained)
        model = model.to(where, DTYPES[precision]).eval()
        if method is None and not servable(model):
            chosen = None
        found = None if support is None else SupportSet.load(support, model)
        names = list(found.classes) if found else named or []
        if found and named and set(named) != set(names):
            raise click.UsageError(f"expected the classes of {support} ({', '.join(names)}), got {', '.join(named)}")
        labels = read_labels(paths, names) if folder_labels else None
        prompts = templates or (found.prompts if found else ("a photo of a {}.",))
        make = choose_head(head, adapt, preset, frozen, found)
        classifier = Classifier(model, tokenizer, names, prompts, chosen, make)
        if workers is None:
            workers = min(4, os.cpu_count() or 1) if len(paths) >= MIN_IMAGES_FOR_WORKERS else 0
        loader = DataLoader(
            Pictures(paths, preprocess),
            batch_size,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=where.type == "cuda",
        )
        with kept(classifier, reservoir) as keep_up, opened(output) as stream:
            failures = run(classifier, loader, paths, labels, DTYPES[precision], where, form, stream, keep_up)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if failures:
        context.exit(1)


def servable(model: nn.Module) -> bool:
    """Whether the model's tower can be patched."""
    try:
        tower_of(model)
    except UnsupportedTower:
        return False
    return True


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
    keep_up: Callable[[], None],
) -> int:
    """Every image's guess to the stream as it comes, a summary to stderr; how many files were no images."""
    write = writer(form, stream)
    done, right, failures, inside, unsure = 0, 0, 0, 0.0, 0.0
    start = time.perf_counter()
    with progress(quiet=form != "table" and stream.isatty()) as bar:
        task = bar.add_task("classifying", total=len(paths))
        for batch in loader:
            for index, reason in batch.failed:
                failures += 1
                bar.console.print(Text(f"no image: {paths[index]}: {reason}"), soft_wrap=True)
            if batch.images is not None:
                entered = time.perf_counter()
                shares = classifier(batch.images.to(device, dtype)).log_softmax(1).cpu()
                inside += time.perf_counter() - entered
                probabilities = shares.exp()
                unsure -= (probabilities * shares).nan_to_num(0.0).sum().item()
                keep_up()
                top = probabilities.topk(min(2, len(classifier.classes)))
                for index, values, ranked in zip(batch.indices, top.values.tolist(), top.indices.tolist(), strict=True):
                    names = [classifier.classes[k] for k in ranked]
                    label = labels[index] if labels else None
                    right += label == names[0]
                    write(Guess(paths[index], list(zip(names, values, strict=True)), label))
                done += len(batch.indices)
                bar.update(task, description=f"classifying, mean entropy {unsure / done:.2f}")
            bar.advance(task, len(batch.indices) + len(batch.failed))
    write(None)
    seconds = time.perf_counter() - start
    summary = [f"{done} images in {seconds:.2f} s: {done / seconds:.1f} images/s end to end"]
    if done:
        summary[0] += f", {done / inside:.1f} in the model"
        if isinstance(classifier.head, Reservoir):
            summary.append(f"mean entropy {unsure / done:.3f}, {int(classifier.head.counts.sum())} images remembered")
        if labels:
            summary.append(f"accuracy {100 * right / done:.2f} % ({right} of {done})")
    if failures:
        summary.append(f"{failures} no image")
    click.echo("; ".join([*summary[:1], describe(classifier.model), *summary[1:]]), err=True)
    return failures


def describe(model: nn.Module) -> str:
    """The method a model runs and its token counts."""
    if not servable(model):
        return f"the host's own {type(model.visual).__name__}"
    method, tower = method_of(model), tower_of(model)
    return f"{method or 'the host library, dense'}, tokens {schedule(plan_for(tower, method or Dense()).tokens)}"
