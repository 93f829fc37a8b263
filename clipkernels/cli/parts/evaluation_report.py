"""The report of `clipkernels evaluate`: rows with published figures beside them, as tables, CSV, JSON and Markdown."""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rich.table import Table
from rich.text import Text

from clipkernels.cli.parts.output import quietly
from clipkernels.evaluation.classification import ACCURACY
from clipkernels.evaluation.published import Figure
from clipkernels.evaluation.results import Results, Row
from clipkernels.evaluation.speed import Speed
from clipkernels.files import atomic_write, write_csv
from clipkernels.messages import quantity

PANELS = 4
"""Panels of the picture in a row."""
COLUMNS = ("data", "method", "head", "shots", "score, %", "95 %", "spread", "published", "difference", "weights")
UNVERIFIED = "?"
"""Mark of a published figure that nobody compared with its paper."""


def records_of(
    results: Results, speeds: Mapping[str, Speed], published: Callable[[Row], Figure | None]
) -> list[dict[str, Any]]:
    """Return the rows as plain numbers, and the means over data sets where there are several.

    Args:
        results: the results.
        speeds: by method; empty if nothing was timed.
        published: a function from a row to the published figure of the same, or None.
    """
    records = []
    for row in results.rows:
        figure = published(row)
        score, speed = row.score, speeds.get(row.method)
        records.append(
            {
                "data": row.data, "method": row.method, "head": row.head, "shots": row.shots, "metric": row.metric,
                "score": round(score.mean, 6), "low": round(score.low, 6), "high": round(score.high, 6),
                "spread": None if score.spread is None else round(score.spread, 6),
                "runs": score.runs, "images": score.images, "unread": row.unread, "weights": row.weights,
                "gmacs_run": None if speed is None else round(speed.gmacs, 5),
                "images_per_second": None if speed is None else round(speed.images_per_second, 2),
                "speedup": None if speed is None else round(speed.speedup, 4),
                "efficiency": None if speed is None else round(speed.efficiency, 4),
                **columns_of(figure, score.mean),
            }
        )  # fmt: skip
    return records + means_of(records)


def columns_of(figure: Figure | None, score: float) -> dict[str, Any]:
    """Return the columns about a published figure."""
    if figure is None:
        return dict.fromkeys(("published", "difference", "paper", "table", "verified"))
    value = round(figure.value / 100, 6)
    return {
        "published": value, "difference": round(score - value, 6), "paper": figure.paper, "table": figure.table,
        "verified": figure.verified,
    }  # fmt: skip


def means_of(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each method, head and shots that every labelled data set has a score for, with the mean score.

    The published mean is there if every data set has a published figure of one paper and table.
    """
    names = list(dict.fromkeys(row["data"] for row in records if row["metric"] == ACCURACY))
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in records:
        if row["metric"] == ACCURACY:
            groups.setdefault((row["method"], row["head"], row["shots"]), []).append(row)
    means = []
    for rows in groups.values():
        if len(names) < 2 or len(rows) < len(names):
            continue
        sources = {(row["paper"], row["table"]) for row in rows}
        known = len(sources) == 1 and None not in next(iter(sources))
        score = statistics.mean(row["score"] for row in rows)
        published = statistics.mean(row["published"] for row in rows) if known else None
        means.append(
            {
                **rows[0], "data": f"mean of {len(names)}", "score": round(score, 6), "low": None, "high": None,
                "spread": None, "images": sum(row["images"] for row in rows),
                "unread": sum(row["unread"] for row in rows), "weights": "",
                "published": None if published is None else round(published, 6),
                "difference": None if published is None else round(score - published, 6),
                "paper": rows[0]["paper"] if known else None, "table": rows[0]["table"] if known else None,
                "verified": all(row["verified"] for row in rows) if known else None,
            }
        )  # fmt: skip
    return means


def cells_of(row: Mapping[str, Any]) -> list[str]:
    """Return a row as text, by COLUMNS."""
    interval = "" if row["low"] is None else f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
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


def notes_of(results: Results, records: Sequence[Mapping[str, Any]], data_notes: Sequence[str]) -> list[str]:
    """Return the sentences below the table: how to read it, and everything that has no score."""
    notes = [
        "score: accuracy, or recall of a retrieval. 95 %: bootstrap over images. spread: standard deviation over the "
        "draws of labelled images, or over the orders of a stream.",
        *data_notes,
    ]
    if any(row["published"] is not None and not row["verified"] for row in records):
        notes.append(f"{UNVERIFIED}: a published figure that was not compared with its paper.")
    reasons: dict[str, list[str]] = {}
    for skip in results.skips:
        shots = f" of {skip.shots} shots" if skip.shots else ""
        reasons.setdefault(f"{skip.data}: {skip.reason}", []).append(f"{skip.head}{shots} by {skip.method}")
    notes += [f"no score, {reason}: {', '.join(names)}." for reason, names in reasons.items()]
    for data, unread in results.unread.items():
        if unread:
            name, reason = next(iter(unread.items()))
            notes.append(f"{data}: {quantity(len(unread), 'image')} left out, such as {name}: {reason}.")
    return notes


def draw_scores(records: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Return a terminal table of the rows."""
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("data", "method", "head", "weights") else "right")
    for row in records:
        table.add_row(*map(Text, cells_of(row)))
    return table


def markdown(records: Sequence[Mapping[str, Any]], notes: Sequence[str], title: str) -> str:
    """Return the rows and the notes as Markdown."""
    lines = [f"# {title}", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells_of(row))} |" for row in records]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


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
    with atomic_write(folder / "results.csv") as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        write_csv(records, file)
    with atomic_write(folder / "results.json") as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
    with atomic_write(folder / "results.md") as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(markdown(records, notes, title))
    drawn = any(row["metric"] == ACCURACY and row["gmacs_run"] is not None for row in records)
    if drawn and importlib.util.find_spec("matplotlib") is not None:
        with atomic_write(folder / "accuracy.png") as temporary, open(temporary, "wb") as picture:
            draw_costs(records, title, picture, "png")
