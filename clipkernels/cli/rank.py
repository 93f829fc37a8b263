"""`clipkernels rank`: golden rankings of image files, by an exhaustive search over the patches to drop."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast, get_args

import click
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from clipkernels.classifier import class_embeddings
from clipkernels.cli.parts.classes import choose_classes, read_labels, warn_of_one
from clipkernels.cli.parts.heads import is_set
from clipkernels.cli.parts.images import close, exif_option, find, no_images
from clipkernels.cli.parts.models import choose_device, load, load_clip, model_options
from clipkernels.cli.parts.options import (
    batch_size_option,
    classes_file_option,
    classes_option,
    device_option,
    format_option,
    limit_option,
    plot_option,
    precision_option,
    shuffle_option,
    template_option,
)
from clipkernels.cli.parts.output import PathCell, check_file, opened, progress, refuse_same, shorten, write_results
from clipkernels.cli.parts.plot import RankedImage, draw_rankings, plot_format
from clipkernels.comparison.towers import DTYPES
from clipkernels.images import Reader, draw_images
from clipkernels.images.batches import Pictures, image_shape, to_rgb
from clipkernels.learn.patch_ranking import Rankings, golden_ranking
from clipkernels.learn.patch_ranking.golden import Score
from clipkernels.messages import quantity, skip_message
from clipkernels.patching import tower_of
from clipkernels.support import PHOTO, photo

MAX_SHOWN = 12
MAX_NAME_COLUMNS = 24  # of a name above an image
OPTIONS = ("score", "window", "stride", "step", "block")

EXAMPLE = """\b
Example:
  clipkernels demo --quick --model none --save-images pictures
  clipkernels rank pictures/digits --folder-labels --limit 8 \\
    --window 4 --stride 4 --step 32 --output ranks.safetensors
"""


@click.command(epilog=EXAMPLE)
@click.argument("images", nargs=-1, required=True)
@click.option(
    "--output", type=click.Path(), required=True, help="Safetensors file; images that it holds are not ranked again."
)
@click.option(
    "--score",
    type=click.Choice(get_args(Score)),
    help="The output to preserve: label, the probability of the true class; confidence, that of the likeliest class; "
    "feature, the embedding.  [default: label with --folder-labels, else confidence]",
)
@click.option("--folder-labels", is_flag=True, help="A file's folder is its true class.")
@classes_option(default="the folders, with --folder-labels")
@classes_file_option
@template_option
@click.option("--window", type=int, default=2, show_default=True, help="Side of a window, in patches.")
@click.option("--stride", type=int, default=1, show_default=True, help="Distance between windows, in patches.")
@click.option("--step", type=int, default=10, show_default=True, help="Patches dropped per round.")
@click.option("--block", type=int, default=3, show_default=True, help="Zero-based block before which they are dropped.")
@limit_option()
@shuffle_option
@exif_option
@batch_size_option(64, "Variants of an image per forward.")
@model_options
@device_option
@precision_option
@plot_option(f"the first {MAX_SHOWN} images")
@format_option
@click.pass_context
def rank(
    context: click.Context,
    images: tuple[str, ...],
    output: str,
    score: str | None,
    folder_labels: bool,
    classes: str | None,
    classes_file: str | None,
    templates: tuple[str, ...],
    window: int,
    stride: int,
    step: int,
    block: int,
    limit: int | None,
    shuffle: int | None,
    no_exif: bool,
    batch_size: int,
    library: str,
    name: str | None,
    pretrained: str | None,
    device: str | None,
    precision: str,
    plot: str | None,
    form: str,
) -> None:
    """Find the order in which the patches of each image can be dropped, by what CLIP answers without them.

    This takes thousands of forwards per image of a ViT-B/16. train-predictor learns from the rankings which patches to
    keep in one forward.

    IMAGES are files, folders or quoted globs, as in classify, with its limits of size and format. Rankings are saved
    every few images: the same command resumes where it was stopped, and a command with more images ranks only the new
    ones. A file that cannot be read as an image is reported on stderr and skipped, and the exit status is then 1.
    """
    score = score or ("label" if folder_labels else "confidence")
    try:
        check_score(context, score)
        check_file(output)
        refuse_same({"--output": output, "--plot": plot})
        picture_format = plot_format(plot) if plot else None
        found = find(images)
        paths = found.paths
        names: list[str] = []
        if score != "feature":
            names = choose_classes(paths, classes, classes_file, folder_labels)
        paths = draw_images(paths, limit, shuffle)
        labels = [names.index(label) for label in read_labels(paths, names)] if folder_labels else None
        prompts = photo(names, templates or PHOTO) if names or score != "feature" else {}
        where = choose_device(device)
        text: Tensor | None = None
        if prompts:
            model, preprocess, tokenizer = load_clip(library, name, pretrained)
            model = model.to(where, DTYPES[precision]).eval()
            text = class_embeddings(model, tokenizer, prompts)
        else:
            model, preprocess, _ = load(library, name, pretrained)
            model = model.to(where, DTYPES[precision]).eval()
        options: dict[str, Any] = {
            "score": score,
            "window": window,
            "stride": stride,
            "step": step,
            "block": block,
            "batch_size": batch_size,
            "path": output,
            "text": text,
            "reader": Reader(not no_exif).rules,
        }
        warn_of_one(names)
        with opened(plot, "--plot") if plot else nullcontext() as sheet, progress() as bar:
            pictures = Pictures(paths, preprocess, image_shape(model, preprocess), exif=not no_exif)
            ranked = rank_files(model, pictures, labels if score == "label" else None, options, bar)
            if sheet is not None and picture_format is not None:
                settings = ", ".join(f"{option} {options[option]}" for option in OPTIONS)
                first = zip(ranked.places[:MAX_SHOWN], ranked.rankings.ranks, strict=False)
                ranked_images = [show(model, pictures, place, ranks) for place, ranks in first]
                title = f"The patches that stay longest are brightest ({settings})"
                draw_rankings(ranked_images, title, sheet.buffer, picture_format)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with opened(None) as stream:
        write(ranked, output, form, stream)
    click.echo(ranked.summary(), err=True)
    close(found)
    if ranked.failures:
        context.exit(1)


def check_score(context: click.Context, score: str) -> None:
    """Raise click.UsageError unless a score has the options that it needs and no option that it ignores."""
    if score == "label" and not context.params["folder_labels"]:
        raise click.UsageError("expected --folder-labels with --score label, got none")
    options = {option.name: option.opts[0] for option in context.command.params}
    for option in ("folder_labels", "classes", "classes_file", "templates"):
        if score == "feature" and is_set(context, option):
            raise click.UsageError(f"expected --score label or confidence with {options[option]}, got feature")


class Ranked(NamedTuple):
    """Rankings of the files at `places`, the number of files that cannot be read, and the seconds it took."""

    rankings: Rankings
    places: list[int]
    failures: int
    seconds: float

    @property
    def patches(self) -> int:
        """Patches per image."""
        return self.rankings.ranks.shape[1]

    @property
    def speed(self) -> float | None:
        """New images per second, or None without new images."""
        return self.rankings.new / self.seconds if self.rankings.new else None

    def summary(self) -> str:
        """Return one line about the run."""
        assert self.rankings.sha256 is not None
        new, different = self.rankings.new, len({bytes(row) for row in self.rankings.sha256.numpy()})
        images = f"{quantity(len(self.places), 'image')} of {quantity(self.patches, 'patch')}"
        parts = [f"{images}, {new} ranked in {self.seconds:.2f} s"]
        parts[0] += "" if self.speed is None else f": {self.speed:.2f} images/s"
        if different > new:
            parts.append(f"{different - new} ranked before")
        if len(self.places) > different:
            parts.append(quantity(len(self.places) - different, "duplicate"))
        if self.failures:
            parts.append(f"{quantity(self.failures, 'file')} skipped")
        return "; ".join(parts)


class Images(Sequence[Tensor | None]):
    """Preprocessed images (3,S,S) of files, each read when it is indexed.

    A file that cannot be read is None; its index is in `failed`, and the bar reports it.
    """

    def __init__(self, pictures: Pictures, bar: Progress) -> None:
        self.pictures, self.bar = pictures, bar
        self.failed: set[int] = set()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: Any) -> Any:
        _, image = self.pictures[index]
        if not isinstance(image, str):
            return image
        self.failed.add(index)
        self.bar.console.print(Text(skip_message(self.pictures.paths[index], image)), soft_wrap=True)
        return None


def rank_files(
    model: nn.Module, pictures: Pictures, labels: Sequence[int] | None, options: dict[str, Any], bar: Progress
) -> Ranked:
    """Return the rankings of the files that can be read; the others are reported on stderr.

    Raises:
        click.UsageError: none of the files is an image.
        ValueError: as in `golden_ranking`.
    """
    task, images = bar.add_task("ranking", total=len(pictures)), Images(pictures, bar)

    def step(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)

    start = time.perf_counter()
    try:
        rankings = golden_ranking(model, images, labels=labels, progress=step, **options)
    except ValueError as error:
        if len(images.failed) < len(images):
            raise
        raise no_images(pictures.paths) from error
    places = [place for place in range(len(images)) if place not in images.failed]
    return Ranked(rankings, places, len(images.failed), time.perf_counter() - start)


def show(model: nn.Module, pictures: Pictures, place: int, ranks: Tensor) -> RankedImage:
    """Return a file's image as the model sees it, and the ranks (P,) of its patches as a grid."""
    tower = tower_of(model)
    height, width = (side // tower.patch for side in tower.image_size)
    image = to_rgb(cast(Tensor, pictures[place][1]), pictures.preprocess)
    name = os.fsencode(os.path.join(*Path(pictures.paths[place]).parts[-2:])).decode(errors="replace")
    covered = image[:, : height * tower.patch, : width * tower.patch]
    return RankedImage(covered, ranks.view(height, width), shorten(name, MAX_NAME_COLUMNS))


def write(ranked: Ranked, path: str, form: str, stream: TextIO) -> None:
    """Write one row about the run as a table, JSON or CSV."""
    about = ranked.rankings.about
    record = {
        "file": path,
        "images": len(ranked.places),
        "ranked": ranked.rankings.new,
        "patches": ranked.patches,
        **{option: about[option] for option in OPTIONS},
        "seconds": round(ranked.seconds, 3),
        "images_per_second": None if ranked.speed is None else round(ranked.speed, 3),
    }

    def draw() -> Iterator[Table]:
        table = Table("images", "ranked", "patches", "seconds", "images/s", "file")
        speed = "" if ranked.speed is None else f"{ranked.speed:.2f}"
        cells = (len(ranked.places), ranked.rankings.new, ranked.patches, f"{ranked.seconds:.2f}", speed)
        table.add_row(*(Text(str(cell)) for cell in cells), PathCell(path))
        yield table

    write_results(form, stream, [record], record, draw)
