"""A picture of a benchmark: speed-up against the ideal, and what it cost in cosine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, BinaryIO

import click

from clipkernels.cli.images import first_line
from clipkernels.cli.output import quietly

FORMATS = ("png", "svg", "pdf")
MARKS = "osD^vPX*<>hp"


def plot_format(path: str) -> str:
    """The format that a path's ending names, now that matplotlib can be imported.

    Raises:
        click.UsageError: another ending, or no matplotlib.
    """
    ending = Path(path).suffix.lower().removeprefix(".")
    if ending not in FORMATS:
        raise click.UsageError(f"expected a file ending in .{', .'.join(FORMATS)} for --plot, got {path}")
    try:
        with quietly():
            import matplotlib.figure  # noqa: F401
    except ImportError as error:
        wanted = "expected matplotlib for --plot (pip install matplotlib)"
        raise click.UsageError(f"{wanted}, got: {first_line(error)}") from error
    return ending


def draw_plot(rows: Sequence[Mapping[str, Any]], title: str, file: BinaryIO, form: str) -> None:
    """The picture, written to a file.

    On the left the speed-up with its 10-90 % band against the ideal one, and the line where both are equal; on the
    right the mean cosine, with a line down to the least, against the speed-up. A colour is a method, a mark a precision
    and mode.

    Args:
        rows: records of `measure.Row`.
        title: above both.
        file: to write to.
        form: one of FORMATS.
    """
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys((row["precision"], row["mode"]) for row in rows))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    colours = {name: f"C{index % 10}" for index, name in enumerate(names)}
    marks = dict(zip(kinds, cycle(MARKS), strict=False))
    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    left, right = figure.subplots(1, 2)
    for row in rows:
        look = {"color": colours[row["variant"]], "marker": marks[row["precision"], row["mode"]], "linestyle": "none"}
        fast = row["speedup"]
        left.errorbar(
            row["ideal_speedup"], fast, [[fast - row["speedup_p10"]], [row["speedup_p90"] - fast]], capsize=2, **look
        )
        right.errorbar(fast, row["cosine_mean"], [[row["cosine_mean"] - row["cosine_min"]], [0]], **look)
    most = 1.05 * max(row["ideal_speedup"] for row in rows)
    left.plot([1, most], [1, most], color="grey", linewidth=1, linestyle="--")
    left.annotate("ideal", (most, most), color="grey", ha="right", va="bottom")
    left.set(xlabel="ideal speed-up (GMACs)", ylabel="speed-up, 10-90 %")
    right.set(xlabel="speed-up", ylabel="cosine with dense fp32: mean, and least")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    for name in names:
        left.plot([], [], color=colours[name], linewidth=4, label=name)
    for kind in kinds:
        left.plot([], [], color="grey", marker=marks[kind], linestyle="none", label=", ".join(kind))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    with quietly():
        figure.savefig(file, format=form, dpi=120)
