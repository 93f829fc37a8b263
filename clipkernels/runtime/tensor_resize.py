"""Resizing as torch resizes uint8 tensors: weights of 16 bits, rows first, uint8 between the two passes.

Pillow has weights of 22 bits, so a value in a thousand is rounded the other way, in either pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

GROUP = 32
"""Outputs that are computed in one matrix product, over the inputs that any of them reads."""


def resize_tensor(image: Any, size: tuple[int, int], interpolation: str) -> Any:
    """An image (h,w,3) uint8 of another size (H,W,3), rows first.

    Args:
        image: (h,w,3) uint8.
        size: H and W.
        interpolation: one of `FILTERS`.
    """
    for axis in (1, 0):
        if image.shape[axis] != size[axis]:
            image = _resize_axis(image, axis, size[axis], interpolation)
    return image


def _resize_axis(image: Any, axis: int, count: int, interpolation: str) -> Any:
    first, weights, bits = _weights(image.shape[axis], count, interpolation)
    rows = np.moveaxis(image, axis, 0)
    output = np.empty((count, *rows.shape[1:]), np.uint8)
    taps = weights.shape[1]
    for start in range(0, count, GROUP):
        index = range(start, min(start + GROUP, count))
        low, high = first[start], min(first[index[-1]] + taps, len(rows))
        matrix = np.zeros((len(index), high - low + taps))
        for place, row in enumerate(index):
            matrix[place, first[row] - low : first[row] - low + taps] = weights[row]
        # Sums of products of integers, which float64 holds exactly.
        sums = matrix[:, : high - low] @ rows[low:high].reshape(high - low, -1).astype(np.float64)
        levels = np.floor((sums + 2.0 ** (bits - 1)) / 2.0**bits).clip(0, 255)
        output[start : start + len(index)] = levels.reshape(len(index), *rows.shape[1:])
    return np.moveaxis(output, 0, axis)


@lru_cache(maxsize=64)
def _weights(size: int, count: int, interpolation: str) -> tuple[list[int], Any, int]:
    """The first input of each of `count` outputs, the weights (count,taps) of the inputs from there, and their bits.

    The weights are integers; one is 2 to the power of the bits. Those behind the inputs that an output reads are 0.
    """
    function, radius = FILTERS[interpolation]
    scale = size / count
    support, inverse = radius * max(scale, 1.0), 1 / max(scale, 1.0)
    taps = int(np.ceil(support)) * 2 + 1
    centers = scale * (np.arange(count) + 0.5)
    first = np.maximum((centers - support + 0.5).astype(int), 0)
    last = np.minimum((centers + support + 0.5).astype(int), size)
    places = first[:, None] + np.arange(taps)
    values = function(np.abs((places - centers[:, None] + 0.5) * inverse)) * (places < last[:, None])
    values /= values.sum(1, keepdims=True)
    bits = 0
    while bits < 22 and int(0.5 + values.max() * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    scaled = values * (1 << bits)
    return first.tolist(), np.trunc(scaled + np.copysign(0.5, scaled)), bits


def _bicubic(distance: Any) -> Any:
    a = -0.5
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))


def _bilinear(distance: Any) -> Any:
    return np.maximum(1 - distance, 0.0)


FILTERS: dict[str, tuple[Callable[[Any], Any], float]] = {"bicubic": (_bicubic, 2.0), "bilinear": (_bilinear, 1.0)}
"""The filters of a distance of at least 0, and the distance where they end."""
