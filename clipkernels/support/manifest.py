"""What a support set says of itself, in manifest.json: how its images and features came to be."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipkernels.files import atomic_write
from clipkernels.support.features import Encoder
from clipkernels.support.folders import FORMAT, MANIFEST

MANIFEST_KEYS = ("kind", "settings", "model", "pretrained")
UNFINISHED = "unfinished"
"""What the manifest holds while its folder's images are being changed."""


def write_manifest(root: Path, said: Mapping[str, Any]) -> None:
    """Writes what a support set says of itself, whole or not at all."""
    with atomic_write(root / MANIFEST) as temporary:
        Path(temporary).write_text(json.dumps({"format": FORMAT, **said}, indent=1) + "\n", encoding="utf-8")


def read_manifest(root: Path, unfinished: bool = False) -> dict[str, Any]:
    """What a support set says of itself.

    Raises:
        ValueError: there is none, it is no manifest, or that of a set that was not finished, unless that may be.
    """
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        found = manifest["format"]
        if found != FORMAT:
            raise ValueError(f"format {found!r}")
        parts = [manifest[key] for key in (*MANIFEST_KEYS, *Encoder._fields)]
        parts += [manifest["features"]["sha256"], manifest["features"]["shape"], dict(manifest["tower"])]
        for each in manifest["classes"]:
            files = [each["folder"], *(image["file"] for image in each["images"] if "file" in image)]
            parts += [each["name"], each["prompts"], *(image["sha256"] for image in each["images"])]
            outside = [file for file in files if os.path.basename(file) != file or file in ("", "..")]
            if outside:
                raise ValueError(f"the name {outside[0]!r}")
    except FileNotFoundError as error:
        raise ValueError(f"expected a support set, got {root} without {MANIFEST}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected the manifest of a support set, got {root / MANIFEST} with {error}") from error
    if manifest.get(UNFINISHED) and not unfinished:
        raise ValueError(f"expected a finished support set, got {root}, whose saving was stopped: build it again")
    return manifest


def previous_classes(root: Path, kind: str) -> list[dict[str, Any]]:
    """What a folder's manifest says of its classes, nothing where there is none.

    Raises:
        ValueError: it is of another kind.
    """
    if not (root / MANIFEST).exists():
        return []
    manifest = read_manifest(root, unfinished=True)
    if manifest["kind"] != kind:
        raise ValueError(f"expected a support set of kind {kind} in {root}, got {manifest['kind']}")
    return manifest["classes"]
