"""The reservoir of `clipkernels classify --adapt`: what makes it, and the file that it is kept in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import cast

import click
from torch import Tensor

from clipkernels.classifier import Classifier
from clipkernels.heads import Head, Reservoir, ZeroShot

SAVE_EVERY = 30  # seconds


def choose_head(adapt: str | None, preset: str, reservoir: str | None, frozen: bool) -> Callable[[Tensor], Head]:
    """What makes the head that the options describe.

    Raises:
        click.UsageError: a frozen reservoir without a file.
    """
    if frozen and (reservoir is None or not Path(reservoir).exists()):
        raise click.UsageError(f"expected --reservoir with a file that exists for --frozen, got {reservoir!r}")
    return partial(Reservoir, preset=preset, frozen=frozen) if adapt else ZeroShot


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
