"""The manifest of a support set, manifest.json: the origin of its images and features."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from clipkernels.formats import Digest, Format, Line, Size, to_struct
from clipkernels.state_files import read_json, write_json
from clipkernels.support.features import Encoder
from clipkernels.support.folders import FORMAT_NAME, MANIFEST

MANIFEST_KEYS = ("kind", "settings", "model", "pretrained")
UNFINISHED = "unfinished"
"""Key that the manifest holds while the folder's images are being changed."""
MAX_BYTES = 1 << 26


class ImageEntry(msgspec.Struct, forbid_unknown_fields=True):
    """An image: its SHA-256, its file in the class's folder, if it is copied, and its origin, if that is known."""

    sha256: Digest
    file: Line | msgspec.UnsetType = msgspec.UNSET
    source: Line | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if self.file is self.source is msgspec.UNSET:
            raise ValueError("an image without file and source")
        if self.file is not msgspec.UNSET:
            _check_name(self.file)


class ClassEntry(msgspec.Struct, forbid_unknown_fields=True):
    """A class: its name, its folder, its sentences, and its images in the order of their rows."""

    name: Line
    folder: Line
    prompts: Annotated[list[Line], msgspec.Meta(min_length=1)]
    images: list[ImageEntry]

    def __post_init__(self) -> None:
        _check_name(self.folder)


class FeaturesEntry(msgspec.Struct, forbid_unknown_fields=True):
    """The SHA-256 of the file of features, "" as long as the set is unfinished, and their shape."""

    sha256: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")]
    shape: Annotated[list[Size], msgspec.Meta(min_length=2, max_length=2)]


class Manifest(Encoder, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of a manifest besides its encoder's."""

    kind: Literal["LC", "SD"]
    settings: Annotated[dict[Line, Line | bool | int | float | None], msgspec.Meta(max_length=32)]
    model: Line | None
    pretrained: Line | None
    features: FeaturesEntry
    classes: Annotated[list[ClassEntry], msgspec.Meta(min_length=1)]
    unfinished: bool | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        # An unfinished set also has the classes that its end removes, whose names may be those of others.
        for field in ("folder",) if self.unfinished else ("folder", "name"):
            if len({getattr(entry, field) for entry in self.classes}) < len(self.classes):
                raise ValueError(f"two classes of one {field}")


FORMAT = Format(FORMAT_NAME, "the manifest of a support set", Manifest, lambda header: {})


def write_manifest(root: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of a support set atomically.

    Raises:
        ValueError: content that does not fit the schema.
        OSError: the file cannot be written.
    """
    try:
        write_json(root / MANIFEST, FORMAT, to_struct(FORMAT, content), MAX_BYTES)
    except ValueError as error:
        raise ValueError(f"expected {FORMAT.title} to write to {root / MANIFEST}, got one with {error}") from error


def read_manifest(root: Path, unfinished: bool = False) -> dict[str, Any]:
    """The manifest of a support set.

    Raises:
        ValueError: no manifest, an invalid one or not as it was written, or one of an unfinished set, unless
            `unfinished` allows that.
        OSError: the file cannot be read.
    """
    file = root / MANIFEST
    if not os.path.lexists(file):
        raise ValueError(f"expected a support set, got {root} without {MANIFEST}")
    manifest: dict[str, Any] = msgspec.to_builtins(read_json(file, FORMAT, MAX_BYTES))
    if manifest.get(UNFINISHED) and not unfinished:
        raise ValueError(f"expected a finished support set, got {root}, whose saving was interrupted: build it again")
    return manifest


def previous_classes(root: Path, kind: str) -> list[dict[str, Any]]:
    """The class entries of a folder's manifest, finished or not; empty if there is no manifest.

    Raises:
        ValueError: a support set of another kind.
    """
    if not (root / MANIFEST).exists():
        return []
    manifest = read_manifest(root, unfinished=True)
    if manifest["kind"] != kind:
        raise ValueError(f"expected a support set of kind {kind} in {root}, got {manifest['kind']}")
    classes: list[dict[str, Any]] = manifest["classes"]
    return classes


def _check_name(name: str) -> None:
    """Raise ValueError for a name that is not a file or folder beside others, such as a path."""
    if os.path.basename(name) != name or name in ("", ".", ".."):
        raise ValueError(f"the name {name!r:.80}")
