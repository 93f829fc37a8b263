"""Results on stdout or in a file that appears when complete, as tables, CSV or JSON; progress on stderr."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO

import click
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from clipkernels.files import atomic_write, write_csv


@contextmanager
def opened(path: str | None, option: str = "--output") -> Iterator[TextIO]:
    """Yield a UTF-8 text stream: stdout for None or "-", else a temporary file that becomes `path` on success.

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
            raise _cannot_write(path, option, error) from error
        yield stack.enter_context(open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline=""))


def check_file(path: str, option: str = "--output") -> None:
    """Raise click.UsageError unless `path` is a file or can become one, before an hour of work is lost to it."""
    target = Path(path)
    if target.exists() and not target.is_file():  # a device or a pipe must not be renamed over
        raise click.UsageError(f"expected a regular file for {option}, got {path}")
    try:
        with TemporaryFile(dir=target.absolute().parent):
            pass
    except OSError as error:
        raise _cannot_write(path, option, error) from error


def _cannot_write(path: str, option: str, error: OSError) -> click.UsageError:
    """Return the error of a path that cannot be written."""
    return click.UsageError(f"expected a file that can be written for {option}, got {path}: {error.strerror}")


def refuse_same(files: Mapping[str, str | None]) -> None:
    """Raise click.UsageError if two options name one file, or if an option that needs a file names stdout."""
    options: dict[str, str] = {}
    for option, path in files.items():
        if path == "-":
            raise click.UsageError(f"expected a file for {option}, got {path}")
        other = option if path is None else options.setdefault(os.path.realpath(path), option)
        if other != option:
            raise click.UsageError(f"expected {option} and {other} to differ, got {path} for both")


class PathCell:
    """A path in a table; where there is no room for all of it, its middle is left out, so that rows differ."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        columns = cell_len(self.path)
        return Measurement(min(columns, 1), columns)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(shorten(self.path, options.max_width), no_wrap=True)


def shorten(text: str, columns: int) -> str:
    """Return a text as it is if it fits into `columns` columns, else its start and its end, with … in between.

    The end takes three quarters, because the names of files differ more often than their first folders.
    """
    if cell_len(text) <= columns:
        return text
    head = room = max(0, (columns - 1) // 4)
    while cell_len(text[:head]) > room:  # a character may be two columns wide
        head -= 1
    room = columns - 1 - cell_len(text[:head])
    start = max(head, len(text) - room)
    while cell_len(text[start:]) > room:
        start += 1
    return f"{text[:head]}…{text[start:]}"


def write_results(
    form: str,
    stream: TextIO,
    records: Sequence[Mapping[str, Any]],
    document: Any,
    draw: Callable[[], Iterable[Table | str]],
) -> None:
    """Write results as tables, as JSON or as CSV.

    Args:
        form: the format, table, json or csv.
        stream: a text stream.
        records: flat rows, for CSV.
        document: what JSON holds.
        draw: returns the tables, and the lines of text between and after them.
    """
    if form == "csv":
        write_csv(records, stream)
    elif form == "json":
        json.dump(document, stream, indent=2)
        stream.write("\n")
    else:
        for part in draw():
            if isinstance(part, Table):
                write_table(part, stream)
            else:
                stream.write(f"{part}\n")


def check_out(folder: Path, files: Sequence[str], run: str, kind: str) -> None:
    """Raise click.UsageError for a folder with results that no run in it accounts for, as of another command.

    Args:
        folder: the folder of --out.
        files: names of the results.
        run: the file of a run in the folder.
        kind: the run, for people.
    """
    results = [name for name in files if os.path.lexists(folder / name)]
    if results and not (folder / run).exists():
        raise click.UsageError(
            f"expected --out to be a new folder, or that of {kind}, got {folder} with {results[0]} and no {run}: "
            "choose another one, or move that file"
        )


def write_report_files(
    folder: Path, records: Sequence[Mapping[str, Any]], document: Mapping[str, Any], markdown: str
) -> None:
    """Write results.csv, results.json and results.md to a folder, each atomically."""
    with atomic_write(folder / "results.csv") as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        write_csv(records, file)
    with atomic_write(folder / "results.json") as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
    with atomic_write(folder / "results.md") as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(markdown)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown; a cell cannot break its row."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    cells = ([" ".join(cell.split()).replace("|", r"\|") for cell in row] for row in rows)
    return [*lines, *(f"| {' | '.join(row)} |" for row in cells)]


def method_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table with a row per method, whose name comes first and alone is folded where there is no room."""
    table = Table(title=title, title_justify="left")
    table.add_column("method", overflow="fold")
    for column in columns:
        table.add_column(column, justify="left" if column == "tokens" else "right", no_wrap=True)
    for cells in rows:
        table.add_row(*map(Text, cells))
    return table


def write_table(table: Table, stream: TextIO) -> None:
    """Write a table to a stream, at the width of the terminal, or as wide as its content where there is none."""
    if stream.isatty():
        Console(file=stream, highlight=False).print(table)
        return
    unbounded = Console(file=stream, width=10_000, highlight=False)
    width = Measurement.get(unbounded, unbounded.options, table).maximum
    Console(file=stream, width=max(200, width), highlight=False).print(table)


def schedule(tokens: Sequence[int]) -> str:
    """Return token counts for people: each count that differs from the one before, or the first and the last of many.

    `65→47→35→26`; more than four counts become `197→41`.
    """
    counts = [count for index, count in enumerate(tokens) if index == 0 or count != tokens[index - 1]]
    return "→".join(map(str, counts if len(counts) <= 4 else (counts[0], counts[-1])))


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the log messages and warnings of host libraries, because an error is one line here."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def progress(quiet: bool = False) -> Progress:
    """Return a progress bar on stderr that leaves no trace; it shows nothing where stderr is not a terminal."""
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
