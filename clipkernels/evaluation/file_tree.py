"""Files that a list names by paths relative to a folder: safe paths, and one listing per folder instead of one call of
the system per file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import NamedTuple
from unicodedata import normalize

from clipkernels.messages import list_items, quantity

DRIVE = re.compile(r"[A-Za-z]:")


def relative_path(text: str) -> str:
    """A path that a list of files names, with `/` between its parts.

    Backslashes separate parts too, as lists written on Windows have them; one that leads the path is dropped, because
    CoOp's code leaves it there.

    Raises:
        ValueError: a path that is empty, absolute, has a part `..`, or that no file can have.
    """
    path = text.removeprefix("\\") if not text.startswith("\\\\") else text
    path = path.replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        parts = []
    if not parts or path.startswith("/") or DRIVE.match(path) or ".." in parts or "\0" in path:
        raise ValueError(f"the path {text!r:.200}: a path must be relative and stay in the folder of the data")
    return "/".join(parts)


class _Folder(NamedTuple):
    """A folder with its files and folders by name, the names in Unicode's composed form."""

    path: str
    files: dict[str, str]
    folders: dict[str, str]


class FileTree:
    """The files below a folder. Each folder is listed once, when a file in it is first asked for.

    Names match in any Unicode form, because some file systems decompose them.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.fspath(root)
        self._folders: dict[str, _Folder | None] = {}

    def find(self, path: str) -> str | None:
        """The path of the file at a relative path, which begins with the root; None if there is none."""
        parent, _, name = path.rpartition("/")
        folder = self._folder(parent)
        if folder is None:
            return None
        match = folder.files.get(normalize("NFC", name))
        if match is not None:
            return os.path.join(folder.path, match)
        other = os.path.join(folder.path, name)  # a file system may ignore case; hidden files are not listed
        return other if os.path.isfile(other) else None

    def _folder(self, path: str) -> _Folder | None:
        if path not in self._folders:
            self._folders[path] = self._list(path)
        return self._folders[path]

    def _list(self, path: str) -> _Folder | None:
        if not path:
            return _list_folder(self.root)
        parent, _, name = path.rpartition("/")
        folder = self._folder(parent)
        if folder is None:
            return None
        return _list_folder(os.path.join(folder.path, folder.folders.get(normalize("NFC", name), name)))


def _list_folder(path: str) -> _Folder | None:
    """A folder's files and folders without hidden ones and broken links; None if there is no such folder."""
    folder = _Folder(path, {}, {})
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(".") or _is_broken(entry):
                    continue
                names = folder.folders if entry.is_dir() else folder.files
                names[normalize("NFC", entry.name)] = entry.name
    except (FileNotFoundError, NotADirectoryError):
        return None
    return folder


def _is_broken(entry: os.DirEntry[str]) -> bool:
    """Return true for a link that leads nowhere; other entries take no further call of the system."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def subfolders(path: str | os.PathLike[str]) -> list[str]:
    """The names of the folders in a folder, links to folders included, sorted, without hidden ones.

    Raises:
        OSError: the folder cannot be read.
    """
    with os.scandir(path) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".") and not _is_broken(entry) and entry.is_dir()
        )


def describe_folder(path: str | os.PathLike[str]) -> str:
    """A folder with the first names in it, for messages, or the reason why it has none."""
    folder = _list_folder(os.fspath(path))
    if folder is None:
        return f"{os.fspath(path)!r}, which is no folder"
    names = sorted([*folder.folders, *folder.files])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{os.fspath(path)!r} with {list_items(map(repr, names[:5]))}{more}" if names else "an empty folder"


def missing_note(split: str, missing: Iterable[str], total: int) -> str | None:
    """The sentence that counts the missing files of a split and names the first; None without any."""
    names = list(missing)
    if not names:
        return None
    return f"{len(names)} of the {quantity(total, 'file')} of the {split} split are missing, the first {names[0]!r}"
