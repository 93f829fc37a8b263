"""Point clouds: ModelNet40 and ScanObjectNN in their own HDF5 files. A cloud gives depth maps, a picture per view.

Both come without a validation split. A seeded fifth of the training clouds of each class takes its place, and the train
split lacks them; the released code of PointCLIP searches its weights on the test set instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from clipkernels.evaluation.datasets.cloud_files import SIDE, CloudViews, read_labels
from clipkernels.evaluation.datasets.dataset import Dataset, Items, Request, absence_note
from clipkernels.evaluation.datasets.places import find_home
from clipkernels.evaluation.file_tree import describe_folder, relative_path
from clipkernels.evaluation.text_files import read_lines
from clipkernels.messages import list_items, list_names

DEPTH_MAP = "point cloud depth map of a {}."
HELD_OUT = 5
"""One of so many training clouds of a class is for validation."""


@dataclass(frozen=True)
class ModelNet40:
    """ModelNet40 as 2,048 points per object, in the folder that its archive unpacks to.

    names: names of that folder in a folder of sets.
    class_file: the file of the class names in it.
    Source: the folder modelnet40_ply_hdf5_2048 that PointCLIP's code reads: shape_names.txt, and train_files.txt and
    test_files.txt, which list HDF5 files.
    """

    template: str = DEPTH_MAP
    names: tuple[str, ...] = ("modelnet40_ply_hdf5_2048",)
    class_file: str = "shape_names.txt"

    def read(self, request: Request) -> Dataset:
        """The set; raises ValueError for another layout or faulty files, ImportError without h5py."""
        home = find_home(request.path, lambda folder: (folder / self.class_file).is_file(), self.names)
        if home is None:
            raise ValueError(
                f"expected {self.class_file} in {str(request.path)!r} or in a folder {list_items(self.names)} there, "
                f"got {describe_folder(request.path)}: unpack modelnet40_ply_hdf5_2048.zip"
            )
        file = home / self.class_file
        classes = tuple(line.replace("_", " ") for _, line in read_lines(file, "ModelNet40's class names"))
        if len(set(classes)) < max(len(classes), 2):
            raise ValueError(f"expected two or more distinct class names, a line each, got {file}")
        listed = {split: _listed(home, split) for split in ("train", "test")}
        repeated = [name for name, count in Counter(path.name for path in chain(*listed.values())).items() if count > 1]
        if repeated:
            raise ValueError(
                f"expected every file once in train_files.txt and test_files.txt in {str(home)!r}, got "
                f"{list_names(repeated)} again: splits must not overlap"
            )
        files = {split: [file for file in paths if file.is_file()] for split, paths in listed.items()}
        missing = [file.name for file in chain(*listed.values()) if not file.is_file()]
        notes = [f"there is no {list_names(missing)}"] if missing else []
        return _cloud_dataset(request, self.template, classes, home, files, f"HDF5 files of {home.name}", notes)


def _listed(home: Path, split: str) -> list[Path]:
    """The HDF5 files of a split that its list names, wherever their folder was; without a list, those with its name."""
    file = home / f"{split}_files.txt"
    if not file.is_file():
        return sorted(home.glob(f"ply_data_{split}*.h5"))
    lines = read_lines(file, "a list of ModelNet40's files")
    try:
        return [home / relative_path(line.lstrip("/")).rpartition("/")[2] for _, line in lines]
    except ValueError as error:
        raise ValueError(f"expected a list of ModelNet40's files, got {file} with {error}") from error


@dataclass(frozen=True)
class ScanObjectNN:
    """ScanObjectNN, objects cut from scans, in the folder h5_files/main_split or another split beside it.

    Without another choice the set is OBJ_BG, or OBJ_ONLY in main_split_nobg; a folder with the files of one of the
    perturbed variants alone is that variant. Its files do not say which clouds are of one object, so the validation
    split shares objects with the train split; the test split shares none.

    names: names of the folder in a folder of sets.
    classes: the class names, which no file holds.
    Source: README.md and training_data/shape_names_ext.txt of github.com/hkust-vgd/scanobjectnn, arXiv 1908.04616.
    """

    template: str = DEPTH_MAP
    names: tuple[str, ...] = ("main_split", "h5_files/main_split", "ScanObjectNN/h5_files/main_split")
    classes: tuple[str, ...] = (
        *("bag", "bin", "box", "cabinet", "chair", "desk", "display", "door"),
        *("shelf", "table", "bed", "pillow", "sink", "sofa", "toilet"),
    )

    def read(self, request: Request) -> Dataset:
        """The set; raises ValueError for another layout or faulty files, ImportError without h5py."""
        home = find_home(request.path, lambda folder: any(folder.glob("test_objectdataset*.h5")), self.names)
        if home is None:
            raise ValueError(
                f"expected test_objectdataset.h5 in {str(request.path)!r} or in a folder {list_items(self.names)} "
                f"there, got {describe_folder(request.path)}: unpack h5_files.zip"
            )
        variants = sorted(file.name.removeprefix("test_") for file in home.glob("test_objectdataset*.h5"))
        chosen = "objectdataset.h5" if "objectdataset.h5" in variants else variants[0]
        others = [name for name in variants if name != chosen]
        if others and chosen != "objectdataset.h5":
            raise ValueError(
                f"expected test_objectdataset.h5 or one variant alone in {str(home)!r}, got {list_names(variants)}: "
                "move the files of one into a folder"
            )
        notes = [f"left out the variants {list_names(others)}"] if others else []
        if chosen != "objectdataset.h5":
            notes.append("a perturbed variant holds several clouds of an object, which may fall into train and val")
        files = {"train": [home / f"training_{chosen}"], "test": [home / f"test_{chosen}"]}
        files = {split: [file for file in paths if file.is_file()] for split, paths in files.items()}
        return _cloud_dataset(request, self.template, self.classes, home, files, f"{home.name}, {chosen}", notes)


def _cloud_dataset(
    request: Request,
    template: str,
    classes: Sequence[str],
    home: Path,
    files: Mapping[str, Sequence[Path]],
    layout: str,
    notes: Sequence[str],
) -> Dataset:
    """The pictures of the clouds in files of the train and the test split."""
    clouds: dict[str, list[tuple[str, int, int]]] = {}
    for split, others in (("train", ("train", "val")), ("test", ("test",))):
        if set(others) & set(request.splits):
            clouds[split] = list(_clouds(files[split], len(classes)))
    held_out = set(_held_out([label for *_, label in clouds.get("train", ())], len(classes)))
    train = clouds.pop("train", [])
    clouds["train"] = [cloud for place, cloud in enumerate(train) if place not in held_out]
    clouds["val"] = [cloud for place, cloud in enumerate(train) if place in held_out]
    read = CloudViews(str(home), request.views)
    splits = {}
    for split in request.splits:
        entries = clouds.get(split, ())
        if entries:
            names = tuple(name for file, place, _ in entries for name in read.names(file, place))
            labels = tuple(label for *_, label in entries for _ in range(request.views))
            packed = tuple(str(home / file) for file in dict.fromkeys(file for file, *_ in entries))
            splits[split] = Items(names, labels, read, packed, request.views)
    if not splits:
        raise ValueError(
            f"expected point clouds of the splits {list_names(request.splits)}, got {describe_folder(home)}: complete "
            "the folder"
        )
    views = f"a cloud gives {request.views} depth maps of {SIDE}×{SIDE} pixels"
    held = f"the val split is a seeded part of the training clouds, {len(held_out)} of {len(train)}"
    existing = ["train", *(["val"] if held_out or not train else [])] if files["train"] else []
    sentences = (views, *notes, held if held_out else None, absence_note(existing))
    return Dataset(request.name, tuple(classes), (template,), splits, layout, tuple(note for note in sentences if note))


def _clouds(files: Sequence[Path], classes: int) -> Iterator[tuple[str, int, int]]:
    """File, place in it, and label of each cloud."""
    for file in files:
        yield from ((file.name, place, label) for place, label in enumerate(read_labels(file, classes)))


def _held_out(labels: Sequence[int], classes: int) -> Iterator[int]:
    """The places of the training clouds that are for validation."""
    of_class = torch.tensor(labels, dtype=torch.int64)
    for label in range(classes):
        # A generator for each class, because a class must not change with the size of another one.
        members = (of_class == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=torch.Generator().manual_seed(label))
        yield from members[order[: len(members) // HELD_OUT]].tolist()
