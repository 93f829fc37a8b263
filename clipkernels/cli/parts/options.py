"""Options that several verbs share; without torch, so that a verb can print a line before it imports that."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import Any

import click

FORMATS = ("table", "json", "csv")
PRECISIONS = ("fp32", "bf16", "fp16")
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def once(*names: str, default: str | None = None, **attributes: Any) -> Decorator:
    """Return an option that is refused when it is repeated, because other verbs take several or because it is a list.

    Its value is a string, or None.
    """
    defaults = () if default is None else (default,)
    return click.option(*names, multiple=True, default=defaults, callback=_single, **attributes)


def _single(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> str | None:
    """Return the only value, or None without one; raise click.UsageError for several."""
    if len(values) > 1:
        listed = f"{', '.join(values[:-1])} and {values[-1]}"
        raise click.UsageError(f"expected one {option.opts[0]}, got {listed}")
    return values[0] if values else None


def choose_names(text: str, option: str, known: Collection[str]) -> list[str]:
    """Return the names of an option like --heads, each once; click.UsageError for an unknown one."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [each for each in names if each not in known]
    if unknown:
        raise click.UsageError(f"expected {option} of {', '.join(known)}, got {unknown[0]!r}")
    return names


def limit_option(default: int | None = None) -> Decorator:
    """Return --limit with a default, or without one."""
    return click.option(
        "--limit",
        type=click.IntRange(min=1),
        default=default,
        show_default=default is not None,
        help="Use at most this many images, drawn at random. A larger limit keeps the images of a smaller one.",
    )


def batch_size_option(default: int, content: str = "Images per forward.") -> Decorator:
    """Return --batch-size with a default and its help."""
    return click.option("--batch-size", type=click.IntRange(min=1), default=default, show_default=True, help=content)


def workers_option(content: str = "Loader processes.") -> Decorator:
    """Return --workers, of `default_workers` unless it is given."""
    return click.option("--workers", type=click.IntRange(min=0), help=f"{content}  [default: up to 4]")


def default_workers() -> int:
    """Return the CPUs that this process may use, at most 4."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def seed_option(content: str) -> Decorator:
    """Return --seed, of `content`."""
    return click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help=f"Seed of {content}.")


def plot_option(content: str) -> Decorator:
    """Return --plot, which draws `content`."""
    return click.option("--plot", type=click.Path(), help=f"Also draw {content} into this .png, .svg or .pdf.")


shuffle_option = click.option(
    "--shuffle",
    type=int,
    metavar="SEED",
    help="Take the images in a random order, of this seed.  [default: 0 with --limit]",
)
classes_file_option = click.option(
    "--classes-file", type=click.Path(exists=True, dir_okay=False), help="Class names, one per line."
)
predictor_option = click.option(
    "--predictor", type=click.Path(exists=True, dir_okay=False), help="patch-ranking: the file of train-predictor."
)
tokens_option = click.option(
    "--tokens", type=click.Path(exists=True, dir_okay=False), help="patch-ranking: learnt tokens, as fit_tokens saves."
)
template_option = click.option(
    "--template", "templates", multiple=True, help="Prompt with {} for the class; may be repeated."
)
threads_option = click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's]")
device_option = click.option("--device", help="Device, such as cpu or cuda:1.  [default: cuda if available]")
precision_option = once(
    "--precision",
    type=click.Choice(PRECISIONS),
    default=PRECISIONS[0],
    show_default=True,
    help="Precision of the model.",
)
format_option = click.option(
    "--format", "form", type=click.Choice(FORMATS), default="table", show_default=True, help="Format of the results."
)
output_option = click.option(
    "--output", type=click.Path(), help="File to write instead of stdout (-); it appears when complete."
)


def classes_option(default: str | None = None) -> Decorator:
    """Return --classes, whose help names a default."""
    return once("--classes", help="Class names, separated by commas." + (f"  [default: {default}]" if default else ""))
