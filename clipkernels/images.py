"""Image files: the files that paths and globs name, draws from them, and batches of the readable ones."""

from __future__ import annotations

import glob
import os
import random
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
    """Yield every file named by files, folders and globs, in order; folders and globs are sorted.

    Raises:
        click.UsageError: a path that does not exist, a glob that matches nothing, a folder without images.
    """
    for pattern in images:
        matches = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise click.UsageError(f"expected a file, a folder or a glob, got {pattern!r}, which matches nothing")
        for path in matches:
            files = sorted(walk(path)) if os.path.isdir(path) else [path]
            if not files:
                raise click.UsageError(f"expected images ({', '.join(SUFFIXES)}), got none under {path!r}")
            yield from files


def walk(folder: str) -> Iterator[str]:
    """Yield the files below a folder whose names end like an image's.

    Raises:
        click.UsageError: a folder that cannot be read.
    """

    def stop(error: OSError) -> None:
        raise click.UsageError(f"expected a folder that can be read, got {error.filename!r}: {error.strerror}")

    for root, _, files in os.walk(folder, onerror=stop):
        yield from (os.path.join(root, file) for file in files if file.lower().endswith(SUFFIXES))


def draw_images(paths: Sequence[str], limit: int | None, seed: int | None) -> list[str]:
    """Return at most `limit` paths, drawn at random; a larger limit adds to the same draw.

    Args:
        paths: the paths to draw from.
        limit: the number of paths, or None for all.
        seed: of the order; None is 0 with a limit, and keeps the order of `paths` without one.
    """
    order = list(paths)
    if limit is not None or seed is not None:
        random.Random(seed or 0).shuffle(order)
    return order[:limit]


class Pictures(Dataset[tuple[int, Tensor | str]]):
    """Preprocessed images (3,S,S) by index, or the reason why a file is not an image."""

    def __init__(self, paths: Sequence[str], preprocess: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.preprocess = paths, preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            with Image.open(self.paths[index]) as file:
                image = file.convert("RGB")
        except Exception as error:  # Pillow's decoders raise all kinds of exceptions on a broken file
            return index, first_line(error)
        return index, self.preprocess(image)


def collate(items: Sequence[tuple[int, Tensor | str]]) -> Loaded:
    """Stack the images of a batch, apart from the files that could not be read."""
    good = [(index, image) for index, image in items if isinstance(image, Tensor)]
    failed = [(index, reason) for index, reason in items if isinstance(reason, str)]
    images = torch.stack([image for _, image in good]) if good else None
    return Loaded([index for index, _ in good], images, failed)


def skip_message(path: str, reason: str) -> str:
    """Return the line that reports a file that is not an image."""
    return f"skipped {path}: not an image ({reason})"


def first_line(error: Exception) -> str:
    """Return an exception's message in one line of at most 200 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
