"""The results of `clipkernels evaluate` as tables in the terminal, CSV, JSON, Markdown and a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rich.table import Table
from rich.text import Text

from clipkernels.cli.parts.evaluation_report import UNVERIFIED
from clipkernels.cli.parts.output import markdown_table, quietly, write_report_files
from clipkernels.evaluation.classification import ACCURACY
from clipkernels.files import atomic_write

PANELS = 4
"""Panels of the picture in a row."""
COLUMNS = ("data", "method", "head", "shots", "score, %", "95 %", "spread", "published", "difference", "weights")
ALWAYS = COLUMNS[:6]
"""The columns that are there even if they are empty."""
COSTS = ("method", "GMACs", "images/s", "speed-up", "η")
LEFT_ALIGNED = ("data", "method", "head", "weights")
FILES = ("results.csv", "results.json", "results.md", "accuracy.png")
COST_NOTE = (
    "GMACs: of an image, as executed. images/s, speed-up and η: of random images, paired, against the faster dense "
    "run. η: the speed-up over the one that the GMACs allow."
)

Grid = tuple[Sequence[str], list[list[str]]]
"""The columns of a table, and its rows as text."""


def cells_of(row: Mapping[str, Any]) -> list[str]:
    """Return a row as text, by COLUMNS."""
    interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
    published = difference = ""
    if row["published"] is not None:
        published = f"{100 * row['published']:.2f}{'' if row['verified'] else UNVERIFIED}"
        difference = f"{100 * row['difference']:+.2f}"
    head = row["head"] if row["metric"] == ACCURACY else row["metric"]
    shots = str(row["shots"]) if row["shots"] else ""
    spread = "" if row["spread"] is None else f"± {100 * row['spread']:.2f}"
    return [
        row["data"], row["method"], head, shots, f"{100 * row['score']:.2f}", interval, spread, published, difference,
        row["weights"],
    ]  # fmt: skip


def score_grid(records: Sequence[Mapping[str, Any]]) -> Grid:
    """Return the scores, without columns that say nothing."""
    rows = [cells_of(row) for row in records]
    kept = [place for place, name in enumerate(COLUMNS) if name in ALWAYS or any(row[place] for row in rows)]
    return [COLUMNS[place] for place in kept], [[row[place] for place in kept] for row in rows]


def cost_grid(records: Sequence[Mapping[str, Any]]) -> Grid:
    """Return the cost of each method, as far as it was measured."""
    costs = {row["method"]: row for row in records if row["gmacs_run"] is not None}
    return COSTS, [
        [
            name, f"{row['gmacs_run']:.3g}", f"{row['images_per_second']:.1f}", f"{row['speedup']:.2f}",
            f"{row['efficiency']:.2f}",
        ]
        for name, row in costs.items()
    ]  # fmt: skip


def grids_of(records: Sequence[Mapping[str, Any]]) -> list[Grid]:
    """Return the tables of a report: the scores, and the costs if they were measured."""
    costs = cost_grid(records)
    return [score_grid(records), *([costs] if costs[1] else [])]


def draw(records: Sequence[Mapping[str, Any]], notes: Sequence[str], title: str) -> list[Table | str]:
    """Return the tables and the notes for a terminal."""
    parts: list[Table | str] = []
    for columns, rows in grids_of(records):
        table = Table(title=None if parts else title, title_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if column in LEFT_ALIGNED else "right")
        for row in rows:
            table.add_row(*map(Text, row))
        parts.append(table)
    return [*parts, *([COST_NOTE] if len(parts) > 1 else []), *notes]


def markdown(records: Sequence[Mapping[str, Any]], notes: Sequence[str], title: str) -> str:
    """Return the tables and the notes as Markdown."""
    lines, grids = [f"# {title}", ""], grids_of(records)
    for columns, rows in grids:
        lines += [*markdown_table(columns, rows), ""]
    return "\n".join([*lines, *(f"- {note}" for note in [*([COST_NOTE] if len(grids) > 1 else []), *notes])]) + "\n"


def draw_costs(records: Sequence[Mapping[str, Any]], title: str, file: BinaryIO, form: str) -> None:
    """Draw accuracy against GMACs as executed into a file, a panel for each data set and for the mean.

    A colour is a head with its shots; a point is a method.
    """
    from matplotlib.figure import Figure

    records = [row for row in records if row["metric"] == ACCURACY and row["gmacs_run"] is not None]
    names = list(dict.fromkeys(row["data"] for row in records))
    columns = min(PANELS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(1 + 4.5 * columns, 0.8 + 3.6 * rows), layout="constrained")
    figure.suptitle(title, fontsize="medium", parse_math=False)
    heads = list(dict.fromkeys((row["head"], row["shots"]) for row in records))
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, name in zip(panels, names, strict=False):
        for index, (head, shots) in enumerate(heads):
            points = [row for row in records if (row["data"], row["head"], row["shots"]) == (name, head, shots)]
            points.sort(key=lambda row: row["gmacs_run"])
            label = f"{head}, {shots} shots" if shots else head
            costs, scores = ([row[key] for row in points] for key in ("gmacs_run", "score"))
            axes.plot(costs, [100 * score for score in scores], "o-", color=f"C{index % 10}", label=label, linewidth=1)
        axes.set_title(name, fontsize="small", parse_math=False)
        axes.set(xlabel="GMACs as executed", ylabel="accuracy, %")
        axes.grid(alpha=0.3)
    for axes in list(panels):
        axes.set_axis_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    with quietly():
        figure.savefig(file, format=form, dpi=120)


def write_report(
    folder: Path, records: Sequence[Mapping[str, Any]], document: Mapping[str, Any], notes: Sequence[str], title: str
) -> None:
    """Write results.csv, results.json and results.md, and accuracy.png where matplotlib is installed."""
    write_report_files(folder, records, document, markdown(records, notes, title))
    drawn = any(row["metric"] == ACCURACY and row["gmacs_run"] is not None for row in records)
    if drawn and importlib.util.find_spec("matplotlib") is not None:
        with atomic_write(folder / "accuracy.png") as temporary, open(temporary, "wb") as picture:
            draw_costs(records, title, picture, "png")
