"""The folder of a set: the path that a user gives may also be the folder around it or one inside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from clipkernels.messages import list_items


def find_home(
    path: Path, is_home: Callable[[Path], bool], names: Sequence[str], inner: Sequence[str] = ()
) -> Path | None:
    """The folder of a set, or None.

    Args:
        path: the folder that the user gives, absolute.
        is_home: true of the set's folder.
        names: the set's usual names in a folder of sets, which is searched if the path is not the set's folder.
        inner: the names of folders in the set's folder; the folder around a path with such a name is tried last.
    Raises:
        ValueError: several folders of the set in the path.
    """
    if is_home(path):
        return path
    homes: list[Path] = []
    for candidate in (path / name for name in names):
        if is_home(candidate) and not any(candidate.samefile(home) for home in homes):
            homes.append(candidate)
    if len(homes) > 1:
        raise ValueError(f"expected one folder of the set, got {list_items(map(str, homes))}: name one of them")
    if homes:
        return homes[0]
    return path.parent if path.name in inner and is_home(path.parent) else None
