"""A sheet of the first point clouds of data sets: a row per cloud, under its class, with its depth maps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from clipkernels.evaluation.datasets import Dataset, Items
from clipkernels.messages import reason_of
from clipkernels.pictures.sheet import Layout, Panel, Row, draw_sheet

CLOUDS = 8
"""The clouds of a data set that are shown."""
SIDE = 128  # pixels
NOTE = "Depth maps: brighter is farther away, black is empty."


def draw_clouds(sets: Iterable[Dataset]) -> Image.Image:
    """Return a picture (RGB) of the first test clouds of data sets, or of another split where there is no test."""
    rows = [row for data in sets for row in _rows(data)]
    return draw_sheet(rows, Layout(SIDE, SIDE), (), np.zeros((1, 2, 3), np.uint8), [NOTE])


def _rows(data: Dataset) -> Iterator[Row]:
    items = data.splits.get("test") or next(iter(data.splits.values()))
    for start in range(0, min(len(items.names), CLOUDS * items.views), items.views):
        title = f"{data.name}: {data.classes[items.labels[start]]}"
        yield Row(title, [_panel(items, start, view) for view in range(items.views)])


def _panel(items: Items, start: int, view: int) -> Panel:
    try:
        image = items.read(items.names[start + view])
    except (ValueError, OSError) as error:
        return Panel(None, (f"view {view + 1}", reason_of(error)))
    return Panel(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)), (f"view {view + 1}",))
