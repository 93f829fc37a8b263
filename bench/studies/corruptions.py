"""Streams of photographs: clean, and at severities 1 to 5 of corruptions, as strong as CIFAR-10-C where it has them."""

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
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation, of 1
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # radius in pixels
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # of the spread around the mean
    "brightness": (1.1, 1.2, 1.3, 1.4, 1.6),  # times
    "jpeg": (80, 65, 58, 50, 40),  # quality
}
STREAMS = ("clean", *STRENGTHS)


class Stream(NamedTuple):
    """Preprocessed images (n,3,S,S), their classes (n,) and severities (n,)."""

    images: Tensor
    labels: Tensor
    severity: Tensor


def corrupt(images: np.ndarray, labels: np.ndarray, limit: int, seed: int) -> dict[str, Stream]:
    """The streams of `limit` images drawn from (n,32,32,3) uint8, each corruption with its own severities."""
    _, preprocess, _ = ck.bundled()
    pick = np.random.default_rng(seed).permutation(len(images))[:limit]
    made = {}
    for place, kind in enumerate(STREAMS):
        rng = np.random.default_rng([seed, place])
        severity = rng.integers(1, 6, len(pick)) if kind != "clean" else np.zeros(len(pick), dtype=np.int64)
        pictures = [
            corrupted(Image.fromarray(images[index]), kind, level, rng)
            for index, level in zip(pick, severity, strict=True)
        ]
        stacked = torch.stack([preprocess(picture) for picture in pictures])
        made[kind] = Stream(stacked, torch.from_numpy(labels[pick]), torch.from_numpy(severity))
    return made


def corrupted(image: Image.Image, kind: str, severity: int, rng: np.random.Generator) -> Image.Image:
    """One image at a severity from 1 to 5."""
    if kind == "clean":
        return image
    strength = STRENGTHS[kind][severity - 1]
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(strength))
    if kind == "brightness":
        return ImageEnhance.Brightness(image).enhance(strength)
    if kind == "jpeg":
        file = io.BytesIO()
        image.save(file, "jpeg", quality=int(strength))
        return Image.open(io.BytesIO(file.getvalue())).convert("RGB")
    pixels = np.asarray(image) / 255
    if kind == "noise":
        pixels = pixels + rng.normal(scale=strength, size=pixels.shape)
    else:
        mean = pixels.mean((0, 1))
        pixels = (pixels - mean) * strength + mean
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
