"""The heads of `clipkernels classify`: what makes them, and the file that a reservoir is kept in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import cast

import click
from click.core import ParameterSource
from torch import Tensor

from clipkernels.classifier import Classifier
from clipkernels.heads import CALIP, Head, Reservoir, TipAdapter, TipX, ZeroShot
from clipkernels.heads.presets import CALIP_PRESETS, PRESETS
from clipkernels.support import SupportSet

SAVE_EVERY = 30  # seconds
SUPPORTED = ("tip", "tipx")


def check_head(
    context: click.Context, head: str | None, adapt: str | None, preset: str, reservoir: str | None, frozen: bool
) -> None:
    """Raises click.UsageError for options of a head that do not belong together."""
    if adapt and head:
        raise click.UsageError(f"expected --adapt or --head, got both: --adapt {adapt} has a head of its own")
    owners = {
        "preset": (bool(adapt) or head == "calip", "--adapt or --head calip"),
        "reservoir": (bool(adapt), "--adapt"),
        "frozen": (bool(adapt), "--adapt"),
        "support": (head in SUPPORTED, "--head tip or tipx"),
    }
    for option, (fits, wanted) in owners.items():
        if is_set(context, option) and not fits:
            raise click.UsageError(f"expected {wanted} with --{option}, got {f'--head {head}' if head else 'none'}")
    if head in SUPPORTED and not is_set(context, "support"):
        raise click.UsageError(f"expected --support with --head {head}, got none: see clipkernels support build")
    known = PRESETS if adapt else CALIP_PRESETS
    if (adapt or head == "calip") and preset not in known:
        raise click.UsageError(f"expected --preset to be one of {', '.join(known)}, got {preset!r}")
    if frozen and (reservoir is None or not Path(reservoir).exists()):
        raise click.UsageError(f"expected --reservoir with a file that exists for --frozen, got {reservoir!r}")


def choose_head(
    head: str | None, adapt: str | None, preset: str, frozen: bool, found: SupportSet | None
) -> Callable[[Tensor], Head]:
    """What makes the head that the options describe of the class embeddings."""
    if adapt:
        return partial(Reservoir, preset=preset, frozen=frozen)
    if head == "calip":
        return partial(CALIP, preset=preset)
    if found is not None:
        return partial(TipX if head == "tipx" else TipAdapter, features=found.features, labels=found.labels)
    return ZeroShot


def is_set(context: click.Context, option: str) -> bool:
    """Whether an option was named on the command line."""
    return context.get_parameter_source(option) is ParameterSource.COMMANDLINE


@contextmanager
def kept(classifier: Classifier, path: str | None) -> Iterator[Callable[[], None]]:
    """With what a file remembers, if it exists; yields what brings the file up to date now and then, and does so at the
    end, however that comes.

    Raises:
        click.UsageError: a folder, or a file that cannot be read or written.
        ValueError: a file that is no reservoir, or one of other classes or another capacity.
    """
    if path is None:
        yield lambda: None
        return
    head = cast(Reservoir, classifier.head)
    if Path(path).is_dir():
        raise click.UsageError(f"expected a file for --reservoir, got the folder {path}")
    try:
        if not head.frozen:  # better now than after an hour
            with TemporaryFile(dir=Path(path).absolute().parent):
                pass
        if Path(path).exists():
            head.load(path)
    except OSError as error:
        wanted = "expected a file that can be read and written for --reservoir"
        raise click.UsageError(f"{wanted}, got {path}: {error.strerror or error}") from error
    if head.seen:
        click.echo(f"{path}: goes on after {head.seen} images, {int(head.counts.sum())} remembered", err=True)
    start, last = head.seen, time.monotonic()

    def save() -> None:
        if head.seen > start:
            try:
                head.save(path)
            except OSError as error:
                raise click.ClickException(f"expected to write --reservoir {path}: {error.strerror}") from error

    def now_and_then() -> None:
        nonlocal last
        if time.monotonic() - last > SAVE_EVERY:
            save()
            last = time.monotonic()

    try:
        yield now_and_then
    finally:
        save()
