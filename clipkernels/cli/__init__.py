"""The command line, one file per verb."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from clipkernels import __version__
from clipkernels.cli.bench import bench
from clipkernels.cli.check import check
from clipkernels.cli.classify import classify
from clipkernels.cli.demo import demo
from clipkernels.cli.info import info
from clipkernels.cli.rank import rank
from clipkernels.cli.support import support
from clipkernels.cli.train_predictor import train_predictor
from clipkernels.images import first_line


class OneLine(click.Group):
    """A group whose errors are one line on stderr and an exit status, 2 for what the user can mend."""

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
        try:
            status = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.ClickException as error:
            click.echo(f"error: {' '.join(error.format_message().split())}", err=True)
            status = error.exit_code
        except click.Abort:  # a RuntimeError, too
            click.echo("error: interrupted", err=True)
            status = 130
        except RuntimeError as error:  # a backend that cannot serve, no memory
            click.echo(f"error: {first_line(error)}", err=True)
            status = 1
        sys.exit(status)


@click.group(
    cls=OneLine,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\b\nExample:\n  clipkernels info",
)
@click.version_option(__version__, prog_name="clipkernels", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Choose, prune and merge a CLIP tower's tokens."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


main.add_command(demo)
main.add_command(classify)
main.add_command(bench)
main.add_command(info)
main.add_command(check)
main.add_command(support)
main.add_command(rank)
main.add_command(train_predictor)
