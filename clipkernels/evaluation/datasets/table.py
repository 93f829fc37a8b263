"""The published sets by name, and `read_dataset`.

Folders, split files and prompts are those in CoOp's readers and DATASETS.md (arXiv 2109.01134), which the released code
of TDA, Tip-Adapter, CALIP, SuS-X and Patch Ranking follows; SuS-X and TCA rename some folders, whose names are accepted
too. The split files themselves lie on Google Drive and could not be checked: class names are those that they hold.

CoOp's single prompts are also Patch Ranking's. In the released code, Tip-Adapter and CALIP average seven prompts on
ImageNet, SuS-X seven on every set, TDA seven or eighty on some sets, TCA CLIP's ensembles of one to eighty.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipkernels.arguments import check_path, describe
from clipkernels.data.point_clouds import TURNS
from clipkernels.evaluation.datasets.cifar import CIFAR
from clipkernels.evaluation.datasets.class_folders import PHOTO, read_class_folders
from clipkernels.evaluation.datasets.clouds import ModelNet40, ScanObjectNN
from clipkernels.evaluation.datasets.dataset import SPLITS, Dataset, Request, Source
from clipkernels.evaluation.datasets.imagenet import ImageNetFolders
from clipkernels.evaluation.datasets.listed import Aircraft, SplitFile
from clipkernels.images import Reader
from clipkernels.messages import list_names, one_line

DATASETS: dict[str, Source] = {
    "caltech101": SplitFile(("caltech-101", "caltech101"), "101_ObjectCategories", "split_zhou_Caltech101.json", PHOTO),
    "dtd": SplitFile(("dtd",), "images", "split_zhou_DescribableTextures.json", "{} texture."),
    "eurosat": SplitFile(("eurosat",), "2750", "split_zhou_EuroSAT.json", "a centered satellite photo of {}."),
    "fgvc": Aircraft("a photo of a {}, a type of aircraft."),
    "food101": SplitFile(
        ("food-101", "food101"), "images", "split_zhou_Food101.json", "a photo of {}, a type of food."
    ),
    "flowers": SplitFile(
        ("oxford_flowers", "flowers102"), "jpg", "split_zhou_OxfordFlowers.json", "a photo of a {}, a type of flower."
    ),
    "pets": SplitFile(
        ("oxford_pets", "oxfordpets"), "images", "split_zhou_OxfordPets.json", "a photo of a {}, a type of pet."
    ),
    "cars": SplitFile(("stanford_cars", "stanfordcars"), "", "split_zhou_StanfordCars.json", PHOTO),
    "sun397": SplitFile(("sun397",), "SUN397", "split_zhou_SUN397.json", PHOTO),
    "ucf101": SplitFile(("ucf101",), "UCF-101-midframes", "split_zhou_UCF101.json", "a photo of a person doing {}."),
    "imagenet": ImageNetFolders(("imagenet",), ("images/val", "val"), has_train=True),
    "imagenet_a": ImageNetFolders(("imagenet-adversarial", "imagenet-a"), ("imagenet-a",)),
    "imagenet_r": ImageNetFolders(("imagenet-rendition", "imagenet-r"), ("imagenet-r",)),
    "imagenet_v2": ImageNetFolders(("imagenetv2",), ("imagenetv2-matched-frequency-format-val",), numbered=True),
    "imagenet_sketch": ImageNetFolders(("imagenet-sketch", "imagenet-s"), ("images", "sketch")),
    "cifar10": CIFAR(
        *("cifar-10-batches-bin", "batches.meta.txt", 10, 1),
        files={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
        pickles=("cifar-10-batches-py", "batches.meta"),
    ),
    "cifar100": CIFAR(
        *("cifar-100-binary", "fine_label_names.txt", 100, 2),
        files={"train": ("train.bin",), "test": ("test.bin",)},
        pickles=("cifar-100-python", "meta"),
    ),
    "modelnet40": ModelNet40(),
    "scanobjectnn": ScanObjectNN(),
}
"""The published sets, by the names that the heads' presets have."""
OTHER_NAMES = {
    **{"describabletextures": "dtd", "fgvcaircraft": "fgvc", "aircraft": "fgvc", "flowers102": "flowers"},
    **{"oxfordflowers": "flowers", "oxfordpets": "pets", "stanfordcars": "cars", "imagenets": "imagenet_sketch"},
    **{name.replace("_", ""): name for name in DATASETS},
}
"""Names of the sets in papers and code, without their dashes, underscores and capitals."""


def read_dataset(
    name: str,
    path: str | os.PathLike[str],
    *,
    splits: Sequence[str] = SPLITS,
    reader: Reader | None = None,
    views: int = 6,
) -> Dataset:
    """The images, labels, class names and prompt of a set on disk.

    Nothing is downloaded, run or unpickled, and no image is opened. Files that a split names and that are missing are
    left out and counted in the notes. The prompts are CoOp's single ones: TCA's and TDA's released code and SuS-X
    average several prompts per class instead (`clipkernels.evaluation.published` says which, figure by figure).

    Args:
        name: a key of `DATASETS`; any other name reads a plain folder of class folders, with train/, val/ and test/
            around them if they are there.
        path: the set's folder, as CoOp's DATASETS.md lays it out; the folder around it, or the folder of images in it,
            where that is unambiguous.
        splits: the splits to read, of "train", "val" and "test"; the others are not listed on disk.
        reader: opens the image files; None is `Reader()`.
        views: the depth maps of a point cloud, 6 or 10; each is an image of the set.
    Raises:
        TypeError: arguments of another type.
        ImportError: point clouds without h5py.
        ValueError: another layout, a faulty file, a path that leaves the folder, a split without any image. The message
            says what was expected where.
        OSError: a file or folder cannot be read.
    """
    check_path(path=path)
    wanted = _check_splits(splits)
    if reader is not None and not isinstance(reader, Reader):
        raise TypeError(f"reader must be a clipkernels.images.Reader, got {describe(reader)}")
    if isinstance(views, bool) or not isinstance(views, int) or views not in TURNS:
        raise ValueError(f"views must be 6 or 10, got {describe(views)}")
    if not isinstance(name, str) or not name.strip() or one_line(name) != name:
        raise ValueError(f"name must be the name of a set in one line, got {describe(name)}")
    folder = Path(os.path.abspath(os.path.expanduser(path)))
    if not folder.is_dir():
        raise ValueError(
            f"expected a folder for {name}, got {str(folder)!r}, which "
            f"{'is a file: name its folder, and unpack archives' if folder.exists() else 'does not exist'}"
        )
    request = Request(name, folder, wanted, reader or Reader(), views)
    if name in DATASETS:
        return DATASETS[name].read(request)
    known = OTHER_NAMES.get("".join(filter(str.isalnum, name.casefold())))
    if known is None:
        return read_class_folders(request)
    try:
        dataset = read_class_folders(request)
    except ValueError as error:
        raise ValueError(f"{error} (the published set is called {known!r} here)") from error
    note = f"{name!r} is read as a plain folder: the published set is called {known!r} here"
    return dataset._replace(notes=(*dataset.notes, note))


def _check_splits(splits: Any) -> tuple[str, ...]:
    """The splits in their order; raises ValueError unless they are some of train, val and test."""
    chosen = tuple(splits) if isinstance(splits, Sequence) and not isinstance(splits, str) else ()
    if not chosen or any(split not in SPLITS for split in chosen):
        raise ValueError(f"splits must be some of {list_names(SPLITS)} in a list, got {describe(splits)}")
    return tuple(split for split in SPLITS if split in chosen)
