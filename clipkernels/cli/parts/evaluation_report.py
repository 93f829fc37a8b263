"""The rows of `clipkernels evaluate` as plain numbers with published figures beside them, and the notes about them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import click

from clipkernels.cli.parts.methods import name_of, read_methods
from clipkernels.evaluation.captions import Captions
from clipkernels.evaluation.classification import ACCURACY
from clipkernels.evaluation.datasets import Dataset
from clipkernels.evaluation.published import Figure, published_figures
from clipkernels.evaluation.results import Results, Row
from clipkernels.evaluation.speed import Speed
from clipkernels.messages import quantity

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
                "runs": score.runs, "images": score.images,
                "unread": sum(each.images for each in row.unread.values()), "weights": row.weights,
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
        return dict.fromkeys(("published", "difference", "paper", "table", "verified", "published_prompts"))
    value = round(figure.value / 100, 6)
    return {
        "published": value, "difference": round(score - value, 6), "paper": figure.paper, "table": figure.table,
        "verified": figure.verified, "published_prompts": figure.prompts,
    }  # fmt: skip


def means_of(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each method, head and shots that every labelled data set has a score for, with the mean score.

    Its interval and spread combine those of the data sets, whose images and draws are independent. The published mean
    is there if every data set has a published figure of one paper and table.
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
        spreads = [row["spread"] for row in rows]
        means.append(
            {
                **rows[0], "data": f"mean of {len(names)}", "score": round(score, 6),
                "low": round(score - mean_error([row["score"] - row["low"] for row in rows]), 6),
                "high": round(score + mean_error([row["high"] - row["score"] for row in rows]), 6),
                "spread": None if None in spreads else round(mean_error(spreads), 6),
                "images": sum(row["images"] for row in rows), "unread": sum(row["unread"] for row in rows),
                "weights": "",
                "published": None if published is None else round(published, 6),
                "difference": None if published is None else round(score - published, 6),
                "paper": rows[0]["paper"] if known else None, "table": rows[0]["table"] if known else None,
                "verified": all(row["verified"] for row in rows) if known else None,
                "published_prompts": rows[0]["published_prompts"] if known else None,
            }
        )  # fmt: skip
    return means


def mean_error(errors: Sequence[float]) -> float:
    """Return the error of a mean of independent figures with these errors."""
    return math.sqrt(sum(error * error for error in errors)) / len(errors)


def notes_of(
    results: Results,
    records: Sequence[Mapping[str, Any]],
    data: Mapping[str, Dataset],
    captions: Mapping[str, Captions],
) -> list[str]:
    """Return the sentences below the tables: how to read them, what was read, and everything that has no score."""
    notes = [
        "score: accuracy, or recall of a retrieval. 95 %: bootstrap over images. spread: standard deviation over the "
        "draws of labelled images, or over the orders of a stream."
    ]
    for name, content in data.items():
        prompts = repr(content.templates[0]) if len(content.templates) == 1 else f"{len(content.templates)} prompts"
        notes.append(f"{name}: {content.layout}, {quantity(len(content.classes), 'class')}, {prompts}")
        notes += [f"{name}: {note}" for note in content.notes]
    for name, pairs in captions.items():
        images = quantity(len(pairs.names), "image")
        notes.append(f"{name}: {pairs.layout}, {images} with {quantity(len(pairs.texts), 'caption')}")
        notes += [f"{name}: {note}" for note in pairs.notes]
    notes += results.notes
    if any(row["published"] is not None and not row["verified"] for row in records):
        notes.append(f"{UNVERIFIED}: a published figure that was not compared with its paper.")
    reasons: dict[str, list[str]] = {}
    for skip in results.skips:
        shots = f" of {skip.shots} shots" if skip.shots else ""
        reasons.setdefault(f"{skip.data}: {skip.reason}", []).append(f"{skip.head}{shots} by {skip.method}")
    notes += [f"no score, {reason}: {', '.join(names)}." for reason, names in reasons.items()]
    unread = {(row.data, split, each): row.method for row in results.rows for split, each in row.unread.items()}
    for (name, split, each), method in unread.items():
        place = f"{name}, {split}" if split in ("train", "val", "test") else name
        notes.append(
            f"{place}: {quantity(each.images, 'image')} left out by {method}, such as {each.name}: {each.reason}."
        )
    return notes


def published_of(model: str, row: Row) -> Figure | None:
    """Return the published figure of a row, a verified one if there is one; None if no paper printed it."""
    figures = [
        figure
        for figure in published_figures()
        if (figure.data, figure.model, figure.head, figure.shots) == (row.data, model, row.head, row.shots)
        and figure.metric == row.metric
        and method_name(figure.method) == row.method
    ]
    return min(figures, key=lambda figure: not figure.verified, default=None)


@cache
def method_name(spec: str) -> str | None:
    """Return the name in rows of a published method, or None if ours computes something else."""
    try:
        return name_of(read_methods([spec], None, None)[0])
    except click.UsageError:
        return None


def describe(data: Dataset) -> dict[str, Any]:
    """Return what JSON says of a data set."""
    images = {split: len(items.names) // items.views for split, items in data.splits.items()}  # a cloud counts as one
    views = {"views": data.views} if data.views > 1 else {}
    return {"layout": data.layout, "classes": len(data.classes), "templates": data.templates, "images": images, **views}
