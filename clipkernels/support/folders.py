"""A folder of images per class: what it is called, which images are in it, and copies that are known as such."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from clipkernels.files import replacing
from clipkernels.support.features import SUFFIXES
from clipkernels.support.prompts import listed

LONGEST = 80  # characters of a folder's name, at most four bytes each
UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')
RESERVED = re.compile(  # by Windows, and by what lies beside the folders
    r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|manifest\.json|features\.safetensors.*", re.IGNORECASE
)
COPY = re.compile(r"\d{4,}-([0-9a-f]{8})\.\w+")


def folder_names(classes: Sequence[str]) -> list[str]:
    """Names for the folders of classes, in their order: each its class's own where every file system can hold that
    beside the others, else one like it that ends in a hash of the class."""
    safe = [UNSAFE.sub("_", unicodedata.normalize("NFC", name))[:LONGEST].strip(" .") for name in classes]
    often = Counter(name.casefold() for given, name in zip(classes, safe, strict=True) if name == given)
    return [
        name
        if name == given and often[name.casefold()] == 1 and not RESERVED.fullmatch(name) and not name.startswith("-")
        else f"{name or 'class'}-{sha256(given.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}".lstrip("-")
        for given, name in zip(classes, safe, strict=True)
    ]


def images_in(folder: Path) -> list[str]:
    """The names of a folder's files that are named like images, sorted; none that are hidden, none without a folder."""
    if not folder.is_dir():
        return []
    names = (file.name for file in folder.iterdir() if file.is_file())
    return sorted(name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith("."))


def refuse_others(folder: Path, others: Sequence[str]) -> None:
    """Raises ValueError where a class's folder holds images of somebody else."""
    if others:
        raise ValueError(
            f"expected no images but the set's own in {folder}, got {listed(list(others))}: delete them, or choose "
            "another folder"
        )


def copy_name(rank: int, digest: str, source: str) -> str:
    """What the copy of an image with this SHA-256 is called."""
    return f"{rank:04}-{digest[:8]}{os.path.splitext(source)[1].lower()}"


def is_copy(path: Path) -> bool:
    """Whether a file is called as `copy_name` calls one with its content."""
    match = COPY.fullmatch(path.name)
    return match is not None and hash_of(path).startswith(match[1])


def copy_image(source: str, digest: str, target: Path) -> None:
    """Copies a file, whole or not at all, unless it is there already.

    Raises:
        ValueError: its content is not what it was.
    """
    if target.exists() and hash_of(target) == digest:
        return
    data = Path(source).read_bytes()
    came = sha256(data).hexdigest()
    if came != digest:
        raise ValueError(f"expected {source} as it was encoded, SHA-256 {digest}, got {came}: encode it again")
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        Path(temporary).write_bytes(data)


def hash_of(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
