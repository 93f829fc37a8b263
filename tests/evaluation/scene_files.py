"""Drawn scenes as files, with train, val and test splits."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from clipkernels.data import scenes

PAIRS = scenes.SEEN[:6]
COUNTS = {"train": 120, "val": 60, "test": 90}


def scenes_in(folder: Path) -> Path:
    """Write scenes of six classes, a folder per split and class, and return the folder."""
    for seed, (split, count) in enumerate(COUNTS.items()):
        for number, (image, label) in enumerate(zip(*scenes.draw(count, seed + 77, PAIRS), strict=True)):
            target = folder / split / scenes.CLASSES[label]
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(target / f"{number:03}.png")
    return folder
