"""Classification data: the images of each split with their labels, and what is asked of a reader."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from clipkernels.images import Reader
from clipkernels.messages import quantity

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class FileReader:
    """Reads image files by path; equal readers make equal ones, which bound methods are not."""

    reader: Reader

    def __call__(self, name: str) -> Image.Image:
        """The image of a file, as `Reader.read`."""
        return self.reader.read(name)


class Items(NamedTuple):
    """The images of one split.

    names: paths of files; of a packed file, its name and the number of the image, "test_batch.bin#17".
    labels: an index into the classes for each.
    read: gives the image of a name, in mode RGB; it can be pickled. It raises ValueError, OSError and whatever Pillow
        raises for a broken file.
    packed: paths of the packed files that hold the images; () where each name is the path of a file.
    views: the number of successive images that are the views of one object.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...]
    read: Callable[[str], Image.Image]
    packed: tuple[str, ...] = ()
    views: int = 1


class Dataset(NamedTuple):
    """Images of named classes.

    name: the name that it was asked for by.
    classes: K names as prompts spell them. Two may be equal, as ImageNet's two missiles; a note says so.
    templates: prompts with `{}` for the class name.
    splits: "train", "val" and "test"; those that are missing, or were not asked for, are absent.
    layout: the layout that was read, "CoOp split_zhou_OxfordPets.json" or "folder of folders".
    notes: sentences for a report: missing files, missing splits, deviations from a published protocol.
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    splits: Mapping[str, Items]
    layout: str
    notes: tuple[str, ...]

    @property
    def views(self) -> int:
        """The number of images of an object: 1, or that of the views of a point cloud."""
        return next((items.views for items in self.splits.values()), 1)


class Request(NamedTuple):
    """A set to read: its name, the folder, the wanted splits, the reader of image files, and the views of a cloud."""

    name: str
    path: Path
    splits: tuple[str, ...]
    reader: Reader
    views: int = 6


class Source(Protocol):
    """A layout of one published set.

    template: CoOp's prompt of the set.
    """

    @property
    def template(self) -> str: ...

    def read(self, request: Request) -> Dataset:
        """The set in the request's folder."""


def absence_note(existing: Collection[str]) -> str | None:
    """The sentence that names the splits to train and to tune on that a set lacks; None if it has both."""
    absent = [split for split in ("train", "val") if split not in existing]
    return f"there is no {' and no '.join(absent)} split" if absent else None


def class_notes(classes: Sequence[str]) -> Iterator[str]:
    """The sentences about classes of one name, whose text embeddings are equal."""
    labels: dict[str, list[int]] = {}
    for label, name in enumerate(classes):
        labels.setdefault(name, []).append(label)
    for name, same in labels.items():
        if len(same) > 1:
            yield f"the classes {', '.join(map(str, same))} have the one name {name!r}: no prompt tells them apart"


def overlap_notes(splits: Mapping[str, Items]) -> Iterator[str]:
    """The sentences about files that are in a split twice or in two splits."""
    distinct = {split: set(items.names) for split, items in splits.items()}
    for split, items in splits.items():
        if len(distinct[split]) < len(items.names):
            yield f"the {split} split names {quantity(len(items.names) - len(distinct[split]), 'file')} twice"
    for one, other in combinations(splits, 2):
        common = distinct[one] & distinct[other]
        if common:
            yield f"{quantity(len(common), 'file')} of the {one} split are also in the {other} split"
