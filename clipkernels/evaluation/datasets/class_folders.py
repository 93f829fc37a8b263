"""The reader of a plain folder: a folder of images per class, with or without train/, val/ and test/ around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from unicodedata import normalize

from clipkernels.evaluation.datasets.dataset import (
    SPLITS,
    Dataset,
    FileReader,
    Items,
    Request,
    absence_note,
)
from clipkernels.evaluation.file_tree import describe_folder, subfolders
from clipkernels.images import Found, images_below, is_image_name, names_in
from clipkernels.messages import list_names, quantity

PHOTO = "a photo of a {}."
MAX_WRAPPERS = 8
"""Folders around a set that hold nothing else, at most."""
ALIASES = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validation": "val"},
    **{"test": "test", "testing": "test"},
}
"""Names of folders of a split, in lower case."""


def read_class_folders(request: Request, template: str = PHOTO) -> Dataset:
    """A folder with a folder of images per class, or with such folders train/, val/ and test/.

    Without train/, val/ and test/ all images are the test split. Without test/ alone, val/ is the test split. A class
    has the name of its folder with blanks for underscores; classes are in the order of their folders' names. A folder
    without images is no class.

    Raises:
        ValueError: images outside of folders, fewer than two classes, two folders of one class name, a wanted split
            without images.
        OSError: a folder cannot be read.
    """
    root = _inner(request.path)
    splits, strays = _split_folders(root)
    layout = "folder of folders"
    notes: list[str | None] = []
    if set(splits) == {"train"}:
        raise ValueError(
            f"expected test/ or val/ beside {str(splits['train'])!r}: name that folder itself to evaluate on its images"
        )
    if not splits:
        splits, strays = {"test": root}, []
    elif "test" not in splits:
        splits["test"] = splits.pop("val")
        notes.append(f"there is no test folder: the images of {splits['test'].name}/ are the test split")
    if len(splits) > 1 or splits["test"] != root:
        layout += f" in {', '.join(f'{folder.name}/' for folder in splits.values())}"
    wanted = [split for split in request.splits if split in splits]
    if not wanted:
        raise ValueError(f"expected a split {list_names(request.splits)}, got {describe_folder(root)}")
    others: Counter[str] = Counter()
    items, classes, empty = _read_splits(request, splits, wanted, others)
    if strays:
        notes.append(f"left out {list_names(strays)} in {root.name}/, which are no splits")
    loose = sum(is_image_name(name) for folder in splits.values() for name in names_in(str(folder)))
    if loose:
        notes.append(f"left out {quantity(loose, 'image')} outside of the classes' folders")
    if empty:
        notes.append(f"left out {quantity(len(empty), 'folder')} without images, the first {empty[0]!r}")
    notes += [absence_note(splits), Found([], others).note]
    return Dataset(request.name, classes, (template,), items, layout, tuple(note for note in notes if note))


def _read_splits(
    request: Request, folders: Mapping[str, Path], wanted: Sequence[str], others: Counter[str]
) -> tuple[dict[str, Items], tuple[str, ...], list[str]]:
    """The images of the wanted splits, the classes of all, and the names of folders without images in any."""
    content = {split: _class_folders(folder) for split, folder in folders.items()}
    found: dict[str, dict[str, list[str]]] = {split: {} for split in wanted}
    for split in wanted:
        for name, folder in content[split].items():
            below = images_below(str(folder))
            others.update(below.others)
            if below.paths:
                found[split][name] = below.paths
    names = {name for by_name in found.values() for name in by_name}
    rest = {(split, name) for split, by_name in content.items() for name in by_name if split not in wanted}
    names |= {name for split, name in rest if name not in names and images_below(str(content[split][name])).paths}
    order = sorted(names)
    empty = sorted({name for by_name in content.values() for name in by_name} - names)
    classes = _class_names(order, request.path)
    items = {}
    for split, by_name in found.items():
        if not by_name:
            raise ValueError(
                f"expected a folder of images per class, got {describe_folder(folders[split])}: put the images of "
                "each class into a folder of its name"
            )
        pairs = [(path, label) for label, name in enumerate(order) for path in by_name.get(name, ())]
        paths, labels = zip(*pairs, strict=True)
        items[split] = Items(paths, labels, FileReader(request.reader))
    if len(classes) < 2:
        raise ValueError(
            f"expected two or more classes in {str(request.path)!r}, got {list_names(classes)}: make a folder of "
            "images for each class"
        )
    return items, classes, empty


def _class_folders(folder: Path) -> dict[str, Path]:
    """The folders in a folder, by their names in Unicode's composed form; raises ValueError for two of one name."""
    folders: dict[str, Path] = {}
    for name in subfolders(folder):
        if folders.setdefault(normalize("NFC", name), folder / name).name != name:
            raise ValueError(
                f"expected distinct folders in {str(folder)!r}, got {name!r} in two Unicode forms: rename one"
            )
    return folders


def _class_names(folders: Iterable[str], path: Path) -> tuple[str, ...]:
    """The class names of folders; raises ValueError for two folders of one name."""
    names: dict[str, str] = {}
    for folder in folders:
        name = " ".join(folder.replace("_", " ").split())
        if not name or name in names:
            raise ValueError(
                f"expected folders with distinct class names in {str(path)!r}, got {folder!r} "
                f"{f'beside {names[name]!r}' if name else 'without a name'}: rename one"
            )
        names[name] = folder
    return tuple(names)


def _inner(path: Path) -> Path:
    """The folder itself, or the one folder in it that holds nothing but folders, as archives unpack."""
    for _ in range(MAX_WRAPPERS):  # a link may lead round
        below = subfolders(path)
        if len(below) != 1 or _holds_images(path) or _holds_images(path / below[0]) or not subfolders(path / below[0]):
            return path
        if below[0].lower() in ALIASES:  # a folder train/ alone is refused by name
            return path
        path = path / below[0]
    return path


def _split_folders(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The folders of splits in a folder, in their order, and the names of the other folders in it.

    A class may be called "train": the folder of a split holds folders and no images.
    """
    splits: dict[str, Path] = {}
    others = []
    for name in subfolders(root):
        split = ALIASES.get(name.lower())
        if split is None or _holds_images(root / name) or not subfolders(root / name):
            others.append(name)
        elif split in splits:
            raise ValueError(
                f"expected one folder of the {split} split, got {splits[split].name!r} and {name!r} in {str(root)!r}"
            )
        else:
            splits[split] = root / name
    return {split: splits[split] for split in SPLITS if split in splits}, others


def _holds_images(folder: Path) -> bool:
    return any(map(is_image_name, names_in(str(folder))))
