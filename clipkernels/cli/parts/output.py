"""Where results go: stdout or a file that appears whole, as a table, CSV or JSON; progress goes to stderr."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TextIO

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from clipkernels.files import atomic_write


@contextmanager
def opened(path: str | None, option: str = "--output") -> Iterator[TextIO]:
    """A UTF-8 text stream: stdout for None or "-", else a temporary file that is renamed to `path` when all went well.

    Raises:
        click.UsageError: a path that cannot be written.
    """
    if path is None or path == "-":
        if isinstance(sys.stdout, io.TextIOWrapper):  # a path may hold any bytes, a Windows pipe may be cp1252
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
        yield sys.stdout
        sys.stdout.flush()
        return
    target = Path(path)
    if target.exists() and not target.is_file():  # a device or a pipe must not be renamed over
        if target.is_dir():
            raise click.UsageError(f"expected a file for {option}, got the folder {path}")
        with target.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            yield stream
        return
    with ExitStack() as stack:
        try:
            temporary = stack.enter_context(atomic_write(target))
        except OSError as error:
            raise click.UsageError(
                f"expected a file that can be written for {option}, got {path}: {error.strerror}"
            ) from error
        yield stack.enter_context(open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline=""))


def check_file(path: str, option: str = "--output") -> None:
    """Raises click.UsageError for what is no file, or cannot become one: better now than after an hour."""
    target = Path(path)
    if target.exists() and not target.is_file():  # a device or a pipe must not be renamed over
        raise click.UsageError(f"expected a file for {option}, got {path}, which is none")
    try:
        with TemporaryFile(dir=target.absolute().parent):
            pass
    except OSError as error:
        raise click.UsageError(
            f"expected a file that can be written for {option}, got {path}: {error.strerror}"
        ) from error


def refuse_same(files: Mapping[str, str | None]) -> None:
    """Raises click.UsageError where two options name one file, or one that is to hold results names stdout."""
    seen: dict[str, str] = {}
    for option, path in files.items():
        if path == "-":
            raise click.UsageError(f"expected a file for {option}, got {path}")
        other = option if path is None else seen.setdefault(os.path.realpath(path), option)
        if other != option:
            raise click.UsageError(f"expected {option} and {other} to differ, got {path} for both")


def write_table(table: Table, stream: TextIO) -> None:
    """The table on a stream, as wide as the terminal, or as wide as it needs where there is none."""
    Console(file=stream, width=None if stream.isatty() else 200, highlight=False).print(table)


def schedule(tokens: Sequence[int]) -> str:
    """Token counts for people: every count that differs from the one before, first and last where there are many."""
    counts = [count for index, count in enumerate(tokens) if index == 0 or count != tokens[index - 1]]
    return "→".join(map(str, counts if len(counts) <= 4 else (counts[0], counts[-1])))


@contextmanager
def quietly() -> Iterator[None]:
    """Without the log messages and warnings of host libraries, which would break the one-line rule."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def progress(quiet: bool = False) -> Progress:
    """A progress bar on stderr that leaves no trace, and none at all where stderr is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
