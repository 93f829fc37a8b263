"""A folder of images per class: what it is called, which images are in it, and copies that are known as such."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from clipkernels.files import atomic_write
from clipkernels.support.prompts import list_names

FORMAT, MANIFEST = "clipkernels.support.1", "manifest.json"
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MAX_NAME_CHARACTERS = 60  # characters of a folder's name: at most four bytes each, and 9 for the hash, of 255
UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')
RESERVED = re.compile(  # by Windows, and by what lies beside the folders
    r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|manifest\.json|features\.safetensors.*", re.IGNORECASE
)
COPY = re.compile(r"\d{4,}-([0-9a-f]{8})\.\w+")


def folder_names(classes: Sequence[str]) -> list[str]:
    """Names for the folders of classes, in their order: each its class's own where every file system can hold that
    beside the others, else one like it that ends in a hash of the class."""
    safe = [UNSAFE.sub("_", unicodedata.normalize("NFC", name))[:MAX_NAME_CHARACTERS].strip(" .") for name in classes]
    often = Counter(name.casefold() for given, name in zip(classes, safe, strict=True) if name == given)
    return [
        name
        if name == given and often[name.casefold()] == 1 and not RESERVED.fullmatch(name) and not name.startswith("-")
        else f"{name or 'class'}-{sha256(given.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}".lstrip("-")
        for given, name in zip(classes, safe, strict=True)
    ]


def find_images(folder: str | os.PathLike[str]) -> list[str]:
    """The files below a folder that are named like images, sorted; none that are hidden or below a hidden folder, and
    none of a support set that lies within.

    Raises:
        OSError: a folder that cannot be read.
    """

    def stop(error: OSError) -> None:
        raise error

    found = []
    for root, folders, files in os.walk(folder, onerror=stop):
        folders[:] = [each for each in folders if not each.startswith(".") and not holds_set(Path(root, each))]
        found += [os.path.join(root, file) for file in files if _is_image(file)]
    return sorted(found)


def holds_set(folder: Path) -> bool:
    """Whether a folder has the manifest of a support set."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            start = file.read(100).decode("utf-8", "replace")
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        return False
    return f'"format": "{FORMAT.rsplit(".", 1)[0]}.' in start


def images_in(folder: Path) -> list[str]:
    """The names of a folder's files that are named like images, sorted; none that are hidden, none without a folder."""
    if not folder.is_dir():
        return []
    names = (file.name for file in folder.iterdir() if file.is_file())
    return sorted(name for name in names if _is_image(name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def refuse_foreign_images(folder: Path, others: Sequence[str]) -> None:
    """Raises ValueError where a class's folder holds images of somebody else."""
    if others:
        raise ValueError(
            f"expected no images but the set's own in {folder}, got {list_names(list(others))}: delete them, or choose "
            "another folder"
        )


def is_copy(path: Path) -> bool:
    """Whether a file is called as a support set calls the copy of an image with its content."""
    match = COPY.fullmatch(path.name)
    return match is not None and hash_of(path).startswith(match[1])


def stale_copies(root: Path, entries: Sequence[Mapping[str, Any]], gone: Sequence[str]) -> list[Path]:
    """The copies of an earlier set that are not in this one.

    Raises:
        ValueError: other images in a class's folder.
    """
    found = []
    for each in entries:
        folder = root / each["folder"]
        wanted = {image.get("file") for image in each["images"]}
        names = [name for name in images_in(folder) if name not in wanted]
        refuse_foreign_images(folder, [name for name in names if not is_copy(folder / name)])
        found += [folder / name for name in names]
    kept = [root / each["folder"] for each in entries if (root / each["folder"]).exists()]
    same = {(status.st_dev, status.st_ino) for status in map(os.stat, kept)}  # where Cat and cat are one folder
    for folder in (root / name for name in gone):
        if folder.is_dir() and (folder.stat().st_dev, folder.stat().st_ino) not in same:
            found += [folder / name for name in images_in(folder) if is_copy(folder / name)]
    return found


def copy_image(source: Path, digest: str, target: Path) -> None:
    """Copies a file, whole or not at all.

    Raises:
        ValueError: its content is not what it was.
    """
    data = source.read_bytes()
    came = sha256(data).hexdigest()
    if came != digest:
        raise ValueError(f"expected {source} as it was encoded, SHA-256 {digest}, got {came}: encode it again")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary:
        Path(temporary).write_bytes(data)


def hash_of(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
