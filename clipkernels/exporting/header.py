"""export.json: everything about an exported folder but its graphs, signed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from clipkernels.artefacts.folders import Kind
from clipkernels.files import hash_of

FILE = "export.json"
FORMAT = "clipkernels.export.1"


def write_header(folder: Path, content: Mapping[str, Any]) -> None:
    """Write export.json, with the SHA-256 of every other file of a folder and of its own content.

    Raises:
        ValueError: content that JSON cannot hold, such as NaN.
        OSError: a file cannot be read or written.
    """
    files = {path.relative_to(folder).as_posix(): hash_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(FILE, None)
    unsigned = {"format": FORMAT, **content, "files": files}
    signed = {"format": FORMAT, "sha256": digest_of(unsigned), **unsigned}
    text = json.dumps(signed, ensure_ascii=False, allow_nan=False, indent=1)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def digest_of(content: Mapping[str, Any]) -> str:
    """The SHA-256 of the canonical JSON of a header without its digest."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return sha256(text.encode()).hexdigest()


def listed_files(folder: Path) -> list[str]:
    """The paths of the files that the export.json of a folder lists.

    Raises:
        ValueError: a file that is no header of this format.
        OSError: it cannot be read.
    """
    file = folder / FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        files, digest = dict(content["files"]), content.pop("sha256")
        if content["format"] != FORMAT or digest != digest_of(content):
            raise ValueError(content["format"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected {file} as ck.export wrote it ({FORMAT}), got another: {error!r:.100}") from error
    return list(files)


EXPORTS = Kind("ck.export", FILE, listed_files)
