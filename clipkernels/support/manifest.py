"""The manifest of a support set, manifest.json: the origin of its images and features."""

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
"""Key that the manifest holds while the folder's images are being changed."""


def write_manifest(root: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of a support set atomically."""
    with atomic_write(root / MANIFEST) as temporary:
        Path(temporary).write_text(json.dumps({"format": FORMAT, **content}, indent=1) + "\n", encoding="utf-8")


def read_manifest(root: Path, unfinished: bool = False) -> dict[str, Any]:
    """The manifest of a support set.

    Raises:
        ValueError: no manifest, an invalid one, or one of an unfinished set, unless `unfinished` allows that.
    """
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format"]
        if version != FORMAT:
            raise ValueError(f"format {version!r}")
        parts = [manifest[key] for key in (*MANIFEST_KEYS, *Encoder._fields)]
        parts += [manifest["features"]["sha256"], manifest["features"]["shape"], dict(manifest["tower"])]
        for entry in manifest["classes"]:
            files = [entry["folder"], *(image["file"] for image in entry["images"] if "file" in image)]
            parts += [entry["name"], entry["prompts"], *(image["sha256"] for image in entry["images"])]
            outside = [file for file in files if os.path.basename(file) != file or file in ("", "..")]
            if outside:
                raise ValueError(f"the name {outside[0]!r}")
    except FileNotFoundError as error:
        raise ValueError(f"expected a support set, got {root} without {MANIFEST}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected the manifest of a support set, got {root / MANIFEST} with {error}") from error
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
    return manifest["classes"]
