"""Fill the disk at every file of a run, and run without permission; go on, and compare with an undisturbed run.

    python -m tests.collection.refused_writes FOLDER

Each run is a forked child. It prints the folders of the files that could not be written.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
from pathlib import Path

from tests.collection.collections import embedded, expected, failed, run, tables
from tests.collection.kill_at_steps import in_child

ITEMS = {f"{index:02d}{'?' if index < 9 else ''}": 1 for index in range(12)}


def refused_file(
    folder: Path, items: dict[str, int], *, limit: int | None = None, user: int | None = None
) -> Path | None:
    """Embed a listing with a limit of the size of files, or as another user; return the file that is refused."""
    reading, writing = os.pipe()

    def work() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        if user is not None:
            os.seteuid(user)
        try:
            run(folder, items, unit_rows=12)
        except OSError as error:
            assert error.strerror in ("File too large", "Permission denied"), error
            os.write(writing, os.fsencode(error.filename))

    assert in_child(work) == 0
    os.close(writing)
    with open(reading, "rb") as stream:
        name = os.fsdecode(stream.read())
    return Path(name) if name else None


def fill_at_every_file(root: Path, before: dict[str, int]) -> set[str]:
    """Embed a listing with ever larger limits; return the folders of the files that are refused."""
    start, whole = root / "start", root / "whole"
    run(start, before)
    shutil.copytree(start, whole)
    items = {**before, **ITEMS}
    run(whole, items, unit_rows=12)
    reached = set()
    for limit in range(100, 100_000, 100):
        folder = root / str(limit)
        shutil.copytree(start, folder)
        file = refused_file(folder, items, limit=limit)
        if file is None:
            break
        assert folder in file.parents and not file.name.startswith("."), file
        reached.add(file.stem if file.parent == folder else file.parent.name)
        assert not [path for path in folder.rglob(".*") if path.is_file()], "a temporary file is left"
        run(folder, items, unit_rows=12)
        assert tables(folder) == tables(whole) and (embedded(folder), failed(folder)) == expected(items)
    return reached


def main(root: Path) -> None:
    os.fsync = lambda number: None
    reached = fill_at_every_file(root / "new", {})
    reached |= fill_at_every_file(root / "old", {f"{index:03d}?": 1 for index in range(150)})
    (root / "empty").mkdir()
    reached |= {"manifest"} if refused_file(root / "empty" / "collection", ITEMS, limit=100) else set()
    if os.geteuid() == 0:
        folder = root / "new" / "whole"
        file = refused_file(folder, ITEMS, user=65534)
        assert file is not None and folder in (file, *file.parents), file
    print(*sorted(reached))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
