"""ImageNet and the sets with its classes: folders named by WordNet's ids, or by the numbers of the classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from clipkernels.evaluation.datasets.class_folders import PHOTO
from clipkernels.evaluation.datasets.dataset import (
    Dataset,
    FileReader,
    Items,
    Request,
    absence_note,
    class_notes,
)
from clipkernels.evaluation.datasets.places import find_home
from clipkernels.evaluation.file_tree import describe_folder, subfolders
from clipkernels.evaluation.text_files import read_lines
from clipkernels.images import Found, images_below, is_image_name, names_in
from clipkernels.messages import list_items, list_names, quantity

WORDNET_ID = re.compile(r"n\d{8}")
NUMBER = re.compile(r"0|[1-9]\d{0,2}")
NAMES_FILE = "classnames.txt"


@dataclass(frozen=True)
class ImageNetFolders:
    """A set of ImageNet's classes, or of some of them.

    names: usual names of the set's folder.
    images: folders of the test images in it, in the order in which they are tried.
    numbered: folders may be named 0 to 999, the places of the classes in classnames.txt.
    has_train: the folder train/ beside val/ holds images to train on.
    template: CoOp's prompt.
    Source: datasets/imagenet*.py of CoOp, arXiv 2109.01134. ImageNet's validation images are its test split there.
    """

    names: tuple[str, ...]
    images: tuple[str, ...]
    numbered: bool = False
    has_train: bool = False
    template: str = PHOTO

    def read(self, request: Request) -> Dataset:
        """The set; raises ValueError for another layout, unknown classes, or a split without images."""
        test = self._test_folder(request.path)
        folders = {"test": test}
        if self.has_train and test.name == "val" and test.with_name("train").is_dir():
            folders = {"train": test.with_name("train"), "test": test}
        wanted = [split for split in request.splits if split in folders]
        if not wanted:
            raise ValueError(
                f"expected a split {list_names(request.splits)} of {request.name}, got {list_names(list(folders))} in "
                f"{str(test.parent)!r}"
            )
        names, notes = class_names(test)
        content = {split: self._class_folders(folder, names) for split, folder in folders.items()}
        order = [wnid for wnid in names if any(wnid in by_wnid for by_wnid in content.values())]
        if not self.numbered:
            order.sort()
        classes = tuple(names[wnid] for wnid in order)
        others: Counter[str] = Counter()
        splits = {}
        for split in wanted:
            present = {label: content[split][wnid] for label, wnid in enumerate(order) if wnid in content[split]}
            paths, labels = _scan(present, others)
            if not paths:
                raise ValueError(f"expected images of the {split} split below {str(folders[split])!r}, got none")
            splits[split] = Items(paths, labels, FileReader(request.reader))
        notes += [absence_note(folders), *self._subset_notes(classes, names), Found([], others).note]
        notes += class_notes(classes)
        layout = f"CoOp {'numbered folders' if self._is_numbered(test) else 'WordNet folders'} {test.name}/"
        return Dataset(request.name, classes, (self.template,), splits, layout, tuple(note for note in notes if note))

    def _test_folder(self, path: Path) -> Path:
        if self.has_train and path.name == "train":
            raise ValueError(f"expected the folder with train/ and val/, got {str(path)!r}: its images are to train on")
        home = find_home(path, lambda folder: self._images_in(folder) is not None, self.names)
        folder = self._images_in(home or path)
        if folder is not None:
            return folder
        flat = next((place for place in self._places(path) if _has_images(place)), None)
        if flat is not None:
            raise ValueError(
                f"expected a folder for each class in {str(flat)!r}, got images: move each image into the folder of "
                "its WordNet id, such as n01440764"
            )
        raise ValueError(
            f"expected folders n01440764, … in {list_items(f'{images}/' for images in self.images)} of "
            f"{str(path)!r}, or in a folder {list_items(self.names)} there, got {describe_folder(path)}"
        )

    def _images_in(self, home: Path) -> Path | None:
        """The folder of the test images in a set's folder, which may be that folder itself."""
        return next((place for place in self._places(home) if self._holds_classes(place)), None)

    def _places(self, home: Path) -> list[Path]:
        return [*(home / images for images in self.images), home]

    def _holds_classes(self, folder: Path) -> bool:
        return folder.is_dir() and any(map(self._is_class, subfolders(folder)))

    def _is_class(self, name: str) -> bool:
        return bool(WORDNET_ID.fullmatch(name) or (self.numbered and NUMBER.fullmatch(name)))

    def _is_numbered(self, folder: Path) -> bool:
        return not any(map(WORDNET_ID.fullmatch, subfolders(folder)))

    def _class_folders(self, folder: Path, names: dict[str, str]) -> dict[str, Path]:
        """The folders of classes by WordNet's ids; raises ValueError for one without a class name."""
        ids = list(names)
        folders = {}
        for name in filter(self._is_class, subfolders(folder)):
            known = name in names if WORDNET_ID.fullmatch(name) else int(name) < len(ids)
            if not known:
                raise ValueError(
                    f"expected a class name for each folder, got none for {str(folder / name)!r} among "
                    f"{len(ids)}: complete {NAMES_FILE}"
                )
            folders[name if name in names else ids[int(name)]] = folder / name
        return folders

    def _subset_notes(self, classes: tuple[str, ...], names: dict[str, str]) -> Iterator[str]:
        if len(classes) < len(names):
            yield f"{len(classes)} of the {len(names)} classes have folders: images are classified among these alone"


def _scan(folders: Mapping[int, Path], others: Counter[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The paths and labels of the images below folders, by label, sorted within each; `others` counts other files.

    A folder is listed once and no file is opened, so 1.28 million images take seconds.
    """
    names: list[str] = []
    labels: list[int] = []
    for label, folder in sorted(folders.items()):
        content = images_below(str(folder))
        names += content.paths
        labels += [label] * len(content.paths)
        others.update(content.others)
    return tuple(names), tuple(labels)


def class_names(folder: Path) -> tuple[dict[str, str], list[str | None]]:
    """ImageNet's class names by WordNet's ids, from CoOp's classnames.txt near a folder, and notes about them.

    Without that file they are CLIP's names, as open_clip has them, and the ids that timm has.

    Raises:
        ValueError: a file with other lines than "n01440764 tench".
    """
    homes = [folder, *folder.parents[:2]]
    places = [*homes, *(home / "imagenet" for home in homes)]
    file = next((place / NAMES_FILE for place in places if (place / NAMES_FILE).is_file()), None)
    clip = clip_names()
    if file is None:
        if not clip:
            raise ValueError(f"expected {NAMES_FILE} of CoOp in {str(folder.parent)!r}, got none: put it there")
        return dict(clip), [f"there is no {NAMES_FILE}: the class names are CLIP's, as open_clip has them"]
    names: dict[str, str] = {}
    for number, line in read_lines(file, "the class names of ImageNet"):
        wnid, _, name = line.partition(" ")
        if not WORDNET_ID.fullmatch(wnid) or not name.strip() or wnid in names:
            raise ValueError(
                f"expected lines such as 'n01440764 tench', one for each class, got {line!r:.80} in line {number} of "
                f"{file}"
            )
        names[wnid] = name.strip()
    other = [wnid for wnid, name in names.items() if clip.get(wnid, name) != name]
    if not other:
        return names, []
    first = other[0]
    return names, [
        f"{quantity(len(other), 'name')} in {NAMES_FILE} are not CLIP's in open_clip, the first {names[first]!r} for "
        f"{clip[first]!r}"
    ]


@cache
def clip_names() -> dict[str, str]:
    """CLIP's names of ImageNet's classes by WordNet's ids, from open_clip and timm; empty if those lack them."""
    try:
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

        ids = files("timm.data._info").joinpath("imagenet_synsets.txt").read_text("utf-8").split()
    except (ImportError, OSError):
        return {}
    return dict(zip(ids, IMAGENET_CLASSNAMES, strict=True)) if len(ids) == len(IMAGENET_CLASSNAMES) else {}


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and any(map(is_image_name, names_in(str(folder))))
