"""`clipkernels dedup`: groups of equal and similar images in a collection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import numpy as np
from rich.table import Table

from clipkernels.cli.parts.models import choose_device
from clipkernels.cli.parts.options import device_option, format_option, output_option
from clipkernels.cli.parts.output import opened, progress, write_results
from clipkernels.collection.duplicates import DUPLICATES, Duplicates, find_duplicates
from clipkernels.messages import printable, quantity

EXAMPLE = """\b
Example:
  clipkernels demo --quick --model none --save-images pictures
  clipkernels embed pictures --out collection
  clipkernels dedup collection --threshold 0.98
"""


@click.command(epilog=EXAMPLE)
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@click.option(
    "--threshold",
    type=click.FloatRange(-1, 1),
    default=0.96,
    show_default=True,
    help="Lowest cosine of two images that are duplicates; 1 joins equal embeddings.",
)
@device_option
@format_option
@output_option
def dedup(folder: str, threshold: float, device: str | None, form: str, output: str | None) -> None:
    """Find the duplicates of a collection.

    DIR is a folder of clipkernels embed. Images with equal content are duplicates, and so are those with a cosine of at
    least the threshold. Whatever they connect is a group, so two images of a group may be less similar.

    DIR/duplicates.parquet lists the images of each group (group, id, sha256, similarity to the first). The result
    counts them.
    """
    try:
        with opened(output) as stream, progress() as bar:
            task = bar.add_task("comparing", total=None)
            where = choose_device(device)
            duplicates = find_duplicates(
                folder,
                threshold,
                device=where,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
            write(duplicates, folder, threshold, form, stream)
    except (ValueError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    groups, extra = quantity(duplicates.groups, "group"), quantity(duplicates.extra, "duplicate")
    click.echo(f"{extra} in {groups}: {printable(folder)}/{DUPLICATES}", err=True)


def write(duplicates: Duplicates, folder: str, threshold: float, form: str, stream: Any) -> None:
    """Write the counts as a table, as JSON or as CSV."""
    sizes = np.bincount(duplicates.table.column("group").to_numpy()) if len(duplicates.table) else [0]
    record = {
        "images": duplicates.images,
        "groups": duplicates.groups,
        "duplicates": duplicates.extra,
        "equal content": duplicates.exact,
        "largest group": int(max(sizes)),
        "threshold": threshold,
    }

    def draw() -> Iterator[Table]:
        table = Table(*record)
        table.add_row(*map(str, record.values()))
        yield table

    write_results(form, stream, [record], {"folder": folder, **record}, draw)
