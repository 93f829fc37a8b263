"""Fixtures and helpers of the tests of support sets."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import Tensor

import clipkernels as ck
from clipkernels import support
from clipkernels.data import digits
from clipkernels.support import SupportSet, features

NAMES = ["seven", "zero", "three"]


@pytest.fixture(scope="module")
def bundled() -> Any:
    return ck.bundled()


@pytest.fixture(scope="module")
def digit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sixty digits, in subfolders that are unrelated to their classes."""
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    folder = tmp_path_factory.mktemp("drawn")
    for index, image in enumerate(digits.draw(60, 3).images):
        path = folder / f"{index % 3}" / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.fixture
def photos(digit_folder: Path, tmp_path: Path) -> Path:
    """A copy of these images for one test, with nothing beside it."""
    return Path(shutil.copytree(digit_folder, tmp_path / "photos"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the encoded batches, appended as they are encoded."""
    sizes: list[int] = []
    encode_image = features.encode_image

    def counting(model: Any, images: Tensor) -> Any:
        sizes.append(len(images))
        return encode_image(model, images)

    monkeypatch.setattr(features, "encode_image", counting)
    return sizes


def prompts_of(classes: list[str], templates: tuple[str, ...] = digits.TEMPLATES) -> dict[str, list[str]]:
    return support.photo(classes, templates)


def retrieve(bundled: Any, photos: Path | str, classes: list[str] = NAMES, **options: Any) -> SupportSet:
    """A set whose classes share images, as published."""
    return support.retrieve(*bundled, prompts_of(classes), photos, **{"shared": True, **options})


def contents(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(support_set: SupportSet) -> list[list[str]]:
    """The file names of each class."""
    return [
        [
            Path(image.path).name
            for image, label in zip(support_set.images, support_set.labels, strict=True)
            if label == k
        ]
        for k in range(len(support_set.classes))
    ]
