"""Streams of photographs: clean, and corrupted at severities 1 to 5, with CIFAR-10-C's strengths where it has them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

import clipkernels as ck

STRENGTHS: dict[str, Sequence[float]] = {
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation, relative to the range of 1
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # radius in pixels
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # factor of the deviation from the mean
    "brightness": (1.1, 1.2, 1.3, 1.4, 1.6),  # factor
    "jpeg": (80, 65, 58, 50, 40),  # quality
}
STREAMS = ("clean", *STRENGTHS)


class Stream(NamedTuple):
    """Preprocessed images (n,3,S,S), their classes (n,) and severities (n,)."""

    images: Tensor
    labels: Tensor
    severity: Tensor


def corrupt(images: np.ndarray, labels: np.ndarray, limit: int, seed: int) -> dict[str, Stream]:
    """Return the streams of `limit` images drawn from (n,32,32,3) uint8; each corruption draws its own severities."""
    _, preprocess, _ = ck.bundled()
    selection = np.random.default_rng(seed).permutation(len(images))[:limit]
    streams = {}
    for place, kind in enumerate(STREAMS):
        rng = np.random.default_rng([seed, place])
        severity = rng.integers(1, 6, len(selection)) if kind != "clean" else np.zeros(len(selection), dtype=np.int64)
        pictures = [
            corrupted(Image.fromarray(images[index]), kind, level, rng)
            for index, level in zip(selection, severity, strict=True)
        ]
        stacked = torch.stack([preprocess(picture) for picture in pictures])
        streams[kind] = Stream(stacked, torch.from_numpy(labels[selection]), torch.from_numpy(severity))
    return streams


def corrupted(image: Image.Image, kind: str, severity: int, rng: np.random.Generator) -> Image.Image:
    """Return one image with a kind of corruption at a severity from 1 to 5."""
    if kind == "clean":
        return image
    strength = STRENGTHS[kind][severity - 1]
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(strength))
    if kind == "brightness":
        return ImageEnhance.Brightness(image).enhance(strength)
    if kind == "jpeg":
        return through_jpeg(image, int(strength))
    pixels = np.asarray(image) / 255
    if kind == "noise":
        pixels = pixels + rng.normal(scale=strength, size=pixels.shape)
    else:
        mean = pixels.mean((0, 1))
        pixels = (pixels - mean) * strength + mean
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Return an image after compression by JPEG."""
    file = io.BytesIO()
    image.save(file, "jpeg", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")
