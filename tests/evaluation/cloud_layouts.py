"""Tiny made-up copies of the point-cloud sets, each in its own layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

POINTS = 150


def shape(kind: int, seed: int) -> np.ndarray:
    """A cloud (POINTS,3) float32 of a kind: 0 a ball, 1 a stick, 2 a plate, with noise."""
    rng = np.random.default_rng([kind, seed])
    extent = ((1.0, 1.0, 1.0), (0.05, 1.0, 0.05), (1.0, 0.05, 1.0))[kind % 3]
    points: np.ndarray = rng.uniform(-1, 1, (POINTS, 3)) * extent + rng.normal(0, 0.02, (POINTS, 3))
    return points.astype(np.float32)


def write_clouds(path: Path, labels: Sequence[int], seed: int = 0, **replaced: Any) -> Path:
    """Write an HDF5 file of a cloud per label; keywords replace its arrays, None leaves one out."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    arrays = {
        "data": np.stack([shape(label, seed + place) for place, label in enumerate(labels)]),
        "label": np.array(labels, np.uint8)[:, None],
        **replaced,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            if array is not None:
                file[name] = array
    return path


def modelnet40(root: Path, train: int = 10, test: int = 4) -> Path:
    """ModelNet40's folder with three classes, of so many clouds each; the training clouds lie in two files."""
    home = root / "modelnet40_ply_hdf5_2048"
    for number in range(2):
        write_clouds(home / f"ply_data_train{number}.h5", [0, 1, 2] * (train // 2), 100 * number)
    write_clouds(home / "ply_data_test0.h5", [0, 1, 2] * test, 900)
    (home / "shape_names.txt").write_text("ball\nlong_stick\nplate\n")
    lists = {"train": ("ply_data_train0.h5", "ply_data_train1.h5"), "test": ("ply_data_test0.h5",)}
    for split, files in lists.items():
        lines = "".join(f"data/modelnet40_ply_hdf5_2048/{file}\n" for file in files)
        (home / f"{split}_files.txt").write_text(lines)
    return home


def scanobjectnn(root: Path, variant: str = "objectdataset.h5") -> Path:
    """ScanObjectNN's folder main_split with the files of a variant: bags, bins and boxes."""
    home = root / "h5_files" / "main_split"
    for split, count in (("training", 10), ("test", 3)):
        labels = [0, 1, 2] * count
        file = home / f"{split}_{variant}"
        write_clouds(file, labels, label=np.array(labels, np.int32), mask=np.zeros((len(labels), POINTS), np.int32))
    return home
