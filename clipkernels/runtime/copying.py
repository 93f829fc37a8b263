"""Copies of the runtime, which run in an exported folder without clipkernels and without torch."""

from __future__ import annotations

import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
SHARED = ("files.py", "messages.py", "images/__init__.py", "images/formats.py", "images/reader.py", "images/walker.py")
"""The modules outside of the runtime that it imports."""
FOLDER = "runtime"
SHARED_IMPORT = re.compile(r"^( *from )clipkernels\.(?!runtime\b)", re.MULTILINE)
OWN_IMPORT = re.compile(r"^( *from )clipkernels\.runtime\b", re.MULTILINE)


def copy_into(folder: Path) -> list[str]:
    """Copy the runtime and the reader of images into a folder, as its package `runtime`.

    Returns:
        The names of the files, such as "runtime/__init__.py", sorted.
    Raises:
        OSError: a file cannot be written.
    """
    own = [file.name for file in (PACKAGE / FOLDER).glob("*.py") if file.name != Path(__file__).name]
    names = {f"{FOLDER}/{name}": PACKAGE / FOLDER / name for name in own}
    names |= {f"{FOLDER}/{name}": PACKAGE / name for name in SHARED}
    for name, source in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(rewrite(source.read_text(encoding="utf-8")), encoding="utf-8")
    return sorted(names)


def rewrite(source: str) -> str:
    """The text of a module of clipkernels with the imports of its copy."""
    return OWN_IMPORT.sub(r"\1runtime", SHARED_IMPORT.sub(r"\1clipkernels.runtime.", source))
