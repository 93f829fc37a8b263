"""The results of `clipkernels bench`: tables with notes and choices, JSON, CSV."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

import click
import torch
from rich.table import Table

from clipkernels.cli.parts.output import method_table, schedule, write_results
from clipkernels.comparison.choice import Choice, name_of
from clipkernels.comparison.towers import Row, Settings
from clipkernels.measure.environment import environment
from clipkernels.messages import quantity


def write(
    run: Mapping[str, Any],
    rows: Sequence[Row],
    notes: Sequence[str],
    choices: Sequence[Choice],
    settings: Settings,
    form: str,
    stream: TextIO,
) -> None:
    """Write all rows and the choices: a table per precision with notes, JSON with environment and settings, or CSV.

    A CSV has no place for the choices, which go to stderr.
    """
    records = [{**run, **row.record()} for row in rows]
    conditions = {"rounds": settings.rounds, "clock": settings.clock, "device": str(settings.device)}
    document = {"environment": environment(), **conditions, "notes": notes, "rows": records}
    document["choices"] = [choice.record() for choice in choices]

    def draw() -> Iterator[Table | str]:
        for precision in dict.fromkeys(row.precision for row in rows):
            same = [row for row in rows if row.precision == precision]
            yield draw_speed(f"{title(run, settings)}, {precision}", same)
            yield draw_fidelity(same)
        yield from notes
        yield from (choice.reason for choice in choices)

    write_results(form, stream, records, document, draw)
    if form == "csv":
        for choice in choices:
            click.echo(choice.reason, err=True)


def title(run: Mapping[str, Any], settings: Settings) -> str:
    """Return what is measured, in one line."""
    weights = "" if run["weights"] == "bundled" else f", {run['weights']} weights"
    threads = torch.get_num_threads()
    where = f"{threads} thread{'s' * (threads > 1)}" if settings.device.type == "cpu" else str(settings.device)
    images = quantity(run["images"], "random image" if run["image_source"] == "random" else "image")
    return f"{run['library']}: {run['model']}{weights}, {images}, batch {settings.batch}, {where}"


def draw_speed(title: str, rows: Sequence[Row]) -> Table:
    """Return the table of cost and speed of one precision."""
    cells = [
        [
            name,
            schedule(speed.tokens),
            f"{speed.gmacs:.{2 if speed.gmacs > 1 else 4}f}",
            f"×{speed.ideal:.2f}",
            f"{1e3 * speed.seconds.median:.{1 if speed.seconds.median > 0.01 else 3}f}",
            f"{speed.images_per_second:.{0 if speed.images_per_second > 100 else 1}f}",
            f"×{speed.speedup.median:.2f}",
            f"{speed.efficiency.median:.2f}",
        ]
        for name, speed in ((name_of(row, rows), row.speed) for row in rows)
    ]
    return method_table(title, ["tokens", "GMACs", "ideal", "ms", "images/s", "speed-up", "η"], cells)


def draw_fidelity(rows: Sequence[Row]) -> Table:
    """Return the table of fidelity and memory of one precision."""
    low = rows[0].fidelity.precision is not None
    cells = [
        [
            name_of(row, rows),
            *("{:.4f} / {:.4f}".format(*pair) for pair in (row.fidelity.cosine, row.fidelity.precision) if pair),
            "" if row.fidelity.agreement is None else f"{100 * row.fidelity.agreement:.1f} %",
            "" if row.peak is None else f"{row.peak / 2**20:.1f}",
        ]
        for row in rows
    ]
    return method_table("Fidelity and memory", ["cosine", *["to fp32"] * low, "same", "MiB"], cells)
