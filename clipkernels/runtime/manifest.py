"""export.json: everything about an exported folder but its graphs, signed.

Its SHA-256 covers the SHA-256 of each other file, so a changed folder is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from clipkernels.files import hash_of, open_named

FILE = "export.json"
FORMAT = "clipkernels.export.1"
MAX_BYTES = 1 << 24
REMEDY = "export the model again"


def is_export(folder: str | os.PathLike[str]) -> bool:
    """Return true if a folder has an export.json, which may be damaged."""
    return os.path.lexists(Path(folder) / FILE)


def digest_of(content: Mapping[str, Any]) -> str:
    """The SHA-256 of an export.json without its own `sha256`, hexadecimal."""
    signed = {name: value for name, value in content.items() if name != "sha256"}
    canonical = json.dumps(signed, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def read_export(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a folder's export.json.

    Raises:
        ValueError: no exported folder, one of another format, or not as it was written.
        OSError: the file cannot be read.
    """
    file = Path(folder) / FILE
    if not is_export(folder):
        raise ValueError(f"expected a folder that clipkernels export wrote, got {folder} without {FILE}")
    with open_named(file, f"{FILE} of clipkernels export", MAX_BYTES) as stream:
        text = stream.read()
    try:
        content = json.loads(text)
        actual = content["format"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"expected {FILE} of clipkernels export, got {file} without a format: {REMEDY}") from error
    if actual != FORMAT:
        newer = str(actual)[:60].startswith(FORMAT.rpartition(".")[0] + ".")
        remedy = "which another clipkernels wrote: update this one" if newer else REMEDY
        raise ValueError(f"expected {file} of the format {FORMAT}, got {str(actual)[:60]!r}, {remedy}")
    if content.get("sha256") != digest_of(content):
        raise ValueError(f"expected {file} as it was written, got another one (its SHA-256 differs): {REMEDY}")
    return dict(content)


def check_files(folder: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Raise ValueError unless the files of an exported folder are those that were written; further files do not count.

    Raises:
        OSError: a file is missing.
    """
    for name, digest in content["files"].items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"expected names of files in {folder}, got {name!r:.60}")
        if hash_of(Path(folder) / path) != digest:
            raise ValueError(
                f"expected the files that clipkernels export wrote to {folder}, got another {name} (its SHA-256 "
                f"differs): {REMEDY}"
            )
