"""CIFAR-10 and CIFAR-100: the binary version, or folders of images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from clipkernels.evaluation.datasets.class_folders import PHOTO, read_class_folders
from clipkernels.evaluation.datasets.dataset import Dataset, Items, Request, absence_note
from clipkernels.evaluation.datasets.places import find_home
from clipkernels.evaluation.text_files import read_lines
from clipkernels.files import open_named
from clipkernels.messages import list_names

SIDE = 32
PIXELS = 3 * SIDE * SIDE
MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class CIFAR:
    """CIFAR's binary version, in which an image is its labels and 3072 bytes, the red, green and blue planes.

    folder: the folder that the archive unpacks to.
    names: the file of the class names in it.
    classes: the number of classes.
    label_bytes: bytes before the pixels, the last of which is the label.
    files: the files of each split.
    pickles: the folder of the Python version and its file of class names, which is refused because it is pickled.
    Source: www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
    """

    folder: str
    names: str
    classes: int
    label_bytes: int
    files: Mapping[str, tuple[str, ...]]
    pickles: tuple[str, str]
    template: str = PHOTO

    def read(self, request: Request) -> Dataset:
        """The set; raises ValueError for the pickled version, faulty files, and as a plain folder of folders."""
        binaries = [file for files in self.files.values() for file in files]
        names = (self.folder, f"{request.name}/{self.folder}")
        home = find_home(request.path, lambda folder: any((folder / file).is_file() for file in binaries), names)
        if home is None:
            python = find_home(request.path, lambda folder: (folder / self.pickles[1]).is_file(), self.pickles[:1])
            if python is not None:
                raise ValueError(
                    f"expected the binary version of {request.name}, got pickled files in {str(python)!r}, which may "
                    f"run code: unpack {self.folder} of {self.archive} instead, or make a folder of images per class"
                )
            dataset = read_class_folders(request, self.template)
            if len(dataset.classes) != self.classes:
                note = f"{len(dataset.classes)} of the {self.classes} classes have images"
                return dataset._replace(notes=(*dataset.notes, note))
            return dataset
        if not (home / self.names).is_file():
            raise ValueError(f"expected {self.names} in {str(home)!r}, got none: unpack {self.archive} again")
        classes = tuple(line.replace("_", " ") for _, line in read_lines(home / self.names, "CIFAR's class names"))
        if len(set(classes)) != self.classes or len(classes) != self.classes:
            raise ValueError(f"expected {self.classes} class names, got {len(classes)} in {home / self.names}")
        splits = {}
        for split in request.splits:
            files = [file for file in self.files.get(split, ()) if (home / file).is_file()]
            if files:
                splits[split] = self._read_files(home, files)
        if not splits:
            expected = [file for split in request.splits for file in self.files.get(split, ())]
            raise ValueError(f"expected {list_names(expected) or 'a train or test split'} in {str(home)!r}, got none")
        missing = [file for split in splits for file in self.files[split] if not (home / file).is_file()]
        notes = [absence_note(self.files), f"there is no {list_names(missing)}" if missing else None]
        return Dataset(
            *(request.name, classes, (self.template,), splits, f"binary version {self.folder}"),
            tuple(note for note in notes if note),
        )

    @property
    def archive(self) -> str:
        """The name of the binary version's archive."""
        return f"cifar-{self.classes}-binary.tar.gz"

    def _read_files(self, home: Path, files: list[str]) -> Items:
        names: list[str] = []
        labels: list[int] = []
        for file in files:
            found = self._labels(home / file)
            names += [f"{file}#{index}" for index in range(len(found))]
            labels += found
        packed = tuple(str(home / file) for file in files)
        return Items(tuple(names), tuple(labels), Records(str(home), self.label_bytes), packed)

    def _labels(self, path: Path) -> list[int]:
        """The labels of a file's images; raises ValueError for a file of another size or with other labels."""
        with open_named(path, "a file of CIFAR's binary version", MAX_BYTES) as file:
            content = np.frombuffer(file.read(), np.uint8)
        size = self.label_bytes + PIXELS
        if not len(content) or len(content) % size:
            raise ValueError(
                f"expected images of {size} bytes each, got {path} of {len(content)} bytes: unpack it again"
            )
        labels = content.reshape(-1, size)[:, self.label_bytes - 1]
        if labels.max() >= self.classes:
            raise ValueError(f"expected labels below {self.classes}, got {labels.max()} in {path}: unpack it again")
        return [int(label) for label in labels]


@dataclass(frozen=True)
class Records:
    """Reads the images of CIFAR's binary files by name, "test_batch.bin#17".

    folder: the folder of the files.
    label_bytes: bytes before the pixels of an image.
    """

    folder: str
    label_bytes: int

    def __call__(self, name: str) -> Image.Image:
        """The image of a name, in mode RGB; raises ValueError for a file that ends before it."""
        file_name, _, index = name.rpartition("#")
        size = self.label_bytes + PIXELS
        with open_named(os.path.join(self.folder, file_name), "a file of CIFAR's binary version") as file:
            file.seek(int(index) * size + self.label_bytes)
            content = file.read(PIXELS)
        if len(content) < PIXELS:
            raise ValueError(f"expected image {index} in {file_name}, got a file that ends before it")
        planes = np.frombuffer(content, np.uint8).reshape(3, SIDE, SIDE)
        return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))
