"""The results of `clipkernels distill` as tables in the terminal, CSV, JSON and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from clipkernels.cli.parts.output import markdown_table
from clipkernels.messages import quantity
from clipkernels.questions.results import NONE, Row, summarize

FILES = ("results.csv", "results.json", "results.md")
COLUMNS = ("split", "score", "labels", "method", "seeds", "mean, %", "sd", "gain", "gain's sd")
LEFT_ALIGNED = ("split", "score", "method")


def records_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as plain numbers."""
    return [
        {
            **row._asdict(), "score": round(row.score, 6), "seconds": round(row.seconds, 1),
            "weight": None if row.weight is None else round(row.weight, 4),
        }
        for row in rows
    ]  # fmt: skip


def cells_of(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the means over seeds as text, by COLUMNS, ordered by split, score and share."""
    summary = summarize(records)
    places = {name: place for place, name in enumerate(dict.fromkeys(row["metric"] for row in summary))}
    summary.sort(key=lambda row: (row["split"], places[row["metric"]], row["share"]))

    def signed(value: float | None) -> str:
        return "" if value is None else f"{100 * value:+.2f}"

    def spread(value: float | None) -> str:
        return "" if value is None else f"± {100 * value:.2f}"

    return [
        [
            row["split"], row["metric"], f"{100 * row['share']:g} %", row["method"], str(row["seeds"]),
            f"{100 * row['score']:.2f}", spread(row["sd"]),
            *(("", "") if row["method"] == NONE else (signed(row["gain"]), spread(row["gain_sd"]))),
        ]
        for row in summary
    ]  # fmt: skip


def subset_notes(rows: Sequence[Row]) -> list[str]:
    """Return a sentence about the annotations and classes of each share; of several seeds, the fewest and the most."""
    notes = []
    for share in dict.fromkeys(row.share for row in rows):
        of_share = [row for row in rows if row.share == share]
        classes = sorted({row.classes for row in of_share})
        count = max(row.train for row in of_share)
        spread = str(classes[0]) if len(classes) == 1 else f"{classes[0]} to {classes[-1]}"
        notes.append(f"{100 * share:g} % of the labels: {quantity(count, 'annotation')}, {spread} of their classes")
    return notes


def draw(records: Sequence[Mapping[str, Any]], notes: Sequence[str], title: str) -> list[Table | str]:
    """Return the table of means and the notes for a terminal."""
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in LEFT_ALIGNED else "right")
    for row in cells_of(records):
        table.add_row(*map(Text, row))
    return [table, *notes]


def markdown(records: Sequence[Mapping[str, Any]], notes: Sequence[str], title: str) -> str:
    """Return the table of means and the notes as Markdown."""
    lines = [f"# {title}", "", *markdown_table(COLUMNS, cells_of(records))]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"
