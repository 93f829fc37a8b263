"""The images of `clipkernels demo`: held-out digits and scenes, drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from clipkernels.data import digits, scenes

HELD_OUT_SEED = 1_000_000
KINDS = ("digits", "scenes_seen", "scenes_unseen")


class Size(NamedTuple):
    """The amounts that the demo measures: images per kind, and batches and rounds of both models."""

    digits: int
    scenes: int
    unseen: int
    batch: int
    rounds: int
    full_batch: int
    full_rounds: int


FULL = Size(digits=899, scenes=640, unseen=320, batch=64, rounds=15, full_batch=8, full_rounds=5)
QUICK = Size(digits=60, scenes=40, unseen=20, batch=8, rounds=2, full_batch=1, full_rounds=1)


class LabelledImages(NamedTuple):
    """One data set: raw images (n,32,32,3) uint8, their labels (n,), and the prompts."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    templates: tuple[str, ...]


def draw(size: Size, seed: int) -> dict[str, LabelledImages]:
    """Return the images of every kind in KINDS; the bundled model was trained on none of them."""
    seed += HELD_OUT_SEED
    scene_prompts = (scenes.CLASSES, scenes.TEMPLATES)
    unseen = scenes.draw(size.unseen, seed, tuple(sorted(scenes.UNSEEN)))
    return {
        "digits": LabelledImages(*digits.draw(size.digits, seed), digits.CLASSES, digits.TEMPLATES),
        "scenes_seen": LabelledImages(*scenes.draw(size.scenes, seed), *scene_prompts),
        "scenes_unseen": LabelledImages(*unseen, *scene_prompts),
    }


def save(pictures: Mapping[str, LabelledImages], folder: Path) -> None:
    """Write the images as folder/kind/class/number.png."""
    for kind, (images, labels, classes, _) in pictures.items():
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / kind / classes[label] / f"{index:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
