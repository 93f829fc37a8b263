"""Class names, from the command line, a file or folders, and the labels of image files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from clipkernels.classifier import check_classes
from clipkernels.messages import reason_of


def choose_classes(paths: Sequence[str], classes: str | None, file: str | None, folder_labels: bool) -> list[str]:
    """Return the class names of the options, or with --folder-labels alone the names of the files' folders, sorted.

    Raises:
        click.UsageError: as in `read_classes`.
    """
    if classes is None and file is None:
        if folder_labels:
            return sorted(set(folders_of(paths)))
        expected = "expected --classes or --classes-file, got neither"
        raise click.UsageError(f"{expected}: give --folder-labels if the folders are named like the classes")
    return read_classes(classes, file)


def read_classes(classes: str | None, file: str | None) -> list[str]:
    """Return the class names of --classes, separated by commas, or of --classes-file, one per line.

    Raises:
        click.UsageError: neither option, or both; a file that is not text in UTF-8, or that has no class, an empty name
            or a name twice.
    """
    if (classes is None) == (file is None):
        raise click.UsageError(f"expected --classes or --classes-file, got {'neither' if file is None else 'both'}")
    try:
        parts = Path(file).read_text(encoding="utf-8-sig").splitlines() if file else (classes or "").split(",")
        return list(check_classes([part.strip() for part in parts if part.strip()]))
    except (OSError, ValueError) as error:
        source = f"--classes-file {file}" if file else "--classes"
        raise click.UsageError(f"expected class names in {source}, got an error: {reason_of(error)}") from error


def warn_of_one(classes: Sequence[str]) -> None:
    """Warn on stderr if there is one class only."""
    if len(classes) == 1:
        click.echo(f"warning: one class, {classes[0]!r}: every image is given it, so name others too", err=True)


def read_labels(paths: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Return the true class of each file, the name of its folder.

    Raises:
        click.UsageError: a folder whose name is not among the classes.
    """
    labels = folders_of(paths)
    for path, label in zip(paths, labels, strict=True):
        if label not in classes:
            raise click.UsageError(f"expected folders named like the classes, got {label!r} for {path!r}")
    return labels


def folders_of(paths: Sequence[str]) -> list[str]:
    """Return the name of each file's folder."""
    return [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in paths]
