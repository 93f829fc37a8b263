"""Writing of export.json, whose reader is `clipkernels.runtime.manifest`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipkernels.arguments import describe
from clipkernels.artefacts.folders import Kind
from clipkernels.files import hash_of
from clipkernels.runtime.manifest import FILE, FORMAT, digest_of, read_export

EXPORTS = Kind("ck.export", FILE, lambda folder: read_export(folder)["files"])


def check_config(config: Any) -> None:
    """Raise TypeError unless a configuration is a name, a mapping or None, and ValueError if JSON cannot hold it."""
    if config is not None and not isinstance(config, str | Mapping):
        raise TypeError(f"config must be a name, a dict or None, got {describe(config)}")
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"config must be what JSON can hold, got {describe(config)}: {error}") from error


def write_header(folder: Path, content: Mapping[str, Any]) -> None:
    """Write export.json, with the SHA-256 of every other file of a folder and of its own content.

    Raises:
        ValueError: content that JSON cannot hold, such as NaN.
        OSError: a file cannot be read or written.
    """
    files = {path.relative_to(folder).as_posix(): hash_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    unsigned = {"format": FORMAT, **content, "files": files}
    signed = {"format": FORMAT, "sha256": digest_of(unsigned), **content, "files": files}
    (folder / FILE).write_text(
        json.dumps(signed, ensure_ascii=False, allow_nan=False, indent=1) + "\n", encoding="utf-8"
    )
