"""What the tests of support sets share; each module has a file of its own."""

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
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty digits, in folders that say nothing of their class."""
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    folder = tmp_path_factory.mktemp("drawn")
    for index, image in enumerate(digits.draw(60, 3).images):
        path = folder / f"{index % 3}" / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.fixture
def photos(drawn: Path, tmp_path: Path) -> Path:
    """The same for one test, with nothing beside them."""
    return Path(shutil.copytree(drawn, tmp_path / "photos"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of every batch that is encoded."""
    sizes: list[int] = []
    encode_image = features.encode_image

    def counted(model: Any, images: Tensor) -> Any:
        sizes.append(len(images))
        return encode_image(model, images)

    monkeypatch.setattr(features, "encode_image", counted)
    return sizes


def prompts_of(classes: list[str], templates: tuple[str, ...] = digits.TEMPLATES) -> dict[str, list[str]]:
    return support.photo(classes, templates)


def retrieve(bundled: Any, photos: Path | str, classes: list[str] = NAMES, **options: Any) -> SupportSet:
    return support.retrieve(*bundled, prompts_of(classes), photos, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(found: SupportSet) -> list[list[str]]:
    """The files of each class."""
    return [
        [Path(image.path).name for image, label in zip(found.images, found.labels, strict=True) if label == k]
        for k in range(len(found.classes))
    ]
