"""HDF5 files of point clouds: their labels, and pictures of one cloud."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clipkernels.data import depth_maps
from clipkernels.files import open_named, stamp_of
from clipkernels.messages import first_line, join_sizes

MAX_BYTES = 4 << 30
MAX_COUNT = 1 << 20
"""The most clouds of a file, and points of a cloud: compressed files are small at any number."""
SIDE = 224
"""Height and width in pixels of a picture."""


def read_labels(path: Path, classes: int) -> list[int]:
    """The classes of the clouds of a file; the clouds themselves are not read.

    Raises:
        ImportError: h5py is not installed.
        ValueError: no HDF5 file, or one without clouds "data" (n,points,3) and their labels "label" (n) or (n,1), or
            with more than `MAX_COUNT` clouds or points of a cloud.
        OSError: the file cannot be read.
    """
    with _opened(path) as file:
        data, label = (_dataset(file, name, path) for name in ("data", "label"))
        shape = data.shape
        if len(shape) != 3 or shape[2] != 3 or shape[1] < 2 or data.dtype.kind != "f":
            raise _fault(path, f"data ({join_sizes(shape)}) {data.dtype} instead of floats (n,points,3)")
        if max(shape) > MAX_COUNT:
            raise _fault(path, f"data ({join_sizes(shape)}) of more than {MAX_COUNT} clouds or points of a cloud")
        if label.shape not in ((shape[0],), (shape[0], 1)) or label.dtype.kind not in "iu":
            raise _fault(path, f"label ({join_sizes(label.shape)}) {label.dtype} instead of integers ({shape[0]},1)")
        labels = np.asarray(label[()], np.int64).flatten()
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise _fault(path, f"labels from {labels.min()} to {labels.max()} for {classes} classes")
    return [int(each) for each in labels]


@dataclass(frozen=True)
class CloudViews:
    """Reads a picture of a cloud by name: "ply_data_test0.h5#17:3" is the third view of cloud 17.

    folder: the folder of the files.
    views: the number of views, 6 or 10.
    """

    folder: str
    views: int

    def names(self, file: str, cloud: int) -> Iterator[str]:
        """The names of all pictures of a cloud."""
        return (f"{file}#{cloud}:{view + 1}" for view in range(self.views))

    def __call__(self, name: str) -> Image.Image:
        """The picture of a name, 224×224, in mode RGB; raises ValueError for a cloud that has no depth map."""
        file, _, place = name.rpartition("#")
        cloud, _, view = place.partition(":")
        path = os.path.join(self.folder, file)
        pictures = _pictures(path, stamp_of(path), int(cloud), self.views)
        return Image.fromarray(pictures[int(view) - 1]).convert("RGB")


@lru_cache(maxsize=4)
def _pictures(path: str, stamp: tuple[int, int], cloud: int, views: int) -> np.ndarray:
    """The depth maps (V,224,224) uint8 of a cloud; its views are asked for one after another."""
    with _opened(path) as file:
        data = _dataset(file, "data", path)
        if data.ndim != 3 or cloud >= len(data) or data.shape[1] > MAX_COUNT:
            raise ValueError(f"expected cloud {cloud} in {path}, got a file without it")
        # Coordinates in fp64 may be far from the origin, where fp32 does not tell points apart.
        wide = np.float64 if data.dtype.itemsize > 4 else np.float32
        points = torch.from_numpy(np.asarray(data[cloud], wide))
    maps = depth_maps(points[None], views, SIDE)[0, :, 0]
    array: np.ndarray = (maps * 255).round().byte().numpy()
    return array


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open an HDF5 file; errors of the library, which come while reading too, name it in one line."""
    try:
        import h5py
    except ImportError as error:
        expected = "expected h5py to be installed (pip install 'clipkernels[clouds]')"
        raise ImportError(f"{expected}, got: {error}", name=error.name) from error
    with open_named(path, "an HDF5 file of point clouds", MAX_BYTES) as raw:
        try:
            with h5py.File(raw, "r") as file:
                yield file
        except (OSError, RuntimeError, KeyError, TypeError) as error:
            raise _fault(path, first_line(error)) from error


def _dataset(file: Any, name: str, path: str | os.PathLike[str]) -> Any:
    """The array of a name in a file; raises ValueError if there is none, or if its values lie in other files."""
    import h5py

    link = file.get(name, getlink=True)
    if link is None:
        raise _fault(path, f"no array {name!r}")
    dataset = file[name] if isinstance(link, h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.external is not None or dataset.is_virtual:
        raise _fault(path, f"{name!r} that is no array of its own")
    return dataset


def _fault(path: str | os.PathLike[str], reason: str) -> ValueError:
    return ValueError(f"expected an HDF5 file of point clouds, got {path} with {reason}: get it anew")
