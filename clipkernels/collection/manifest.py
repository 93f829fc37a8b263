"""The manifest of an embedded collection: the settings of its rows, which a later run must share, and its sources."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from clipkernels.collection.layout import MANIFEST
from clipkernels.fingerprint import same_tower
from clipkernels.formats import Fingerprint, Format, Line, Size
from clipkernels.plan_records import PlanRecord
from clipkernels.state_files import read_json, write_json

MAX_BYTES = 1 << 22


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that a collection's rows share. A run with other settings is refused.

    library, model, pretrained: the names that load the model; None for a model from Python.
    tower, text_tower: fingerprints of the image tower and, with captions, of the text tower.
    method, tokens: the method's repr, "host" for none, and the tokens that enter each block and leave the last.
    precision: dtype of the tower.
    preprocess, reader: the preprocessing, and the rules that files are read by.
    width, dtype, normalised: of an embedding: its width, its dtype, and whether its length is one.
    image_column, id_column: the sources' columns of images and of ids, where they were named.
    text: the sources' column of captions, or None.
    columns: other columns of the sources, with their Arrow types.
    """

    library: Line | None
    model: Line | None
    pretrained: Line | None
    tower: Fingerprint
    text_tower: Fingerprint | None
    method: Line
    tokens: list[Size]
    precision: Literal["float32", "float16", "bfloat16", "float64"]
    preprocess: Line
    reader: Line
    width: Size
    dtype: Literal["float32", "float16"]
    normalised: bool
    image_column: Line | None = None
    id_column: Line | None = None
    text: Line | None
    columns: dict[Line, Line]

    @property
    def digest(self) -> str:
        """The SHA-256 of the settings, hexadecimal."""
        return sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of manifest.json: settings, sources as they were named, and the last run.

    spec: the method as the command line spells it, such as "tome:8"; None for one from Python.
    schedule: the plan of a `ck.Schedule`, whose file may not be there any more; absent for other methods.
    run: batch size, threads, device, compiled or not, engine and versions of the last run, for people.
    """

    settings: Settings
    sources: list[Line]
    spec: Line | None
    schedule: PlanRecord | msgspec.UnsetType = msgspec.UNSET
    run: Annotated[dict[Line, Line | int | bool | None], msgspec.Meta(max_length=32)]


FORMAT = Format("clipkernels.collection.1", "the manifest of a collection", Manifest, lambda header: {})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a collection, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    write_json(folder / MANIFEST, FORMAT, manifest, MAX_BYTES)


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a collection.

    Raises:
        ValueError: no manifest, an invalid one, or not as it was written.
        OSError: the file cannot be read.
    """
    file = Path(folder) / MANIFEST
    if not os.path.lexists(file):
        raise ValueError(f"expected a collection that clipkernels embed made, got {folder} without {MANIFEST}")
    manifest: Manifest = read_json(file, FORMAT, MAX_BYTES)
    return manifest


def differences(expected: Settings, actual: Settings) -> list[str]:
    """The settings in which two runs differ: "method: 'EViT(keep=0.7)' became 'host'"."""
    pairs: list[tuple[str, Any, Any]] = [
        (field, getattr(expected, field), getattr(actual, field)) for field in Settings.__struct_fields__
    ]
    different = {field for field, old, new in pairs if old != new}
    different -= _consequences(expected, actual, different)
    return [f"{field}: {_short(old)} became {_short(new)}" for field, old, new in pairs if field in different]


def _consequences(expected: Settings, actual: Settings, different: set[str]) -> set[str]:
    """The settings that differ because others do, which say more to a reader."""
    follow = set[str]()
    if "text" in different:
        follow.add("text_tower")
    if different & {"method", "model", "pretrained", "library"}:
        follow.add("tokens")
    if different & {"model", "pretrained", "library"}:
        follow |= {"tower", "text_tower"}
    if "precision" in different:
        follow.add("dtype")
        if same_tower(expected.tower, actual.tower):
            follow.add("tower")
    return follow


def _short(value: object) -> str:
    text = json.dumps(msgspec.to_builtins(value))
    return text if len(text) <= 80 else f"{text[:79]}…"
