"""Preprocessing of open_clip, timm and transformers as steps of `clipkernels.runtime.preprocessing`, proved on images.

The steps of a torchvision `Compose` give the host's pixels bit for bit. Image processors of transformers rescale in
another order: pixels differ in the last bits, and by one grey level where they resize in a way of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from clipkernels.arguments import describe
from clipkernels.artefacts.transformers import run_processor
from clipkernels.runtime.preprocessing import FILTERS, Step
from clipkernels.runtime.preprocessing import preprocess as run_steps

SIZES = ((64, 48), (48, 64), (40, 200), (301, 211), (23, 31), (600, 1600))
"""Widths and heights of the images that prove the steps; tall ones tell the libraries that resize apart."""
CONVERSIONS = ("_convert_to_rgb", "_convert_image_to_rgb")
"""The functions of open_clip and OpenAI's clip that convert an image to RGB, as every preprocessing here does first."""
GREY_LEVELS = 1.01
"""The largest difference of a pixel, in units of 1/255 before normalisation: one level, and rounding."""


def preprocess_record(preprocess: Any) -> dict[str, Any]:
    """The record of a preprocessing in export.json: {"steps": […]}, whose pixels have been compared with the host's.

    Args:
        preprocess: a Compose of torchvision, as open_clip and timm make them; an image processor of transformers, a
            processor that has one, or clipkernels' partial of one.
    Raises:
        ValueError: a preprocessing of another kind, one that no steps describe, or one whose pixels differ from theirs.
    """
    preprocess = getattr(preprocess, "image_processor", preprocess)
    if getattr(preprocess, "func", None) is run_processor:
        preprocess = preprocess.args[0]
    if hasattr(preprocess, "transforms"):
        candidates, call = [list(_steps_of_compose(preprocess.transforms))], preprocess
    elif hasattr(preprocess, "image_mean"):
        steps, call = list(_steps_of_processor(preprocess)), _caller(preprocess)
        # A processor resizes images or tensors, by its class and by the version of transformers.
        candidates = [steps, [step | {"library": "torch"} if step["op"] == "resize" else step for step in steps]]
    else:
        raise ValueError(
            "expected a preprocessing of open_clip, timm or transformers, whose steps can be read, got "
            f"{describe(preprocess)}: pass preprocess= as the library makes it"
        )
    differences = [grey_levels(steps, call) for steps in candidates]
    least = min(differences)
    steps = candidates[differences.index(least)]
    if not least <= GREY_LEVELS:
        raise ValueError(
            f"expected steps that give the host's pixels, got pixels up to {least:.3g} grey levels away from {steps}"
        )
    return {"steps": steps}


def grey_levels(steps: Sequence[Step], preprocess: Callable[[Image.Image], Any]) -> float:
    """The largest difference of steps from a host's preprocessing on images of noise, ramps and blocks, in grey levels.

    It is infinite if the shapes differ or a pixel is NaN.
    """
    std = next((step["std"] for step in steps if step["op"] == "normalize"), [1, 1, 1])
    largest = 0.0
    for seed, (width, height) in enumerate(SIZES):
        y, x = np.mgrid[:height, :width]
        ramps = np.stack([255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)], -1)
        noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
        blocks = 255 * (noise[::8, ::8] // 128).repeat(8, 0).repeat(8, 1)[:height, :width]  # a resize overshoots
        for values in (ramps, noise, blocks):
            image = Image.fromarray(values.astype(np.uint8))
            expected, actual = np.asarray(preprocess(image), np.float32), run_steps(image, steps)
            if expected.shape != actual.shape:
                return math.inf
            levels = np.abs(expected - actual) * np.reshape(std, (3, 1, 1)) * 255
            largest = max(largest, float(np.nan_to_num(levels, nan=math.inf).max()))
    return largest


def _steps_of_compose(transforms: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """The steps of the transforms that open_clip and timm compose.

    Raises:
        ValueError: another transform.
    """
    for transform in transforms:
        name = type(transform).__name__
        if name == "Resize" and getattr(transform, "max_size", None) is None:
            size = transform.size if isinstance(transform.size, int) else list(transform.size)
            if isinstance(size, list) and len(size) == 1:
                [size] = size
            yield _resize(size, "shortest" if isinstance(size, int) else "squash", _filter_of(transform.interpolation))
        elif name == "ResizeKeepRatio" and transform.longest in (0.0, 1.0):
            mode = "longest" if transform.longest else "shortest"
            yield _resize(list(transform.size), mode, _filter_of(transform.interpolation))
        elif name in ("CenterCrop", "CenterCropOrPad") and getattr(transform, "padding_mode", "constant") == "constant":
            yield _crop(_pair(transform.size), _plain(getattr(transform, "fill", 0)), "round")
        elif name in ("ToTensor", "MaybeToTensor"):
            yield {"op": "to_float"}
        elif name == "Normalize":
            yield _normalize(transform.mean, transform.std)
        elif name != "MaybeConvertMode" and getattr(transform, "__name__", "") not in CONVERSIONS:
            raise ValueError(
                f"expected transforms of open_clip and timm for evaluation, got {transform!r:.200}: pass preprocess= "
                "as the library makes it for evaluation"
            )


def _steps_of_processor(processor: Any) -> Iterator[dict[str, Any]]:
    """The steps of an image processor of transformers.

    Raises:
        ValueError: it pads, has another size than (height, width) or the shortest edge, or another factor than 1/255.
    """
    name = type(processor).__name__
    if getattr(processor, "do_pad", None):
        raise ValueError(f"expected an image processor that does not pad, got {name} with do_pad")
    if getattr(processor, "do_resize", False):
        size = {key: value for key, value in dict(processor.size).items() if value is not None}
        filtered = Image.Resampling(processor.resample).name.lower()
        if set(size) == {"shortest_edge"}:
            yield _resize(size["shortest_edge"], "shortest", filtered)
        elif set(size) == {"height", "width"}:
            yield _resize([size["height"], size["width"]], "squash", filtered)
        else:
            raise ValueError(f"expected {name} with a size of height and width or shortest_edge, got {size}")
    if getattr(processor, "do_center_crop", False):
        crop = dict(processor.crop_size)
        yield _crop([crop["height"], crop["width"]], 0, "floor")
    if not getattr(processor, "do_rescale", False) or abs(processor.rescale_factor * 255 - 1) > 1e-6:
        raise ValueError(f"expected {name} that divides by 255, got the factor {processor.rescale_factor}")
    yield {"op": "to_float"}
    if getattr(processor, "do_normalize", False):
        yield _normalize(processor.image_mean, processor.image_std)


def _resize(size: Any, mode: str, interpolation: str) -> dict[str, Any]:
    return {"op": "resize", "size": size, "mode": mode, "interpolation": interpolation, "library": "pillow"}


def _crop(size: list[int], fill: Any, offset: str) -> dict[str, Any]:
    return {"op": "center_crop", "size": size, "fill": fill, "offset": offset}


def _normalize(mean: Any, std: Any) -> dict[str, Any]:
    return {"op": "normalize", "mean": _floats(mean), "std": _floats(std)}


def _floats(values: Any) -> list[float]:
    """Three numbers, as float32 holds them; one number stands for three."""
    return np.broadcast_to(np.asarray(values, np.float32), (3,)).tolist()


def _pair(size: Any) -> list[int]:
    return [int(size)] * 2 if isinstance(size, int) else [int(part) for part in size]


def _plain(fill: Any) -> Any:
    return int(fill) if isinstance(fill, int | float) else [int(part) for part in fill]


def _filter_of(interpolation: Any) -> str:
    """The name of an interpolation mode of torchvision, which is Pillow's.

    Raises:
        ValueError: one that Pillow lacks, such as timm's random choice of two.
    """
    name = getattr(interpolation, "value", interpolation)
    if name not in FILTERS:
        raise ValueError(f"expected one of Pillow's interpolations ({', '.join(FILTERS)}), got {interpolation!r:.60}")
    return str(name)


def _caller(processor: Any) -> Callable[[Image.Image], Any]:
    return lambda image: processor(images=image, return_tensors="np")["pixel_values"][0]
