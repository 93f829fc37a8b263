"""`clipkernels bench`: cost, speed, fidelity and memory of every method, on a user's own tower and images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

import click
import torch
from rich.progress import Progress
from rich.text import Text
from torch import Tensor
from torch.utils.data import DataLoader

from clipkernels.adapters import Tower
from clipkernels.cli.parts.bench_tables import title, write
from clipkernels.cli.parts.images import close, exif_option, find, no_images
from clipkernels.cli.parts.methods import METHOD_HELP, methods_for
from clipkernels.cli.parts.models import choose_device, load, model_options
from clipkernels.cli.parts.options import (
    PRECISIONS,
    batch_size_option,
    device_option,
    format_option,
    limit_option,
    once,
    output_option,
    plot_option,
    predictor_option,
    seed_option,
    tokens_option,
)
from clipkernels.cli.parts.output import opened, progress
from clipkernels.cli.parts.plot import draw_plot, plot_format
from clipkernels.comparison.choice import MIN_AGREEMENT, choose
from clipkernels.comparison.runtimes import RUNTIMES
from clipkernels.comparison.towers import FREEZE, TIMED_BATCHES, Settings, measure
from clipkernels.data import Preprocess
from clipkernels.images import draw_images
from clipkernels.images.batches import Pictures, collate
from clipkernels.measure.timing import Clock
from clipkernels.messages import quantity, skip_message
from clipkernels.patching import method_of, tower_of, unpatch

MODES = (FREEZE, "default", "reduce-overhead", "max-autotune", *RUNTIMES)
NOTES = (
    "dense (host) is the library's own forward. Speed-ups and η are against the fastest dense row of the same "
    "precision, paired within rounds of all its rows in random order; JSON and CSV have their 10-90 % bands. ms is a "
    "median; images/s is the fastest dense row's times the speed-up.",
    "GMACs and ideal count the published schedule; η = speed-up ÷ (GMACs that the baseline ran ÷ GMACs that the row "
    "ran).",
    "cosine: of an image's embedding with the one of dense (host) in eager fp32, least / mean over {n} images; to "
    "fp32: with the one of the same method in eager fp32. same: share of the images whose nearest other image is the "
    "same under dense (host) in eager fp32.",
    "MiB: the most memory that the forward of one batch holds beyond weights and images, as PyTorch's allocator counts "
    "it; empty under CUDA graphs, which have a memory pool of their own, and in other runtimes.",
)
MEANINGLESS = {"weights": "the weights are random", "images": "the images are random noise"}
RANDOM_WEIGHTS = (
    "The weights are random: speed does not depend on them, but cosine and same say nothing about trained weights."
)
RANDOM_IMAGES = (
    "The images are random noise: speed does not depend on them, but cosine and same say nothing about photographs."
)

EXAMPLE = """\b
Example:
  clipkernels demo --quick --model none --save-images pictures
  clipkernels bench pictures --methods evit:0.5,tome:8 --rounds 3 \\
    --precision fp32 --precision bf16
"""


@click.command(epilog=EXAMPLE)
@click.argument("images", nargs=-1)
@model_options
@limit_option(256)
@seed_option("the draw of --limit, or of the random noise")
@exif_option
@click.option("--method", "specs", multiple=True, metavar="SPEC", help=f"{METHOD_HELP} May be repeated.")
@once(
    "--methods",
    metavar="SPEC,…",
    help="Several at once, such as evit:0.7,tome:8. Dense always runs too.  [default: tome at the cost of evit:0.7, "
    "evit:0.7 and evit:0.5]",
)
@predictor_option
@tokens_option
@click.option(
    "--compile",
    "modes",
    multiple=True,
    type=click.Choice(["none", *MODES]),
    metavar="MODE",
    help="Add rows of compiled towers to the eager ones; may be repeated. freeze is ck.compile with frozen weights, "
    "the fast way on a CPU; onnxruntime and openvino run the exported tower on a CPU; default, max-autotune and "
    "reduce-overhead, which is CUDA graphs, are modes of torch.compile.  [default: none]",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(PRECISIONS),
    default=PRECISIONS[:1],
    show_default=True,
    help="Precision of the model; may be repeated.",
)
@batch_size_option(8)
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True, help="Timed runs per row.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's choice]")
@click.option(
    "--clock",
    type=click.Choice(["wall", "process"]),
    default="wall",
    show_default=True,
    help="process: CPU time of one thread, for machines that others use.",
)
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1, max_open=True),
    default=MIN_AGREEMENT,
    show_default=True,
    metavar="SHARE",
    help="Least share of images whose nearest other image stays the same, for the method that the last line takes.",
)
@device_option
@format_option
@output_option
@plot_option("speed-up and cosine")
@click.pass_context
def bench(
    context: click.Context,
    images: tuple[str, ...],
    library: str,
    name: str | None,
    pretrained: str | None,
    limit: int,
    seed: int,
    no_exif: bool,
    specs: tuple[str, ...],
    methods: str | None,
    predictor: str | None,
    tokens: str | None,
    modes: tuple[str, ...],
    precisions: tuple[str, ...],
    batch_size: int,
    rounds: int,
    threads: int | None,
    clock: str,
    min_agreement: float,
    device: str | None,
    form: str,
    output: str | None,
    plot: str | None,
) -> None:
    """Time your tower, dense and with every method, and compare the embeddings.

    IMAGES are files, folders or quoted globs, as in classify, with its limits of size and format; without any, random
    noise stands in. Random weights do not change the speed, but cosine and agreement then say nothing about trained
    weights.

    Each row is a method in one precision and mode: tokens, GMACs, images/s; speed-up and η, the share of the saved
    operations that became saved time, against the fastest dense row of that precision, with all rows interleaved; the
    least and the mean cosine of an image's embedding with the one of the library's own dense fp32 forward; the share of
    images whose nearest other image by cosine stays the same, which needs two images; and the most memory that one
    forward holds beyond weights and images.

    The last line takes, for each precision, the fastest method that is faster than dense in nine rounds of ten and
    whose share of same nearest images lies above --min-agreement with its whole 95 % interval; else dense. It has the
    figures that decided. Few images decide for dense, and so do random images and weights.

    A warning on stderr names a method whose bf16 or fp16 embeddings are far from its own in fp32: a cosine below 0.99,
    or values that are not finite. A file that cannot be read as an image is reported on stderr and skipped, and the
    exit status is then 1.
    """
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        picture_format = plot_format(plot) if plot else None
        where = choose_device(device)
        check_clock(clock, where)
        compiled = list(dict.fromkeys(mode for mode in modes if mode != "none"))
        settings = Settings(batch_size, rounds, cast(Clock, clock), compiled, where)
        found = find(images)
        paths = draw_images(found.paths, limit, seed)
        loaded = load(library, name, pretrained)
        tower = tower_of(loaded.model)
        listed = [part.strip() for part in methods.split(",")] if methods is not None else []
        chosen = methods_for(tower, [*listed, *specs], predictor, tokens, method_of(loaded.model))
        unpatch(loaded.model)
        if paths:
            pixels, failures = read(paths, loaded.preprocess, tower, exif=not no_exif)
        else:
            pixels, failures = noise(min(limit, TIMED_BATCHES * batch_size), tower, seed), 0
        with (
            opened(output) as stream,
            opened(plot, "--plot") if plot else nullcontext() as picture,
            progress() as bar,
        ):
            model = loaded.model.to(where)
            observer = Bar(bar, name or "the bundled CLIP")
            rows = measure(model, chosen, pixels, dict.fromkeys(precisions), settings, observer)
            run = {"library": library, "model": name or "bundled", "weights": loaded.weights, "images": len(pixels)}
            run |= {"image_source": "files" if paths else "random", "batch": batch_size}
            notes = [note.format(n=len(pixels)) for note in NOTES]
            notes += [RANDOM_WEIGHTS] * (loaded.weights == "random") + [RANDOM_IMAGES] * (not paths)
            meaningless = MEANINGLESS["weights"] if loaded.weights == "random" else None
            meaningless = meaningless if paths else MEANINGLESS["images"]
            choices = [
                choose(same, len(pixels), min_agreement, meaningless)
                for same in ([row for row in rows if row.precision == each] for each in dict.fromkeys(precisions))
            ]
            write(run, rows, notes, choices, settings, form, stream)
            if picture is not None and picture_format is not None:
                draw_plot([row.record() for row in rows], title(run, settings), picture.buffer, picture_format)
        close(found)
    except (ValueError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    finally:
        torch.set_num_threads(before)
    if failures:
        context.exit(1)


class Bar:
    """A progress bar on stderr, whose warnings begin with the tower's name."""

    def __init__(self, bar: Progress, tower: str) -> None:
        self.bar, self.tower, self.task = bar, tower, bar.add_task("", total=None)

    def start(self, total: int) -> None:
        self.bar.update(self.task, total=total)

    def describe(self, name: str) -> None:
        self.bar.update(self.task, description=name)

    def advance(self) -> None:
        self.bar.advance(self.task)

    def warn(self, line: str) -> None:
        self.bar.console.print(Text(f"warning: {self.tower}, {line}"), soft_wrap=True)


def check_clock(clock: str, device: torch.device) -> None:
    """Raise click.UsageError unless the clock measures how long the work takes."""
    if clock == "process" and device.type != "cpu":
        raise click.UsageError(f"expected --clock wall on {device}, whose work is not CPU time, got process")
    if clock == "process" and torch.get_num_threads() != 1:
        raise click.UsageError(f"expected --threads 1 with --clock process, got {torch.get_num_threads()}")


def noise(count: int, tower: Tower, seed: int) -> Tensor:
    """Return images of random noise (count,3,S,S), with a warning on stderr."""
    click.echo(
        f"warning: no IMAGES given: using {quantity(count, 'random-noise image')}; cosines mean little", err=True
    )
    return torch.randn(count, 3, *tower.image_size, generator=torch.Generator().manual_seed(seed))


def read(paths: Sequence[str], preprocess: Preprocess, tower: Tower, exif: bool) -> tuple[Tensor, int]:
    """Return preprocessed images (n,3,S,S) and the number of files that cannot be read.

    Args:
        paths: the files.
        preprocess: from an image to a tensor (3,S,S).
        tower: the tower that the images are for.
        exif: turn images as their EXIF orientation says.
    Raises:
        click.UsageError: none of the files is an image that the preprocessing makes fit the tower.
    """
    loaded, failures = [], 0
    for batch in DataLoader(Pictures(paths, preprocess, (3, *tower.image_size), exif=exif), 32, collate_fn=collate):
        for index, reason in batch.failed:
            click.echo(skip_message(paths[index], reason), err=True)
        failures += len(batch.failed)
        loaded += [] if batch.images is None else [batch.images]
    if not loaded:
        raise no_images(paths)
    return torch.cat(loaded), failures
