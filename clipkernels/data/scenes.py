"""Scenes drawn from a seed: one of eight shapes in one of eight colours on a cluttered background, 32×32 RGB.

Eight (colour, shape) pairs, one per colour and one per shape, never occur in training. Classifying them requires a
model that combines colours and shapes learnt from other pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, interpolate

from clipkernels.arguments import check_int, describe, is_list

SIDE = 32
COLOURS = {
    "red": (205, 25, 25),
    "orange": (250, 130, 10),
    "yellow": (245, 230, 30),
    "green": (25, 150, 45),
    "blue": (30, 60, 215),
    "purple": (135, 35, 165),
    "white": (245, 245, 245),
    "black": (12, 12, 12),
}
TEMPLATES = (
    "a {}.",
    "a drawing of a {}.",
    "a picture of a {}.",
    "a photo of a {}.",
    "a {} on a cluttered background.",
)
Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (y > -0.7) & (y + 1.75 * np.abs(x) < 1)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The points inside a five-pointed star."""
    # Fold the plane into one tenth of the star, which has a single edge.
    angle = np.mod(np.arctan2(x, y), 2 * math.pi / 5)
    angle = np.minimum(angle, 2 * math.pi / 5 - angle)
    radius, inner = np.hypot(x, y), 0.42
    edge_x, edge_y = inner * math.cos(math.pi / 5) - 1, inner * math.sin(math.pi / 5)
    return edge_x * radius * np.sin(angle) - edge_y * (radius * np.cos(angle) - 1) >= 0


SHAPES: dict[str, Shape] = {
    "circle": lambda x, y: np.hypot(x, y) < 0.9,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.75) < 0.22,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.8,
    "triangle": _triangle,
    "star": _star,
    "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) < 0.27) & (np.maximum(np.abs(x), np.abs(y)) < 0.95),
    "heart": lambda x, y: (1.3 * x**2 + 1.3 * y**2 - 0.75) ** 3 < 2 * x**2 * (y + 0.1) ** 3,
    "diamond": lambda x, y: np.abs(x) / 0.62 + np.abs(y) < 1,
}
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
UNSEEN = frozenset(len(SHAPES) * i + (3 * i + 1) % len(SHAPES) for i in range(len(COLOURS)))
SEEN = tuple(c for c in range(len(CLASSES)) if c not in UNSEEN)


class Images(NamedTuple):
    """Images (n,32,32,3) uint8 and their labels (n,) int64 into the module's CLASSES."""

    images: np.ndarray
    labels: np.ndarray


def draw(n: int, seed: int, pairs: tuple[int, ...] = SEEN) -> Images:
    """n scenes with classes drawn from `pairs`; equal n, seed and pairs give equal scenes.

    Args:
        n: number of scenes.
        seed: non-negative; for held-out scenes use a seed that training never used.
        pairs: indices into CLASSES, usually `SEEN` or `tuple(UNSEEN)`.
    Returns:
        Images.
    Raises:
        ValueError: numbers that are no ints or out of range.
    """
    check_int("n", n, 0)
    check_int("seed", seed, 0)
    if not is_list(pairs) or not pairs:
        raise ValueError(f"pairs must be a tuple of indices into CLASSES, got {describe(pairs)}")
    for place, pair in enumerate(pairs):
        check_int(f"pairs[{place}]", pair, 0, len(CLASSES) - 1)
    rng = np.random.default_rng([seed, 1])
    labels = np.asarray(pairs, dtype=np.int64)[rng.integers(len(pairs), size=n)]
    canvas = clutter(rng, texture(rng, n))
    colour = np.asarray(list(COLOURS.values()), dtype=np.float32)[labels // len(SHAPES)] / 255
    colour = np.clip(colour + rng.normal(0, 0.035, colour.shape), 0, 1).astype(np.float32)
    x, y = _shape_coordinates(rng, n)
    inside = np.zeros(x.shape, dtype=np.float32)
    for index, shape in enumerate(SHAPES.values()):
        of_shape = labels % len(SHAPES) == index
        inside[of_shape] = shape(x[of_shape], y[of_shape])
    alpha = avg_pool2d(torch.from_numpy(inside)[:, None], 2).numpy()[:, 0, :, :, None]
    canvas = canvas * (1 - alpha) + colour[:, None, None] * alpha
    canvas += rng.normal(0, 0.02, canvas.shape).astype(np.float32)
    return Images((np.clip(canvas, 0, 1) * 255).round().astype(np.uint8), labels)


def texture(rng: np.random.Generator, n: int) -> np.ndarray:
    """n muted backgrounds (n,32,32,3) float32 in [0,1]: smooth colour, coarse patches and grain."""
    canvas: np.ndarray = rng.uniform(0.25, 0.75, (n, 1, 1, 1)).astype(np.float32)
    for cells, channels, strength in ((2, 3, 0.16), (5, 3, 0.1), (11, 1, 0.12)):
        noise = torch.from_numpy(rng.uniform(-1, 1, (n, channels, cells, cells)).astype(np.float32))
        smooth = interpolate(noise, size=(SIDE, SIDE), mode="bilinear", align_corners=True)
        canvas = canvas + strength * smooth.permute(0, 2, 3, 1).numpy()
    canvas = canvas + rng.normal(0, 0.03, (n, SIDE, SIDE, 1)).astype(np.float32)
    return np.clip(canvas, 0.05, 0.95)


def clutter(rng: np.random.Generator, canvas: np.ndarray, strokes: int = 6) -> np.ndarray:
    """The canvas (n,32,32,3) with `strokes` muted strokes drawn on it."""
    n = len(canvas)
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    for _ in range(strokes):
        centre = rng.uniform(0, SIDE, (2, n, 1, 1)).astype(np.float32)
        angle = rng.uniform(0, math.pi, (n, 1, 1)).astype(np.float32)
        x, y = columns - centre[0], rows - centre[1]
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        size = rng.uniform((2, 0.6), (9, 1.8), (n, 2)).astype(np.float32)[:, :, None, None]
        ink = rng.uniform(0.2, 0.8, (n, 1, 1, 1)) + rng.uniform(-0.12, 0.12, (n, 1, 1, 3))
        stroke = (np.abs(along) < size[:, 0]) & (np.abs(across) < size[:, 1])
        canvas = np.where(stroke[..., None], ink.astype(np.float32), canvas)
    return canvas


def _shape_coordinates(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Shape coordinates (n,64,64), y up, of every half pixel, for a random position, size and tilt per image."""
    rows, columns = (np.mgrid[: 2 * SIDE, : 2 * SIDE].astype(np.float32) + 0.5) / 2
    radius = rng.uniform(6.5, 12, (n, 1, 1)).astype(np.float32)
    centre = rng.uniform(radius, SIDE - radius, (2, n, 1, 1)).astype(np.float32)
    tilt = rng.uniform(-0.25, 0.25, (n, 1, 1)).astype(np.float32)
    x, y = (columns - centre[0]) / radius, (centre[1] - rows) / radius
    return x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt)
