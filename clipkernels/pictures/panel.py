"""A panel: an image with the patches that are left of it.

A kept patch has its own pixels. The patches of a merged token have its mean colour and, along the borders of the group,
one outline; parts of a group that lie apart have the same colour and the same outline. Fused patches are hatched, and
dropped ones are blank with a small cross.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from clipkernels.pictures.patches import Patches

# The colours of Okabe and Ito, which colour-blind readers tell apart, without black and the darkest blue.
OUTLINES = np.array(
    [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167), (250, 250, 250)]
)
HALO = (20, 20, 20)
HATCH = ((214, 214, 214), (130, 130, 130))
BLANK, CROSS = (252, 252, 252), (170, 170, 170)
HATCH_PERIOD, HATCH_LINE = 8, 2  # pixels
TARGET = 224  # pixels of a panel's longer side, at least two thirds of it
MIN_CELL = 12
FUSED = -3  # the group of fused patches; none has an outline
ALIKE = 48
"""Colours nearer than this, in RGB, look alike."""


class Geometry(NamedTuple):
    """The grid of patches in an image, and its enlargement.

    rows, columns: number of patches.
    patch: side of a patch in pixels of the image.
    scale: pixels of the panel per pixel of the image.
    """

    rows: int
    columns: int
    patch: int
    scale: int

    @classmethod
    def of(cls, height: int, width: int, patch: int) -> Geometry:
        """The grid of an image of a size in pixels, enlarged by a whole number so that patches are readable."""
        scale = max(1, round(TARGET / max(height, width)), -(-MIN_CELL // patch))
        return cls(height // patch, width // patch, patch, scale)

    @property
    def cell(self) -> int:
        """Side of a patch in pixels of the panel."""
        return self.patch * self.scale

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the panel in pixels."""
        return self.columns * self.cell, self.rows * self.cell


class Colouring(NamedTuple):
    """Colours of the patches of a panel: mean (P,3) of each one's token, and index (P,) of its outline or -1."""

    means: np.ndarray
    outlines: np.ndarray


def colour(pixels: np.ndarray, patches: Patches, geometry: Geometry, previous: np.ndarray | None = None) -> Colouring:
    """The colours of merged tokens: neighbours, and tokens of like colour, get different outlines as far as they can.

    Args:
        pixels: (H,W,3) uint8.
        patches: the patches of the image.
        geometry: of the image.
        previous: the outlines of the panel before this one, which tokens keep if they can, or None.
    """
    cells = _cells(pixels[: geometry.rows * geometry.patch, : geometry.columns * geometry.patch], geometry.patch)
    means = cells.reshape(len(patches.rows), -1, 3).mean(1)
    outlines = np.full(len(patches.rows), -1)
    merged = patches.merged
    known = np.full(len(patches.rows), -1) if previous is None else previous

    def order(row: int) -> tuple[bool, int, int]:
        members = patches.rows == row
        return bool((known[members] < 0).all()), -int(members.sum()), row

    groups = sorted(np.unique(patches.rows[merged]).tolist(), key=order)
    colours = np.empty((len(groups), 3))  # of the tokens
    neighbours = _neighbours(patches.rows.reshape(geometry.rows, geometry.columns))
    chosen = np.empty(len(groups), int)
    for place, row in enumerate(groups):
        members = patches.rows == row
        means[members] = colours[place] = means[members].mean(0)
        costs = 30.0 * (np.linalg.norm(OUTLINES - colours[place], axis=1) < 2 * ALIKE)
        like = np.linalg.norm(colours[:place] - colours[place], axis=1) < ALIKE
        beside = np.array([(row, other) in neighbours for other in groups[:place]], bool)
        np.add.at(costs, chosen[:place], 1 + 1000 * beside + 100 * like)
        if (known[members] >= 0).any():
            costs[np.bincount(known[members & (known >= 0)]).argmax()] -= 60
        outlines[members] = chosen[place] = costs.argmin()
    return Colouring(means, outlines)


def draw_panel(pixels: np.ndarray, patches: Patches, colouring: Colouring, geometry: Geometry) -> np.ndarray:
    """The panel (height,width,3) uint8 of an image.

    Args:
        pixels: (H,W,3) uint8.
        patches: the patches of the image.
        colouring: their colours, of `colour`.
        geometry: of the image.
    """
    covered = pixels[: geometry.rows * geometry.patch, : geometry.columns * geometry.patch]
    panel = covered.repeat(geometry.scale, 0).repeat(geometry.scale, 1)
    cells, grid = _cells(panel, geometry.cell), (geometry.rows, geometry.columns)
    merged, fused, dropped = (getattr(patches, name).reshape(grid) for name in ("merged", "fused", "dropped"))
    cells[merged] = np.rint(colouring.means.reshape(*grid, 3)[merged]).astype(np.uint8)[:, None, None]
    cells[fused] = _cells(_hatch(*panel.shape[:2]), geometry.cell)[fused]
    cells[dropped] = _cross(geometry.cell)
    line = 2 if geometry.cell < 40 else 3
    colours = OUTLINES[colouring.outlines].astype(np.uint8).reshape(*grid, 3)
    rows = np.where(patches.fused, FUSED, patches.rows).reshape(grid)  # hatched patches of a merged token are outside
    _outline(cells, rows, merged, np.broadcast_to(np.array(HALO, np.uint8), colours.shape), line + 1)
    _outline(cells, rows, merged, colours, line)
    return cells.transpose(0, 2, 1, 3, 4).reshape(panel.shape)


def _cells(image: np.ndarray, side: int) -> np.ndarray:
    """The cells (rows,columns,side,side,3) of an image."""
    rows, columns = image.shape[0] // side, image.shape[1] // side
    return image.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).copy()


def _hatch(height: int, width: int) -> np.ndarray:
    """Diagonal lines (height,width,3) that continue from cell to cell."""
    diagonal = np.add.outer(np.arange(height), np.arange(width)) % HATCH_PERIOD
    return np.array(HATCH, np.uint8)[(diagonal < HATCH_LINE).astype(int)]


def _cross(side: int) -> np.ndarray:
    """A blank cell (side,side,3) with a small cross in its centre."""
    across = np.abs(np.arange(side) - (side - 1) / 2)
    arm = (np.abs(np.subtract.outer(across, across)) < 0.75) & (np.maximum.outer(across, across) < side / 6)
    return np.where(arm[..., None], np.array(CROSS, np.uint8), np.array(BLANK, np.uint8))


def _outline(cells: np.ndarray, rows: np.ndarray, merged: np.ndarray, colours: np.ndarray, width: int) -> None:
    """Draw the borders of merged groups into their cells, `width` pixels wide, corners included."""
    padded = np.pad(rows, 1, constant_values=-2)
    height, length = rows.shape
    sides = {-1: slice(0, width), 0: slice(None), 1: slice(-width, None)}
    for down in sides:
        for right in sides:
            beside = padded[1 + down : 1 + down + height, 1 + right : 1 + right + length]
            edge = merged & (beside != rows)
            cells[edge, sides[down], sides[right]] = colours[edge][:, None, None]


def _neighbours(rows: np.ndarray) -> set[tuple[int, int]]:
    """The pairs of tokens whose patches touch in a grid of tokens."""
    pairs = set()
    for one, other in ((rows[1:], rows[:-1]), (rows[:, 1:], rows[:, :-1])):
        for a, b in zip(one.ravel().tolist(), other.ravel().tolist(), strict=True):
            pairs |= {(a, b), (b, a)}
    return pairs
