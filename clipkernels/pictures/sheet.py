"""A sheet of panels: rows with titles, captions, a legend of the states that occur, and notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from clipkernels.pictures.files import GREY, PAPER, Font, fit, font_of, write
from clipkernels.pictures.panel import Geometry, colour, draw_panel
from clipkernels.pictures.patches import Patches

MARGIN, GAP = 16, 14  # pixels
TITLE, CAPTION, LINE = 18, 13, 17  # pixels of a title's letters, a caption's, and a line of captions and notes
CAPTION_LINES = 2
LEGEND = {
    "kept": "kept: a patch with a token to itself, its pixels as the tower sees them",
    "merged": "merged: one token, in its mean colour, with one outline; parts that lie apart share both",
    "fused": "fused: summed up, with many others, in one token",
    "dropped": "dropped: no token holds it",
}


class Panel(NamedTuple):
    """A drawn image (height,width,3) with lines below it, or no image."""

    image: np.ndarray | None
    caption: Sequence[str]


class Row(NamedTuple):
    """Panels side by side under a title."""

    title: str
    panels: Sequence[Panel]


class Layout(NamedTuple):
    """The places of the panels of a sheet, all of one size, in pixels.

    width, height: of a panel.
    titled: rows have titles.
    """

    width: int
    height: int
    titled: bool = True

    def at(self, row: int, column: int) -> tuple[int, int]:
        """The left upper corner of a panel."""
        return MARGIN + column * (self.width + GAP), MARGIN + self.above + row * self.row_height

    @property
    def above(self) -> int:
        """The height of a title and the space below it."""
        return TITLE + 8 if self.titled else 0

    @property
    def row_height(self) -> int:
        """The height of a row with its title and its captions."""
        return self.above + self.height + 6 + CAPTION_LINES * LINE + GAP


def draw_sheet(
    rows: Sequence[Row], layout: Layout, states: Sequence[str], sample: np.ndarray, notes: Sequence[str]
) -> Image.Image:
    """A picture (RGB) of rows of panels, with a legend and notes below them.

    Args:
        rows: at least one.
        layout: the size of the panels.
        states: the keys of LEGEND that are explained.
        sample: (side,2·side,3) two patches, as large as the legend shows them.
        notes: lines at the end.
    """
    titles, captions = font_of(TITLE), font_of(CAPTION)
    columns = max(len(row.panels) for row in rows)
    width = max(layout.at(0, columns)[0] - GAP + MARGIN, 460)
    lines = [part for note in notes for part in _wrap(note, captions, width - 2 * MARGIN)]
    swatch = sample.shape[0]
    explained = [_wrap(LEGEND[state], captions, width - 2 * MARGIN - 2 * swatch - 10) for state in states]
    heights = [max(swatch, LINE * len(parts)) + 6 for parts in explained]
    legend = MARGIN + len(rows) * layout.row_height
    sheet = Image.new("RGB", (width, legend + sum(heights) + 8 + LINE * len(lines) + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        top = layout.at(number, 0)[1] - layout.above
        write(pen, titles, (MARGIN, top), fit(row.title, titles, width - 2 * MARGIN))
        for column, panel in enumerate(row.panels):
            x, y = layout.at(number, column)
            if panel.image is not None:
                pen.rectangle((x - 1, y - 1, x + layout.width, y + layout.height), outline=GREY)
                sheet.paste(Image.fromarray(panel.image), (x, y))
            for at, line in enumerate(panel.caption):
                place = (x, y + layout.height + 5 + at * LINE)
                write(pen, captions, place, fit(line, captions, layout.width + GAP // 2))
    for state, parts, height in zip(states, explained, heights, strict=True):
        sheet.paste(Image.fromarray(_swatch(state, sample)), (MARGIN, legend))
        pen.rectangle((MARGIN - 1, legend - 1, MARGIN + 2 * swatch, legend + swatch), outline=GREY)
        write(pen, captions, (MARGIN + 2 * swatch + 10, legend + (swatch - LINE) / 2), "\n".join(parts))
        legend += height
    write(pen, captions, (MARGIN, legend + 8), "\n".join(lines))
    return sheet


def _swatch(state: str, sample: np.ndarray) -> np.ndarray:
    """Two patches in a state."""
    side = sample.shape[0]
    rows = {"kept": [1, 2], "dropped": [-1, -1]}.get(state, [1, 1])
    patches = Patches(np.array(rows), np.array([state == "fused"] * 2), 3)
    geometry = Geometry(1, 2, side, 1)
    return draw_panel(sample, patches, colour(sample, patches, geometry), geometry)


def _wrap(text: str, font: Font, width: float) -> list[str]:
    """A text as lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
