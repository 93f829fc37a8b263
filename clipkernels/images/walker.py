"""The walker: the image files that paths, folders and globs name.

It takes files with the suffix of a format that is read, follows linked folders, and skips hidden names. A link to one
of its own ancestors is skipped; a folder with two names is read under both.
"""

from __future__ import annotations

import glob
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from clipkernels.images.formats import FORMATS, REMEDIES, is_image_name, readable_formats

RECURSIVE = re.compile(rf"(?:^|(?<=[/{re.escape(os.sep)}]))\*\*(?:[/{re.escape(os.sep)}]+|$)")
MAX_SUFFIXES_SHOWN = 8


class Found(NamedTuple):
    """Image files, and a count by suffix of the other files in their folders."""

    paths: list[str]
    others: Counter[str]

    @property
    def note(self) -> str | None:
        """One line that counts the other files and says how to read those that are images; None without any."""
        counts: dict[str, list[str]] = {}
        shown = sorted(self.others.items(), key=lambda item: (-item[1], item[0]))[:MAX_SUFFIXES_SHOWN]
        rest = self.others.total() - sum(count for _, count in shown)
        for suffix, count in [*shown, *([("of other kinds", rest)] if rest else [])]:
            name = next((name for name, suffixes in FORMATS.items() if suffix in suffixes), "")
            counts.setdefault(REMEDIES.get(name, "not images"), []).append(f"{count} {suffix}")
        return "skipped " + "; ".join(f"{', '.join(c)}: {why}" for why, c in counts.items()) if counts else None


def find_images(sources: Sequence[str]) -> Found:
    """The files named by files, folders and globs, in order; those of a folder or a glob are sorted.

    A file that is named, or matched by a glob, is taken whatever its name. A glob takes no hidden files and folders,
    unless it spells the dot.

    Raises:
        ValueError: a path that does not exist, a glob that matches nothing, a folder without images.
        OSError: a folder cannot be read.
    """
    found = Found([], Counter())
    for source in sources:
        matches = [source] if os.path.lexists(source) else sorted(_expand(source))
        if not matches:
            raise ValueError(f"expected a file, a folder or a glob, got {source!r:.200}, which matches nothing")
        files: dict[str, None] = {}  # a glob may match a folder and the files in it
        for path in matches:
            if not os.path.isdir(path):
                files[path] = None
                continue
            below = images_below(path)
            if not below.paths:
                raise no_images(path, below)
            files.update(dict.fromkeys(below.paths))
            found.others.update(below.others)
        found.paths.extend(files)
    return found


def no_images(folder: str, found: Found) -> ValueError:
    """The error that a folder has no images; it says how to read those files that are images of other formats."""
    suffixes = ", ".join(FORMATS[name][0] for name in readable_formats())
    reason = f": {found.note}" if found.note else ""
    return ValueError(f"expected images ({suffixes}, …), got none under {folder!r}{reason}")


def images_below(folder: str, skip: Callable[[str], bool] | None = None) -> Found:
    """The image files below a folder, sorted.

    Args:
        folder: the folder.
        skip: of a folder's path: true leaves out a folder below this one.
    Raises:
        OSError: a folder cannot be read.
    """
    found = Found([], Counter())
    for path, names in images_by_folder(folder, found.others, skip):
        found.paths.extend(os.path.join(path, name) for name in names)
    found.paths.sort()
    return found


def images_by_folder(
    folder: str, others: Counter[str], skip: Callable[[str], bool] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and the folders below it, in a fixed order, each with the sorted names of its image files.

    Args:
        folder: the folder.
        others: counts the other files by suffix.
        skip: of a folder's path: true leaves out a folder below this one.
    Raises:
        OSError: a folder cannot be read.
    """
    for path, names in walk(folder, skip):
        images = []
        for name in names:
            if is_image_name(name):
                images.append(name)
            else:
                suffix = os.path.splitext(name)[1].lower()
                others[suffix if re.fullmatch(r"\.\w{1,12}", suffix) else "without a suffix"] += 1
        images.sort()
        yield path, images


def walk(folder: str, skip: Callable[[str], bool] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and the folders below it, links included, each with the names of its files; no hidden ones.

    The folders come in a fixed order, the names in that of the system. A link to a folder above it is skipped, so the
    walk ends.
    """
    stack: list[tuple[str, tuple[str, ...]]] = [(folder, (os.path.realpath(folder),))]
    while stack:
        path, chain = stack.pop()
        names, folders = _content(path)
        for below in sorted(folders, reverse=True):
            real = os.path.realpath(below)
            if not any(_holds(real, visited) for visited in chain) and not (skip and skip(below)):
                stack.append((below, (*chain, real)))
        yield path, names


def names_in(folder: str) -> list[str]:
    """The names of a folder's files, without hidden ones and those of folders; FIFOs and devices count as files.

    Raises:
        OSError: the folder cannot be read.
    """
    return _content(folder)[0]


def _content(folder: str) -> tuple[list[str], list[str]]:
    """The names of the files in a folder, and the paths of the folders in it, without hidden ones."""
    names, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                if _is_folder(entry):
                    folders.append(entry.path)
                else:
                    names.append(entry.name)
    return names, folders


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return true for a folder or a link to one; most entries know it without a further call of the system."""
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def _holds(folder: str, path: str) -> bool:
    """Return true if a path is a folder or lies below it; both are real paths."""
    return path == folder or path.startswith(os.path.join(folder, ""))


def _expand(pattern: str) -> set[str]:
    """The matches of a glob; `**` stands for the folders that `walk` yields, because glob's own follows links round."""
    match = RECURSIVE.search(pattern)
    if match is None:
        return set(glob.glob(pattern))
    head, tail = pattern[: match.start()], pattern[match.end() :]
    folders = [path for path in (glob.glob(head) if head else [os.curdir]) if os.path.isdir(path)]
    if not tail:
        return set(folders)
    every = (path for folder in folders for path, _ in walk(folder))
    matches = {path for folder in every for path in _expand(os.path.join(glob.escape(folder), tail))}
    return matches if head else {os.path.normpath(path) for path in matches}


def draw_images(paths: Sequence[str], limit: int | None, seed: int | None) -> list[str]:
    """Return at most `limit` paths, drawn at random; a larger limit adds to the same draw.

    Args:
        paths: the paths to draw from.
        limit: the number of paths, or None for all.
        seed: of the order; None is 0 with a limit, and keeps the order of `paths` without one.
    """
    order = list(paths)
    if limit is not None or seed is not None:
        random.Random(seed or 0).shuffle(order)
    return order[:limit]
