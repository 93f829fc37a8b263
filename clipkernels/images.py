"""Image files: which ones are meant, and batches of those that can be read."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import click
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clipkernels.support.folders import SUFFIXES


class Loaded(NamedTuple):
    """A batch: indices and images (B,3,S,S) of the readable files, index and reason of the others."""

    indices: list[int]
    images: Tensor | None
    failed: list[tuple[int, str]]


def find_images(images: Sequence[str]) -> Iterator[str]:
    """Every file meant by files, folders and globs, in order, folders and globs sorted.

    Raises:
        click.UsageError: a path that is not there, a glob that matches nothing, a folder without images.
    """
    for given in images:
        named = [given] if os.path.lexists(given) else sorted(glob.glob(given, recursive=True))
        if not named:
            raise click.UsageError(f"expected a file, a folder or a glob, got {given!r}, which matches nothing")
        for path in named:
            found = sorted(walk(path)) if os.path.isdir(path) else [path]
            if not found:
                raise click.UsageError(f"expected images ({', '.join(SUFFIXES)}), got none under {path!r}")
            yield from found


def walk(folder: str) -> Iterator[str]:
    """The files below a folder that are named like images."""

    def stop(error: OSError) -> None:
        raise click.UsageError(f"expected a folder that can be read, got {error.filename!r}: {error.strerror}")

    for root, _, files in os.walk(folder, onerror=stop):
        yield from (os.path.join(root, file) for file in files if file.lower().endswith(SUFFIXES))


class Pictures(Dataset[tuple[int, Tensor | str]]):
    """Preprocessed images (3,S,S) by index, or why a file is none."""

    def __init__(self, paths: Sequence[str], preprocess: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.preprocess = paths, preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            with Image.open(self.paths[index]) as file:
                image = file.convert("RGB")
        except Exception as error:  # Pillow's decoders raise whatever a broken file makes them
            return index, first_line(error)
        return index, self.preprocess(image)


def collate(items: Sequence[tuple[int, Tensor | str]]) -> Loaded:
    """The images stacked, apart from what could not be read."""
    good = [(index, image) for index, image in items if isinstance(image, Tensor)]
    failed = [(index, reason) for index, reason in items if isinstance(reason, str)]
    return Loaded([index for index, _ in good], torch.stack([i for _, i in good]) if good else None, failed)


def first_line(error: Exception) -> str:
    """An exception's message, in one line of bounded length."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
