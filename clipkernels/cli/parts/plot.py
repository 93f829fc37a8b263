"""Pictures of a benchmark, a training and rankings, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import click
from torch import Tensor

from clipkernels.cli.parts.output import quietly
from clipkernels.messages import first_line

FORMATS = ("png", "svg", "pdf")
MARKERS = "osD^vPX*<>hp"
COLUMNS = 4


class RankedImage(NamedTuple):
    """An image (3,H,W) in [0, 1], the ranks (h,w) of its patches, 0 for the one kept longest, and its name."""

    image: Tensor
    ranks: Tensor
    name: str


def plot_format(path: str) -> str:
    """Return the format that a path's ending names.

    Raises:
        click.UsageError: an ending not in FORMATS, or matplotlib is not installed.
    """
    ending = Path(path).suffix.lower().removeprefix(".")
    if ending not in FORMATS:
        raise click.UsageError(f"expected a file ending in .{', .'.join(FORMATS)} for --plot, got {path}")
    try:
        with quietly():
            import matplotlib.figure  # noqa: F401
    except ImportError as error:
        expected = "expected matplotlib for --plot (pip install matplotlib)"
        raise click.UsageError(f"{expected}, got: {first_line(error)}") from error
    return ending


def draw_plot(rows: Sequence[Mapping[str, Any]], title: str, file: BinaryIO, form: str) -> None:
    """Draw a benchmark into a file.

    The left half shows the speed-up with its 10-90 % band against the ideal one, and the line where both are equal. The
    right half shows the mean cosine, with a line down to the least, against the speed-up. A colour is a method, a
    marker is a precision and mode.

    Args:
        rows: records of `measure.Row`.
        title: above both halves.
        file: the file to write.
        form: one of FORMATS.
    """
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys((row["precision"], row["mode"]) for row in rows))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    colours = {name: f"C{index % 10}" for index, name in enumerate(names)}
    markers = dict(zip(kinds, cycle(MARKERS), strict=False))
    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    left, right = figure.subplots(1, 2)
    for row in rows:
        style = {
            "color": colours[row["variant"]],
            "marker": markers[row["precision"], row["mode"]],
            "linestyle": "none",
        }
        speedup = row["speedup"]
        left.errorbar(
            row["ideal_speedup"],
            speedup,
            [[speedup - row["speedup_p10"]], [row["speedup_p90"] - speedup]],
            capsize=2,
            **style,
        )
        right.errorbar(speedup, row["cosine_mean"], [[row["cosine_mean"] - row["cosine_min"]], [0]], **style)
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
        left.plot([], [], color="grey", marker=markers[kind], linestyle="none", label=", ".join(kind))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    with quietly():
        figure.savefig(file, format=form, dpi=120)


def draw_training(
    losses: Sequence[float], overlaps: Sequence[float], chance: float, title: str, file: BinaryIO, form: str
) -> None:
    """Draw a training into a file: the loss of each epoch on the left, on the right the overlap after it.

    Args:
        losses: one per epoch.
        overlaps: one share per epoch; nan without images held out.
        chance: the overlap of a random order, a dashed line.
        title: above both halves.
        file: the file to write.
        form: one of FORMATS.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(losses) + 1)
    marker = "." if len(losses) < 100 else ""
    left.plot(epochs, losses, marker=marker)
    left.set(xlabel="epoch", ylabel="loss")
    right.plot(epochs, overlaps, marker=marker, label="images held out")
    right.axhline(chance, color="grey", linewidth=1, linestyle="--", label="a random order")
    right.set(xlabel="epoch", ylabel="overlap of the dropped patches", ylim=(0, 1))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    with quietly():
        figure.savefig(file, format=form, dpi=120)


def draw_frontier(rows: Sequence[Any], figures: Sequence[str], title: str, file: BinaryIO, form: str) -> None:
    """Draw the frontier of a tuning into a file: cost against quality, with the published schedules.

    Args:
        rows: rows of `clipkernels.tuning.results`.
        figures: the constraints about quality, one panel each; without any, the mean cosine.
        title: above all panels.
        file: the file to write.
        form: one of FORMATS.
    """
    from matplotlib.figure import Figure

    panels: list[tuple[str, Any]] = [
        (name, lambda row, place=place: row.figures[place]) for place, name in enumerate(figures)
    ]
    panels = panels or [("mean cosine", lambda row: row.cosine_mean)]
    timed = rows[0].milliseconds is not None
    figure = Figure(figsize=(1 + 5.5 * len(panels), 5), layout="constrained")
    figure.suptitle(title, fontsize="medium", parse_math=False)
    kinds = (
        ("published", "C1", "s", lambda row: row.published and not row.chosen),
        ("found here", "C0", "o", lambda row: not row.published and not row.chosen),
        ("the schedule", "C3", "*", lambda row: row.chosen),
    )
    for axes, (name, read) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, colour, marker, belongs in kinds:
            points = [(row.milliseconds if timed else row.gmacs, read(row)) for row in rows if belongs(row)]
            size = 160 if marker == "*" else 30
            axes.scatter(*zip(*points, strict=True), c=colour, marker=marker, s=size, label=label) if points else None
        axes.set(xlabel="ms per batch, as measured by parts" if timed else "GMACs as executed")
        axes.set_ylabel(f"{name}, on the photographs of the search", parse_math=False)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    with quietly():
        figure.savefig(file, format=form, dpi=120)


def draw_rankings(pictures: Sequence[RankedImage], title: str, file: BinaryIO, form: str) -> None:
    """Draw each image, and below it its patches, brighter the longer they are kept.

    Args:
        pictures: at least one.
        title: above all images.
        file: the file to write.
        form: one of FORMATS.
    """
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(2 * columns + 0.4, 4.4 * rows + 0.6), layout="constrained")
    figure.suptitle(title, fontsize="small", wrap=True)
    grid = figure.subplots(2 * rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for index, (image, ranks, name) in enumerate(pictures):
        row, column = 2 * (index // columns), index % columns
        height, width = image.shape[1:]
        above, below = grid[row, column], grid[row + 1, column]
        above.imshow(image.permute(1, 2, 0).numpy())
        above.set_title(name, fontsize="small", parse_math=False)
        below.imshow(image.mean(0).numpy(), cmap="gray", vmin=0, vmax=1)
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        below.imshow(-ranks.numpy(), cmap="viridis", alpha=0.65, extent=extent, interpolation="nearest")
    with quietly():
        figure.savefig(file, format=form, dpi=120)
