"""Fill the disk at every file of a run, and run without permission; go on, and compare with an undisturbed run.

    python -m tests.collection.refused_writes FOLDER

Each run is a forked child. It prints the folders of the files that could not be written.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from tests.collection.collections import embedded, expected, failed, run, tables
from tests.collection.kill_at_steps import in_child

ITEMS = {f"{index:02d}{'?' if index < 9 else ''}": 1 for index in range(12)}


def refused_file(folder: Path, *, limit: int | None = None, user: int | None = None) -> Path | None:
    """Embed a listing with a limit of the size of files, or as another user; return the file that is refused."""
    reading, writing = os.pipe()

    def work() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        if user is not None:
            os.seteuid(user)
        try:
            run(folder, ITEMS)
        except OSError as error:
            assert error.strerror in ("File too large", "Permission denied"), error
            os.write(writing, os.fsencode(error.filename))

    assert in_child(work) == 0
    os.close(writing)
    with open(reading, "rb") as stream:
        name = os.fsdecode(stream.read())
    return Path(name) if name else None


def main(root: Path) -> None:
    os.fsync = lambda number: None
    run(root / "whole", ITEMS)
    limit, reached = 100, set()
    while True:
        folder = root / str(limit)
        file = refused_file(folder, limit=limit)
        if file is None:
            break
        assert folder in file.parents and not file.name.startswith("."), file
        reached.add(file.stem if file.parent == folder else file.parent.name)
        assert not [path for path in folder.rglob(".*") if path.is_file()], "a temporary file is left"
        run(folder, ITEMS)
        assert tables(folder) == tables(root / "whole") and (embedded(folder), failed(folder)) == expected(ITEMS)
        limit += 100
    if os.geteuid() == 0:
        file = refused_file(root / "whole", user=65534)
        assert file is not None and root / "whole" in file.parents, file
    print(*sorted(reached))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
