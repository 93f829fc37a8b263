"""`clipkernels support build`: a support set from class names, of the user's own images or of generated ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import click
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from clipkernels.cli.parts.classes import read_classes
from clipkernels.cli.parts.heads import is_set
from clipkernels.cli.parts.models import choose_device, load_clip, loading
from clipkernels.cli.parts.output import opened, progress, write_table
from clipkernels.files import write_csv
from clipkernels.measure.towers import DTYPES
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

EXAMPLE = """\b
Example:
  clipkernels demo --quick --model none --save-images pictures
  clipkernels support build digits --from-folder pictures/digits --per-class 4 \\
    --template 'the handwritten digit {}.' --classes zero,one,two,three,four,five,six,seven,eight,nine
  clipkernels support build digits
"""
SOURCES = {"from_folder": "--from-folder", "from_embeddings": "--from-embeddings", "diffusion": "--diffusion"}
READERS = {
    **dict.fromkeys(("classes", "classes_file", "prompts", "sentences", "templates", "per_class"), tuple(SOURCES)),
    **dict.fromkeys(("minimum", "no_copy"), ("from_folder", "from_embeddings")),
    "cache": ("from_folder",),
    **dict.fromkeys(("guidance", "steps", "seed"), ("diffusion",)),
}


@click.group(invoke_without_command=True, epilog=EXAMPLE)
@click.pass_context
def support(context: click.Context) -> None:
    """Support sets: images that stand for classes, from the names of the classes alone."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@support.command(epilog=EXAMPLE)
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False))
@click.option("--classes", help="Class names, separated by commas.")
@click.option("--classes-file", type=click.Path(exists=True, dir_okay=False), help="Class names, one per line.")
@click.option("--from-folder", type=click.Path(exists=True, file_okay=False), help="Retrieve among these images.")
@click.option(
    "--from-embeddings",
    type=click.Path(exists=True, dir_okay=False),
    help="The same, from the file of features that --from-folder left.",
)
@click.option("--diffusion", metavar="MODEL|DIR", help="Generate with a Stable Diffusion of diffusers.")
@click.option(
    "--prompts",
    type=click.Choice(["photo", "ensemble", "cupl", "combined"]),
    default="photo",
    show_default=True,
    help="photo: one template; ensemble: seven; cupl: a language model's sentences; combined: these and the templates.",
)
@click.option("--cupl", "sentences", type=click.Path(exists=True, dir_okay=False), help="JSON of {class: [sentences]}.")
@click.option("--template", "templates", multiple=True, help="Prompt with {} for the class; may be repeated.")
@click.option("--per-class", type=click.IntRange(min=1), default=100, show_default=True, help="Images per class.")
@click.option("--minimum", type=float, help="The least similarity of a retrieved image, such as 0.2.")
@click.option("--cache", type=click.Path(dir_okay=False), help="Keep the folder's features here  [default: beside it]")
@click.option("--no-copy", is_flag=True, help="Leave the retrieved images where they are.")
@click.option("--guidance", type=float, default=9.5, show_default=True, help="Scale of classifier-free guidance.")
@click.option("--steps", type=click.IntRange(min=1), default=85, show_default=True, help="Steps of denoising.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the noise.")
@click.option("--model", "name", help="open_clip model  [default: the small one that ships with the package]")
@click.option("--pretrained", help="open_clip's tag for weights, which it downloads, or a checkpoint file.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--device", help="Such as cpu or cuda:1  [default: cuda where there is one]")
@click.option("--precision", type=click.Choice(list(DTYPES)), default="fp32", show_default=True)
@click.option("--format", "form", type=click.Choice(["table", "json", "csv"]), default="table", show_default=True)
@click.option("--output", type=click.Path(), help="Write the table here instead of to stdout.")
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
    cache: str | None,
    no_copy: bool,
    guidance: float,
    steps: int,
    seed: int,
    name: str | None,
    pretrained: str | None,
    batch_size: int,
    device: str | None,
    precision: str,
    form: str,
    output: str | None,
) -> None:
    """Build a support set in DIR: a folder of images per class, their features, and a manifest.

    The images are retrieved from your own with --from-folder, or generated with --diffusion. Without either, DIR is a
    support set whose images you have added to or deleted from: what is new is encoded.

    What is done is on disk at once: the same command goes on where it was stopped. A file that is no image is named on
    stderr, and the exit status is then 1. Per class: the images, and their mean similarity to the class's prompts.
    """
    source = check_source(context)
    try:
        said = (
            None if source is None else read_prompts(read_classes(classes, classes_file), prompts, sentences, templates)
        )
        where = choose_device(device)
        model, preprocess, tokenizer = load_clip(name, pretrained)
        model = model.to(where, DTYPES[precision]).eval()
        failures: list[str] = []
        with opened(output) as stream, progress() as bar:

            def report(line: str) -> None:
                failures.append(line)
                bar.console.print(Text(line), soft_wrap=True)

            options: dict[str, Any] = {"batch_size": batch_size, "progress": shown(bar), "report": report}
            named: dict[str, Any] = {"name": name or "bundled", "pretrained": pretrained, "per_class": per_class}
            if said is None:
                found = refresh(folder, model, preprocess, **options)
            elif diffusion is not None:
                with loading(diffusion, None):
                    pipeline = load_pipeline(diffusion, where)
                settings: dict[str, Any] = {"guidance": guidance, "steps": steps, "seed": seed}
                found = generate(model, preprocess, said, pipeline, folder, **settings, **named, **options)
            else:
                images = from_folder or from_embeddings or ""
                options = {"minimum": minimum, "cache": cache, **named, **options}
                found = retrieve(model, preprocess, tokenizer, said, images, **options)
                found.save(folder, copy=not no_copy)
            write(found, tabulate(found, model, tokenizer), folder, form, stream)
    except (ValueError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        came = f"{error.filename or folder}: {error.strerror or error}"
        raise click.UsageError(f"expected files that can be read and written, got {came}") from error
    kind, count = found.about["kind"], len(found.images)
    summary = f"{count} images of {len(found.classes)} classes in {folder}, {kind}"
    click.echo(f"{summary}; {len(failures)} left out" if failures else summary, err=True)
    if failures:
        context.exit(1)


def check_source(context: click.Context) -> str | None:
    """The option that says where images come from, None for those that are there.

    Raises:
        click.UsageError: several, or an option that is for another.
    """
    named = [source for source in SOURCES if context.params[source] is not None]
    if len(named) > 1:
        raise click.UsageError(f"expected one of {', '.join(SOURCES.values())}, got {len(named)}")
    source = named[0] if named else None
    options = {option.name: option.opts[0] for option in context.command.params}
    for option, owners in READERS.items():
        if is_set(context, option) and source not in owners:
            wanted, came = " or ".join(SOURCES[owner] for owner in owners), SOURCES.get(source or "", "none of these")
            raise click.UsageError(f"expected {wanted} with {options[option]}, got {came}")
    return source


def read_prompts(
    classes: Sequence[str], kind: str, sentences: str | None, templates: Sequence[str]
) -> dict[str, list[str]]:
    """The prompts that the options describe.

    Raises:
        click.UsageError: sentences that are missing or not asked for.
        ValueError: as in `photo` and `cupl`.
    """
    written = kind in ("cupl", "combined")
    if written != (sentences is not None):
        wanted = (
            f"expected --cupl with --prompts {kind}" if written else "expected --prompts cupl or combined with --cupl"
        )
        raise click.UsageError(f"{wanted}, got {'none' if written else kind}")
    if templates and kind in ("ensemble", "cupl"):
        raise click.UsageError(f"expected --prompts photo or combined with --template, got {kind}")
    if kind == "cupl":
        return cupl(classes, sentences or "")
    drawn = photo(classes, templates or (PHOTO if kind == "photo" else ENSEMBLE))
    return combined(drawn, cupl(classes, sentences or "")) if written else drawn


def shown(bar: Progress) -> Callable[[str, int, int], None]:
    """What shows how far each stage is."""
    tasks: dict[str, Any] = {}

    def step(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done)

    return step


def tabulate(found: SupportSet, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Per class its images and their mean cosine to its embedding."""
    text = class_embeddings(model, tokenizer, found.prompts).to(found.features.device)
    cosines = (found.features * text[found.labels]).sum(1)
    sums = cosines.new_zeros(len(found.classes)).index_add_(0, found.labels, cosines)
    means = (sums / found.counts).tolist()
    rows = zip(found.classes, found.counts.tolist(), means, strict=True)
    return [{"class": name, "images": count, "similarity": round(mean, 6)} for name, count, mean in rows]


def write(found: SupportSet, rows: Sequence[dict[str, Any]], folder: str, form: str, stream: TextIO) -> None:
    """The rows as a table, as JSON with what made them, or as CSV."""
    if form == "csv":
        write_csv(rows, stream)
    elif form == "json":
        json.dump({"folder": folder, **found.about, "classes": rows}, stream, indent=2)
        stream.write("\n")
    else:
        table = Table("class", "images", "similarity")
        for row in rows:
            table.add_row(Text(row["class"]), str(row["images"]), f"{row['similarity']:.4f}")
        write_table(table, stream)
