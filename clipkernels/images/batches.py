"""Batches of preprocessed images, for a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from clipkernels import adapters
from clipkernels.adapters import UnsupportedTower
from clipkernels.images.reader import Reader


class Loaded(NamedTuple):
    """A batch: indices and images (B,3,S,S) of the readable files, index and reason of the others."""

    indices: list[int]
    images: Tensor | None
    failed: list[tuple[int, str]]


class Pictures(Dataset[tuple[int, Tensor | str]]):
    """Preprocessed images by index, all of one shape, or the reason why there is none.

    paths: the image files.
    preprocess: a callable from a PIL image to a tensor of that shape.
    shape: the shape (3,S,S) that the model takes, as `image_shape` gives it.
    exif: turn an image as its EXIF orientation says.
    """

    def __init__(
        self,
        paths: Sequence[str],
        preprocess: Callable[[Image.Image], Tensor],
        shape: tuple[int, ...],
        *,
        exif: bool = True,
    ) -> None:
        self.paths, self.preprocess, self.shape, self.reader = paths, preprocess, shape, Reader(exif)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        return index, self.reader.prepare(self.paths[index], self.preprocess, self.shape)


def collate(items: Sequence[tuple[int, Tensor | str]]) -> Loaded:
    """Stack the images of a batch, apart from the files that could not be read."""
    good = [(index, image) for index, image in items if isinstance(image, Tensor)]
    failed = [(index, reason) for index, reason in items if isinstance(reason, str)]
    images = torch.stack([image for _, image in good]) if good else None
    return Loaded([index for index, _ in good], images, failed)


def image_shape(model: nn.Module, preprocess: Callable[[Image.Image], Tensor]) -> tuple[int, ...]:
    """The shape (3,S,S) of the images that a model takes; of a ResNet, the shape that the preprocessing gives."""
    try:
        return (3, *adapters.find_tower(model).image_size)
    except UnsupportedTower:
        return tuple(preprocess(Image.new("RGB", (320, 240))).shape)


def to_rgb(image: Tensor, preprocess: Callable[[Image.Image], Tensor]) -> Tensor:
    """A preprocessed image (3,H,W) in [0, 1] again, so that preprocessed black and white are 0 and 1."""
    height, width = image.shape[1:]
    black, white = (preprocess(Image.new("RGB", (width, height), shade)) for shade in ("black", "white"))
    return ((image - black) / (white - black)).clamp(0, 1)
