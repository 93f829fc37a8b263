"""`clipkernels support build`: a support set of class names, from the user's own images or generated ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import click
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from clipkernels.cli.parts.classes import read_classes, warn_of_one
from clipkernels.cli.parts.heads import is_set
from clipkernels.cli.parts.images import exif_option
from clipkernels.cli.parts.model_libraries import loading
from clipkernels.cli.parts.models import choose_device, load_clip, model_options
from clipkernels.cli.parts.options import (
    batch_size_option,
    classes_file_option,
    classes_option,
    device_option,
    format_option,
    limit_option,
    output_option,
    precision_option,
    seed_option,
    template_option,
)
from clipkernels.cli.parts.output import opened, progress, write_results
from clipkernels.comparison.towers import DTYPES
from clipkernels.messages import quantity
from clipkernels.support import (
    ENSEMBLE,
    PHOTO,
    SupportSet,
    class_embeddings,
    combined,
    cupl,
    generate,
    load_pipeline,
    photo,
    refresh,
    retrieve,
)
from clipkernels.support.manifest import MANIFEST

EXAMPLE = """\b
Example:
  clipkernels demo --quick --model none --save-images pictures
  clipkernels support build digits --from-folder pictures/digits \\
    --per-class 4 --template 'the handwritten digit {}.' \\
    --classes zero,one,two,three,four,five,six,seven,eight,nine
  clipkernels support build digits
"""
SOURCES = {"from_folder": "--from-folder", "from_embeddings": "--from-embeddings", "diffusion": "--diffusion"}
ORIGINS = {"LC": "retrieved", "SD": "generated"}
RETRIEVAL = ("from_folder", "from_embeddings")
# The sources that read an option.
READERS: dict[str, tuple[str, ...]] = {
    "classes": tuple(SOURCES),
    "classes_file": tuple(SOURCES),
    "prompts": tuple(SOURCES),
    "sentences": tuple(SOURCES),
    "templates": tuple(SOURCES),
    "per_class": tuple(SOURCES),
    "minimum": RETRIEVAL,
    "shared": RETRIEVAL,
    "limit": RETRIEVAL,
    "no_exif": ("from_folder",),
    "no_copy": RETRIEVAL,
    "cache": ("from_folder",),
    "guidance": ("diffusion",),
    "steps": ("diffusion",),
    "seed": tuple(SOURCES),
}


@click.group(invoke_without_command=True, epilog=EXAMPLE)
@click.pass_context
def support(context: click.Context) -> None:
    """Build a support set: images that stand for classes, from the names of the classes alone."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@support.command(epilog=EXAMPLE, short_help="Build a support set, or update one.")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False))
@classes_option()
@classes_file_option
@click.option(
    "--from-folder", type=click.Path(exists=True, file_okay=False), help="Retrieve the images from this folder."
)
@click.option(
    "--from-embeddings",
    type=click.Path(exists=True, dir_okay=False),
    help="Retrieve them from the file of features that --from-folder wrote.",
)
@click.option("--diffusion", metavar="MODEL|DIR", help="Generate them with a Stable Diffusion model of diffusers.")
@click.option(
    "--prompts",
    type=click.Choice(["photo", "ensemble", "cupl", "combined"]),
    default="photo",
    show_default=True,
    help="photo: one template; ensemble: seven; cupl: a language model's sentences; combined: sentences and templates.",
)
@click.option("--cupl", "sentences", type=click.Path(exists=True, dir_okay=False), help="JSON of {class: [sentences]}.")
@template_option
@click.option("--per-class", type=click.IntRange(min=1), default=100, show_default=True, help="Images per class.")
@click.option("--minimum", type=float, help="Least similarity of a retrieved image, such as 0.2.")
@click.option("--shared", is_flag=True, help="Retrieve an image for several classes, not for its likeliest one alone.")
@limit_option()
@exif_option
@click.option(
    "--cache", type=click.Path(dir_okay=False), help="File of the folder's features, which stays.  [default: beside it]"
)
@click.option("--no-copy", is_flag=True, help="Do not copy the retrieved images.")
@click.option("--guidance", type=float, default=9.5, show_default=True, help="Scale of classifier-free guidance.")
@click.option("--steps", type=click.IntRange(min=1), default=85, show_default=True, help="Denoising steps.")
@seed_option("the noise, or of the draw of --limit")
@model_options
@batch_size_option(64)
@device_option
@precision_option
@format_option
@output_option
@click.pass_context
def build(
    context: click.Context,
    folder: str,
    classes: str | None,
    classes_file: str | None,
    from_folder: str | None,
    from_embeddings: str | None,
    diffusion: str | None,
    prompts: str,
    sentences: str | None,
    templates: tuple[str, ...],
    per_class: int,
    minimum: float | None,
    shared: bool,
    limit: int | None,
    no_exif: bool,
    cache: str | None,
    no_copy: bool,
    guidance: float,
    steps: int,
    seed: int,
    library: str,
    name: str | None,
    pretrained: str | None,
    batch_size: int,
    device: str | None,
    precision: str,
    form: str,
    output: str | None,
) -> None:
    """Build a support set in DIR: a folder of images per class, their features, and a manifest.

    The images are retrieved from yours with --from-folder, or generated with --diffusion. Without a source, DIR is a
    support set whose images you have added to or deleted from, and the new images are encoded.

    Everything is saved at once: the same command resumes where it was stopped. A folder is searched as in classify,
    with its limits of size and format. Beside it stays FOLDER.KEY.safetensors, its features, so that the next set needs
    no encoding; delete it as you like. A file that cannot be read as an image is reported on stderr and skipped, and
    the exit status is then 1. The result lists the images of each class and their mean similarity to the
    class's prompts.
    """
    source = check_source(context)
    notes: list[str] = []
    try:
        wording = None
        if source is not None:
            wording = read_prompts(read_classes(classes, classes_file), prompts, sentences, templates)
        where = choose_device(device)
        model, preprocess, tokenizer = load_clip(library, name, pretrained)
        model = model.to(where, DTYPES[precision]).eval()
        failures: list[str] = []
        with opened(output) as stream, progress() as bar:

            def report(line: str) -> None:
                failures.append(line)
                bar.console.print(Text(line), soft_wrap=True)

            options: dict[str, Any] = {"batch_size": batch_size, "progress": stage_progress(bar), "report": report}
            manifest: dict[str, Any] = {"name": name or "bundled", "pretrained": pretrained, "per_class": per_class}
            if wording is None:
                built = refresh(folder, model, preprocess, **options)
            elif diffusion is not None:
                with loading(diffusion, None):
                    pipeline = load_pipeline(diffusion, where)
                settings: dict[str, Any] = {"guidance": guidance, "steps": steps, "seed": seed}
                built = generate(model, preprocess, wording, pipeline, folder, **settings, **manifest, **options)
            else:
                images = from_folder or from_embeddings or ""
                options |= {"minimum": minimum, "shared": shared, "limit": limit, "seed": seed, "exif": not no_exif}
                options |= {"cache": cache, "note": notes.append}
                built = retrieve(model, preprocess, tokenizer, wording, images, **manifest, **options)
                built.save(folder, copy=not no_copy)
            write(built, tabulate(built, model, tokenizer), folder, form, stream)
    except (ValueError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    origin = ORIGINS[built.about["kind"]]
    summary = f"{quantity(len(built.images), f'{origin} image')} of {quantity(len(built.classes), 'class')} in {folder}"
    click.echo(f"{summary}; {len(failures)} skipped" if failures else summary, err=True)
    warn_of_one(built.classes)
    for line in notes:
        click.echo(line, err=True)
    if failures:
        context.exit(1)


def check_source(context: click.Context) -> str | None:
    """Return the source of the images, a key of SOURCES, or None without one.

    Raises:
        click.UsageError: several sources, an option that another source reads, or no source and no support set.
    """
    if is_set(context, "seed") and context.params["diffusion"] is None and context.params["limit"] is None:
        raise click.UsageError("expected --diffusion or --limit with --seed, got neither")
    sources = [source for source in SOURCES if context.params[source] is not None]
    if len(sources) > 1:
        raise click.UsageError(f"expected one of {', '.join(SOURCES.values())}, got {len(sources)}")
    source = sources[0] if sources else None
    options = {option.name: option.opts[0] for option in context.command.params}
    for option, owners in READERS.items():
        if is_set(context, option) and source not in owners:
            expected, actual = (
                " or ".join(SOURCES[owner] for owner in owners),
                SOURCES.get(source or "", "none of these"),
            )
            raise click.UsageError(f"expected {expected} with {options[option]}, got {actual}")
    folder = context.params["folder"]
    if source is None and not (Path(folder) / MANIFEST).is_file():
        advice = "give --from-folder or --diffusion to build one"
        raise click.UsageError(f"expected a support set, got {folder} without {MANIFEST}: {advice}")
    return source


def read_prompts(
    classes: Sequence[str], kind: str, sentences: str | None, templates: Sequence[str]
) -> dict[str, list[str]]:
    """Return the prompts of each class.

    Raises:
        click.UsageError: --cupl without a kind that reads it, or a kind that needs --cupl without it.
        ValueError: as in `photo` and `cupl`.
    """
    reads_sentences = kind in ("cupl", "combined")
    if reads_sentences and sentences is None:
        raise click.UsageError(f"expected --cupl with --prompts {kind}, got none")
    if sentences is not None and not reads_sentences:
        raise click.UsageError(f"expected --prompts cupl or combined with --cupl, got {kind}")
    if templates and kind in ("ensemble", "cupl"):
        raise click.UsageError(f"expected --prompts photo or combined with --template, got {kind}")
    if kind == "cupl":
        return cupl(classes, sentences or "")
    templated = photo(classes, templates or (PHOTO if kind == "photo" else ENSEMBLE))
    return combined(templated, cupl(classes, sentences or "")) if reads_sentences else templated


def stage_progress(bar: Progress) -> Callable[[str, int, int], None]:
    """Return a function of stage, done and total that shows a bar per stage."""
    tasks: dict[str, Any] = {}

    def step(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total)
        bar.update(tasks[stage], completed=done)

    return step


def tabulate(built: SupportSet, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Return a row per class: its images, and their mean cosine to the class embedding."""
    text = class_embeddings(model, tokenizer, built.prompts).to(built.features.device)
    cosines = (built.features * text[built.labels]).sum(1)
    sums = cosines.new_zeros(len(built.classes)).index_add_(0, built.labels, cosines)
    means = (sums / built.counts).tolist()
    rows = zip(built.classes, built.counts.tolist(), means, strict=True)
    return [{"class": name, "images": count, "similarity": round(mean, 6)} for name, count, mean in rows]


def write(built: SupportSet, rows: Sequence[dict[str, Any]], folder: str, form: str, stream: TextIO) -> None:
    """Write the rows as a table, as JSON with the settings of the set, or as CSV."""

    def draw() -> Iterator[Table]:
        table = Table("class", "images", "similarity")
        for row in rows:
            table.add_row(Text(row["class"]), str(row["images"]), f"{row['similarity']:.4f}")
        yield table

    write_results(form, stream, rows, {"folder": folder, **built.about, "classes": rows}, draw)
