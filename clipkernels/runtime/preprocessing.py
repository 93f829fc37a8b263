"""Preprocessing as data: steps from an RGB image to the pixels (3,S,S) float32 that a tower takes.

    {"op": "resize", "size": 224 | [h, w], "mode": …, "interpolation": "bicubic", "library": "pillow" | "torch"}
        shortest  int: the shorter side becomes `size`, the longer one is rounded down; [h, w]: the smallest size of
                  the image's proportions that covers them, rounded
        longest   [h, w]: the largest size of the image's proportions that fits in them, rounded
        squash    [h, w]: exactly these
        library   Pillow's arithmetic, or torch's of uint8 tensors; both always filter ("antialias")
    {"op": "center_crop", "size": [h, w], "fill": 0 | [r, g, b], "offset": "round" | "floor"}
        an image that is smaller is padded with the colour `fill`
    {"op": "to_float"}
        uint8 (H,W,3) to float32 (3,H,W), divided by 255
    {"op": "normalize", "mean": [r, g, b], "std": [r, g, b]}

The arithmetic behind a resize is float32, in torchvision's order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from clipkernels.runtime.tensor_resize import resize_tensor

Step = Mapping[str, Any]
FILTERS = {filter.name.lower(): filter for filter in Image.Resampling}
"""Pillow's filters by the names that steps give them."""


def preprocess(image: Image.Image, steps: Sequence[Step]) -> Any:
    """The pixels (3,S,S) float32 that steps make of an image, which is converted to RGB first.

    Raises:
        ValueError: an unknown step, or a step that does not go with the one before.
    """
    value: Any = image.convert("RGB")
    for step in steps:
        run = STEPS.get(step["op"])
        if run is None:
            raise ValueError(f"expected one of the steps {', '.join(STEPS)}, got {step['op']!r:.40}")
        value = run(value, step)
    if not isinstance(value, np.ndarray):
        raise ValueError("expected steps that end in pixels, got steps without to_float")
    return np.ascontiguousarray(value)


def _resize(image: Image.Image, step: Step) -> Image.Image:
    width, height = image.size
    size, mode = step["size"], step["mode"]
    if mode == "squash":
        height, width = size
    elif isinstance(size, int):
        short, long = sorted(image.size)
        other = int(size * long / short)
        width, height = (size, other) if width <= height else (other, size)
    else:
        ratios = height / size[0], width / size[1]
        ratio = max(ratios) if mode == "longest" else min(ratios)
        height, width = round(height / ratio), round(width / ratio)
    if (width, height) == image.size:
        return image
    if step["library"] == "torch":
        return Image.fromarray(resize_tensor(np.asarray(image), (height, width), step["interpolation"]))
    return image.resize((width, height), FILTERS[step["interpolation"]])


def _center_crop(image: Image.Image, step: Step) -> Image.Image:
    height, width = step["size"]
    missing = max(width - image.width, 0), max(height - image.height, 0)
    if any(missing):
        fill = step["fill"]
        colour = (fill,) * 3 if isinstance(fill, int) else tuple(fill)
        canvas = Image.new("RGB", (image.width + missing[0], image.height + missing[1]), colour)
        canvas.paste(image, (missing[0] // 2, missing[1] // 2))
        image = canvas
    rounded = int if step["offset"] == "floor" else round  # to even, as torchvision rounds
    left, top = rounded((image.width - width) / 2), rounded((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _to_float(image: Image.Image, step: Step) -> Any:
    return np.asarray(image).transpose(2, 0, 1).astype(np.float32) / np.float32(255)


def _normalize(pixels: Any, step: Step) -> Any:
    mean, std = (np.asarray(step[name], np.float32)[:, None, None] for name in ("mean", "std"))
    return (pixels - mean) / std


STEPS: dict[str, Callable[[Any, Step], Any]] = {
    "resize": _resize,
    "center_crop": _center_crop,
    "to_float": _to_float,
    "normalize": _normalize,
}
