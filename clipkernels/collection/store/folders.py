"""Opening of a collection's folder: what it may hold, and what killed writers left in it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from clipkernels.collection.layout import EMBEDDINGS, ERRORS, INDEX, MANIFEST, PLANS, UNITS
from clipkernels.collection.manifest import Manifest, differences, read_manifest
from clipkernels.folder_lock import LOCK
from clipkernels.messages import list_names

TEMPORARY = re.compile(r"\.(manifest\.json|[0-9-]+\.parquet)\.[a-z0-9_]{8}")
"""Names of the temporary files of `files.atomic_write`. None ends in .parquet, so a glob for shards has none."""
FOLDERS = (EMBEDDINGS, ERRORS, PLANS, UNITS)


def refuse_foreign(folder: Path) -> None:
    """Raise ValueError if a folder holds something, but no collection."""
    names = set(os.listdir(folder))
    others = {name for name in names - {*FOLDERS, INDEX, LOCK} if not TEMPORARY.fullmatch(name)}
    if others and MANIFEST not in names and not names.issuperset(FOLDERS):
        raise ValueError(
            f"expected a new or empty folder or a collection, got {folder} with {min(others)!r} and no {MANIFEST}: "
            "choose another folder"
        )


def sweep(folder: Path) -> None:
    """Remove the temporary files of killed writers; the lock tells that no other one is at work."""
    for name in os.listdir(folder):
        if TEMPORARY.fullmatch(name):
            with suppress(FileNotFoundError):
                os.unlink(folder / name)


def merge_manifest(
    folder: Path, manifest: Manifest, forgotten: Sequence[str] = (), *, complete: bool = False
) -> tuple[Manifest, bool]:
    """The manifest of a run, whose sources join those of earlier runs, and whether it differs from the file.

    Args:
        folder: the collection.
        manifest: of this run.
        forgotten: sources of earlier runs that are not the collection's any more.
        complete: the run must name all other sources.
    Raises:
        ValueError: the settings differ from the collection's, a forgotten source is not one of them, a source is not
            named, or the file is not as it was written.
        OSError: the file cannot be read.
    """
    exists = os.path.lexists(folder / MANIFEST)
    known = read_manifest(folder) if exists else msgspec.structs.replace(manifest, sources=[])
    if others := [name for name in forgotten if name not in known.sources]:
        expected = f"expected sources of {folder} to forget ({list_names(known.sources) or 'which has none'})"
        raise ValueError(f"{expected}, got {list_names(others)}")
    known = msgspec.structs.replace(known, sources=[name for name in known.sources if name not in forgotten])
    missing = [name for name in known.sources if name not in manifest.sources]
    if complete and missing:
        expected = f"expected all sources of {folder} with prune, got none of {list_names(missing)}"
        raise ValueError(f"{expected}: name them, or forget those that are not there any more")
    if known.settings != manifest.settings:
        changes = "; ".join(differences(known.settings, manifest.settings))
        raise ValueError(
            f"expected the settings of {folder}, got others: {changes}: repeat its options, or choose another folder"
        )
    names = [*known.sources, *(name for name in manifest.sources if name not in known.sources)]
    merged = msgspec.structs.replace(manifest, sources=names)
    return merged, not exists or bool(forgotten) or merged != known


def prepare(folder: Path) -> None:
    """Make the folders of a collection, and remove temporary files. The lock tells that no other writer is at work."""
    for name in FOLDERS:
        (folder / name).mkdir(exist_ok=True)
        sweep(folder / name)
    sweep(folder)
