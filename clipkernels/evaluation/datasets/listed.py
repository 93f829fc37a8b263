"""Splits that a file lists: CoOp's split_zhou_*.json and the text files of FGVC Aircraft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from clipkernels.evaluation.datasets.dataset import (
    SPLITS,
    Dataset,
    FileReader,
    Items,
    Request,
    absence_note,
    class_notes,
    overlap_notes,
)
from clipkernels.evaluation.datasets.places import find_home
from clipkernels.evaluation.file_tree import FileTree, describe_folder, missing_note, relative_path
from clipkernels.evaluation.text_files import read_json, read_lines
from clipkernels.messages import list_items, list_names, quantity

GUIDE = "as DATASETS.md of github.com/KaiyangZhou/CoOp says"
PLAIN = "or give the set a name of your own to read a folder of class folders"

Entry = tuple[str, int, str]
"""Relative path, label and class name of an image."""


class SplitContent(msgspec.Struct):
    """The content of a split_zhou_*.json."""

    train: list[Entry] = []
    val: list[Entry] = []
    test: list[Entry] = []


class Listing(NamedTuple):
    """A list of images: relative paths and labels by split, and the classes."""

    splits: Mapping[str, Sequence[tuple[str, int]]]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class SplitFile:
    """A set with one of CoOp's split files beside its folder of images.

    names: usual names of the set's folder.
    images: the folder of images in it, "" if paths are relative to the set's folder.
    file: the split file.
    template: CoOp's prompt.
    Source: the readers in datasets/ of CoOp, arXiv 2109.01134, and its DATASETS.md.
    """

    names: tuple[str, ...]
    images: str
    file: str
    template: str

    def read(self, request: Request) -> Dataset:
        """The set; raises ValueError for another layout, a faulty split file, or a split without any file."""
        home = find_home(request.path, lambda folder: (folder / self.file).is_file(), self.names, (self.images,))
        if home is None:
            raise ValueError(
                f"expected {self.file} in {str(request.path)!r} or in a folder {list_items(self.names)} there, got "
                f"{describe_folder(request.path)}: put the file beside {self.images or 'the folders of images'} "
                f"{GUIDE}, {PLAIN}"
            )
        content = read_json(home / self.file, "CoOp's split file", SplitContent)
        try:
            listing = _check(content)
        except ValueError as error:
            raise ValueError(f"expected CoOp's split file, got {home / self.file} with {error}: get it anew") from error
        folders = dict.fromkeys([home / self.images, home])
        return listed_dataset(request, listing, list(folders), self.template, f"CoOp {self.file}")


@dataclass(frozen=True)
class Aircraft:
    """FGVC Aircraft, whose text files list variants and images.

    Source: datasets/fgvc_aircraft.py of CoOp, arXiv 2109.01134.
    """

    template: str
    names: tuple[str, ...] = ("fgvc_aircraft", "fgvcaircraft", "fgvc-aircraft-2013b/data", "fgvc/data", "data")
    variants: str = "variants.txt"

    def read(self, request: Request) -> Dataset:
        """The set; raises ValueError for another layout, faulty lines, or a split without any file."""
        home = find_home(request.path, lambda folder: (folder / self.variants).is_file(), self.names, ("images",))
        if home is None:
            raise ValueError(
                f"expected {self.variants} in {str(request.path)!r} or in a folder {list_items(self.names)} there, got "
                f"{describe_folder(request.path)}: keep the files of fgvc-aircraft-2013b/data {GUIDE}, {PLAIN}"
            )
        classes = tuple(line for _, line in read_lines(home / self.variants, "the variants of FGVC Aircraft"))
        if len(set(classes)) < max(len(classes), 2):
            raise ValueError(f"expected two or more distinct variants, a line each, got {home / self.variants}")
        labels = {name: label for label, name in enumerate(classes)}
        files = {split: home / f"images_variant_{split}.txt" for split in SPLITS}
        splits = {split: _read_variants(file, labels) for split, file in files.items() if file.is_file()}
        return listed_dataset(request, Listing(splits, classes), [home / "images"], self.template, "FGVC text files")


def _read_variants(file: Path, labels: Mapping[str, int]) -> list[tuple[str, int]]:
    """The images and labels of a file with lines "0034309 707-320"."""
    entries = []
    for number, line in read_lines(file, "a list of images of FGVC Aircraft"):
        image, _, variant = line.partition(" ")
        label = labels.get(variant.strip())
        if label is None:
            raise ValueError(f"expected an image and one of the variants, got {line!r:.100} in line {number} of {file}")
        try:
            entries.append((relative_path(f"{image}.jpg"), label))
        except ValueError as error:
            raise ValueError(f"expected the name of an image, got line {number} of {file} with {error}") from error
    return entries


def _check(content: SplitContent) -> Listing:
    """The listing of a split file; raises ValueError for the first fault."""
    splits = {split: getattr(content, split) for split in SPLITS if getattr(content, split)}
    names: dict[int, str] = {}
    for entries in splits.values():
        for _, label, name in entries:
            if names.setdefault(label, name) != name:
                raise ValueError(f"the two names {names[label]!r:.80} and {name!r:.80} of label {label}")
            if not name.strip():
                raise ValueError(f"an empty class name of label {label}")
    if len(names) < 2:
        raise ValueError(f"{quantity(len(names), 'class')} in the lists train, val and test, where two are needed")
    if min(names) or max(names) != len(names) - 1:
        raise ValueError(f"{len(names)} labels from {min(names)} to {max(names)}, which must be 0 to {len(names) - 1}")
    classes = tuple(names[label].replace("_", " ") for label in range(len(names)))
    paths = {split: [(relative_path(path), label) for path, label, _ in entries] for split, entries in splits.items()}
    return Listing(paths, classes)


def listed_dataset(request: Request, listing: Listing, folders: Sequence[Path], template: str, layout: str) -> Dataset:
    """The images of a listing that exist.

    Args:
        request: the name, the wanted splits and the reader.
        listing: paths, labels and classes.
        folders: the folders that the paths may be relative to; the first with a file counts.
        template: the prompt.
        layout: the name of the layout.
    Raises:
        ValueError: a wanted split of which no file exists, or none of the wanted splits in the listing.
    """
    wanted = [split for split in request.splits if split in listing.splits]
    if not wanted:
        raise ValueError(
            f"expected images of the splits {list_names(request.splits)}, got lists of "
            f"{list_names(list(listing.splits)) or 'none'} for {request.name}"
        )
    splits: dict[str, Items] = {}
    notes = [absence_note(listing.splits)]
    tree = _tree(folders, [path for split in wanted for path, _ in listing.splits[split]])
    for split in wanted:
        entries = listing.splits[split]
        paths = [tree.find(path) for path, _ in entries]
        pairs = [(path, label) for path, (_, label) in zip(paths, entries, strict=True) if path is not None]
        missing = [name for path, (name, _) in zip(paths, entries, strict=True) if path is None]
        if not pairs:
            raise ValueError(
                f"expected the {quantity(len(entries), 'file')} of the {split} split of {request.name} in "
                f"{str(folders[0])!r}, such as {entries[0][0]!r}, got none of them: complete the folder"
            )
        notes.append(missing_note(split, missing, len(entries)))
        names, labels = zip(*pairs, strict=True)
        splits[split] = Items(names, labels, FileReader(request.reader))
    notes += [*class_notes(listing.classes), *overlap_notes(splits)]
    return Dataset(request.name, listing.classes, (template,), splits, layout, tuple(note for note in notes if note))


def _tree(folders: Sequence[Path], paths: Sequence[str]) -> FileTree:
    """The tree of the first folder in which one of the files exists; that of the first folder if there is none."""
    trees = [FileTree(folder) for folder in folders]
    return next((tree for tree in trees if any(tree.find(path) for path in paths)), trees[0])
