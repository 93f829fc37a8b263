"""Folders of images per class: their names, the images in them, and the copies that a support set owns."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from clipkernels.files import atomic_write, hash_of, open_regular
from clipkernels.images import is_image_name, names_in, read_bytes
from clipkernels.messages import list_names

FORMAT_NAME, MANIFEST = "clipkernels.support.2", "manifest.json"
MAX_NAME_CHARACTERS = 60  # of at most four bytes each; with 9 bytes for the hash that fits in the usual 255
UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')
RESERVED = re.compile(  # by Windows, and by a support set's own files
    r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|manifest\.json|features\.safetensors.*", re.IGNORECASE
)
COPY = re.compile(r"\d{4,}-([0-9a-f]{8})\.\w+")


def folder_names(classes: Sequence[str]) -> list[str]:
    """Distinct folder names for classes, in their order.

    A folder has its class's name if every file system can hold that name beside the others; otherwise a similar name
    that ends in a hash of the class.
    """
    safe = [UNSAFE.sub("_", unicodedata.normalize("NFC", name))[:MAX_NAME_CHARACTERS].strip(" .") for name in classes]
    counts = Counter(name.casefold() for label, name in zip(classes, safe, strict=True) if name == label)
    return [
        name
        if name == label and counts[name.casefold()] == 1 and not RESERVED.fullmatch(name) and not name.startswith("-")
        else f"{name or 'class'}-{sha256(label.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}".lstrip("-")
        for label, name in zip(classes, safe, strict=True)
    ]


def holds_set(folder: str | os.PathLike[str]) -> bool:
    """Return true if a folder holds the manifest of a support set."""
    try:
        with open_regular(Path(folder, MANIFEST)) as file:
            start = file.read(100).decode("utf-8", "replace")
    except (OSError, ValueError):
        return False
    return f'"format": "{FORMAT_NAME.rsplit(".", 1)[0]}.' in start


def images_in(folder: Path) -> list[str]:
    """The names in a folder that have an image suffix, sorted, without hidden ones; empty if there is no folder."""
    return sorted(filter(is_image_name, names_in(str(folder)))) if folder.is_dir() else []


def refuse_foreign_images(folder: Path, others: Sequence[str]) -> None:
    """Raise ValueError if a class's folder holds images that are not the support set's."""
    if others:
        raise ValueError(
            f"expected only the support set's images in {folder}, got {list_names(list(others))}: delete them, or "
            "choose another folder"
        )


def is_copy(path: Path) -> bool:
    """Return true if a file is a support set's copy: its name has a copy's form and holds the hash of its content."""
    match = COPY.fullmatch(path.name)
    return match is not None and path.is_file() and hash_of(path).startswith(match[1])


def stale_copies(root: Path, entries: Sequence[Mapping[str, Any]], removed: Sequence[str]) -> list[Path]:
    """The copies of an earlier set that are not in this one.

    Args:
        root: the support set's folder.
        entries: the manifest's entries of this set's classes.
        removed: folder names of the earlier set's classes that are not in this one.
    Raises:
        ValueError: foreign images in a class's folder.
    """
    stale = []
    for entry in entries:
        folder = root / entry["folder"]
        expected = {image.get("file") for image in entry["images"]}
        names = [name for name in images_in(folder) if name not in expected]
        refuse_foreign_images(folder, [name for name in names if not is_copy(folder / name)])
        stale += [folder / name for name in names]
    current = [root / entry["folder"] for entry in entries if (root / entry["folder"]).exists()]
    # Folders are compared by inode, because Cat and cat are one folder on some file systems.
    inodes = {(status.st_dev, status.st_ino) for status in map(os.stat, current)}
    for folder in (root / name for name in removed):
        if folder.is_dir() and (folder.stat().st_dev, folder.stat().st_ino) not in inodes:
            stale += [folder / name for name in images_in(folder) if is_copy(folder / name)]
    return stale


def copy_image(source: Path, digest: str, target: Path) -> None:
    """Copy a file atomically.

    Raises:
        ValueError: the file has another SHA-256 than `digest`.
    """
    data = read_bytes(source)
    actual = sha256(data).hexdigest()
    if actual != digest:
        raise ValueError(f"expected {source} as it was encoded, SHA-256 {digest}, got {actual}: encode it again")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary:
        Path(temporary).write_bytes(data)
