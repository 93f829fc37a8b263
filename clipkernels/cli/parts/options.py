"""Options that several verbs share; without torch, so that a verb can print a line before it imports that."""

from __future__ import annotations

import click

FORMATS = ("table", "json", "csv")
format_option = click.option("--format", "form", type=click.Choice(FORMATS), default="table", show_default=True)
