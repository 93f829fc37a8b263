"""The command line, one module per verb, imported when the verb is used: `clipkernels --help` imports no torch."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TextIO

import click

from clipkernels import __version__
from clipkernels.messages import first_line, one_line, printable, reason_of

# At most 55 characters, so that each is one line of 80 columns.
SHORT_HELPS = {
    "demo": "Measure every method on the small bundled CLIP.",
    "classify": "Name the class of every image.",
    "bench": "Time your tower with every method, and compare outputs.",
    "show": "Draw which patches of an image a method leaves.",
    "info": "Show versions, devices and backends.",
    "check": "Check every operation against fp64.",
    "embed": "Embed a collection of images to Parquet.",
    "search": "Search a collection with a text or an image.",
    "dedup": "Find the duplicates of a collection.",
    "recover": "Train a reduced tower to its own dense embeddings.",
    "distill": "Distil a CLIP into students that answer questions.",
    "evaluate": "Score methods and heads on labelled data sets.",
    "export": "Export a model for runtimes without torch.",
    "tune": "Find the cheapest schedule that keeps a budget.",
    "support": "Build a support set: images that stand for classes.",
    "rank": "Find which patches of each image matter least.",
    "train-predictor": "Train a predictor on the rankings of rank.",
}

EXAMPLE = """\b
Example:
  clipkernels demo
"""


@contextmanager
def warnings_on_one_line() -> Iterator[None]:
    """Write each warning of the package to stderr as one line, once; those of other packages appear as ever."""
    seen: set[str] = set()
    package = os.path.dirname(os.path.dirname(__file__))

    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_line(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not filename.startswith(package + os.sep):
                show(message, category, filename, lineno, file, line)
            elif str(message) not in seen:
                seen.add(str(message))
                click.echo(f"warning: {one_line(str(message))}", err=True)

        warnings.showwarning = show_line
        yield


class LazyGroup(click.Group):
    """A group that imports a verb when it is used, and reports an error as one line on stderr.

    The exit status is 2 for a usage error and for a file that cannot be read or written, 1 for another failure, 130 for
    an interruption.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SHORT_HELPS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SHORT_HELPS:
            return None
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(import_module(f"clipkernels.cli.{name}"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SHORT_HELPS.items()))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        # Of Pillow, about files that it does not name; the reader has a line for each file that it refuses.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            with warnings_on_one_line():
                status = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.ClickException as error:
            click.echo(f"error: {one_line(error.format_message())}", err=True)
            status = error.exit_code
        except click.Abort:  # before RuntimeError, whose subclass it is
            click.echo("error: interrupted", err=True)
            status = 130
        except OSError as error:  # of a file that is read or written by the package, not by click
            name = "a file" if error.filename is None else str(error.filename)
            expected = "expected files that can be read and written"
            click.echo(f"error: {expected}, got {printable(name)}: {reason_of(error)}", err=True)
            status = 2
        except RuntimeError as error:  # a backend that cannot serve, no memory
            click.echo(f"error: {first_line(error)}", err=True)
            status = 1
        sys.exit(status)


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXAMPLE,
)
@click.version_option(__version__, prog_name="clipkernels", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Make CLIP image towers faster: choose, prune and merge their tokens, and measure what that costs."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
