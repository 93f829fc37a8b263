"""A small labelled data set of drawn scenes, with train, val and test splits."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from clipkernels.data import scenes


PAIRS = scenes.SEEN[:6]
"""The classes of the data set."""


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes as files: train, val and test, each with a folder per class."""
    folder = tmp_path_factory.mktemp("scenes")
    for seed, (split, count) in enumerate({"train": 120, "val": 60, "test": 90}.items()):
        for number, (image, label) in enumerate(zip(*scenes.draw(count, seed + 77, PAIRS), strict=True)):
            target = folder / split / scenes.CLASSES[label]
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(target / f"{number:03}.png")
    return folder
