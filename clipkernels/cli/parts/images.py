"""Image files on the command line: the files that arguments name, and the options and lines that verbs share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby

import click

from clipkernels.images import Found, find_images
from clipkernels.messages import quantity

exif_option = click.option("--no-exif", is_flag=True, help="Ignore EXIF orientation, as an index made without it did.")


def find(images: Sequence[str]) -> Found:
    """Return the files that paths and globs name, and a count of the other files of their folders.

    Raises:
        ValueError: as `find_images`.
        click.UsageError: a folder that cannot be read.
    """
    try:
        return find_images(images)
    except OSError as error:
        actual = f"{error.filename!r}: {error.strerror}"
        raise click.UsageError(f"expected a folder that can be read, got {actual}") from error


def no_images(paths: Sequence[str]) -> click.UsageError:
    """Return the error of files none of which is an image that can be used; a line about each is on stderr."""
    files = quantity(len(paths), "file")
    return click.UsageError(f"expected images, got {files} that cannot be used, such as {paths[0]!r}")


def close(found: Found) -> None:
    """Say on stderr which files of the folders were left out for their suffix."""
    if found.note:
        click.echo(found.note, err=True)


def warn_of_sorted(paths: Sequence[str]) -> None:
    """Warn on stderr if paths of several folders are sorted by folder, which is their class as a rule."""
    folders = [folder for folder, _ in groupby(os.path.dirname(path) for path in paths)]
    if 1 < len(folders) == len(set(folders)):
        click.echo(
            f"warning: the images come folder by folder ({len(folders)} folders), but --adapt learns from earlier "
            "images: mix them with --shuffle 0",
            err=True,
        )
