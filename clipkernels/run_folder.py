"""The folder of one long run, from which it goes on after it was stopped or killed.

run.json  the settings of the run, signed; the names of the other files are the run's own

Every file is written under another name and renamed, and one process uses the folder at a time.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from clipkernels.folder_lock import LOCK, Lock
from clipkernels.formats import Format
from clipkernels.state_files import read_json, write_json

RUN = "run.json"
MAX_BYTES = 1 << 22
SECONDS_BETWEEN_CHECKPOINTS = 60.0
"""At least; and ten times as long as a checkpoint takes to be written."""


class CheckpointClock:
    """The time of the next checkpoint: once a minute, or later where writing takes long."""

    def __init__(self) -> None:
        self._written, self._seconds = time.monotonic(), 0.0

    def is_due(self) -> bool:
        """Return true if a checkpoint is worth its time."""
        return time.monotonic() - self._written >= max(SECONDS_BETWEEN_CHECKPOINTS, 10 * self._seconds)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Time the writing of a checkpoint; the next one is due from its end."""
        began = time.monotonic()
        yield
        self._written = time.monotonic()
        self._seconds = self._written - began


class RunFolder:
    """A kind of run: its folders are recognised, opened and removed.

    Args:
        title: the run with its article, such as "a recovery".
        form: the format of run.json, whose schema is the settings.
        names: a pattern of the names of the other files.
        describe: how settings differ, given the names of those that do, the written ones and the wanted ones.
        remedy: the advice for a run of other settings.
    """

    def __init__(
        self,
        title: str,
        form: Format,
        names: str,
        describe: Callable[[Sequence[str], Any, Any], Sequence[str]],
        remedy: str = "repeat that call, or choose another state",
    ) -> None:
        self.title, self.form, self.describe, self.remedy = title, form, describe, remedy
        self.names = re.compile(names)
        self.temporary = re.compile(rf"\.(run\.json|{names})\.[a-z0-9_]{{8}}")

    def check(self, folder: Path) -> None:
        """Raise ValueError unless a folder is new, empty, or that of such a run with nothing else in it.

        Raises:
            OSError: the folder cannot be read.
        """
        expected = f"expected state to be a new or empty folder, or that of {self.title}"
        if not os.path.lexists(folder):
            return
        if not folder.is_dir():
            raise ValueError(f"{expected}, got {folder}, which is no folder: choose another one")
        names = set(os.listdir(folder))
        files = {name for name in names if self.names.fullmatch(name)}
        others = {name for name in names - files - {RUN, LOCK} if not self.temporary.fullmatch(name)}
        if others or (RUN not in names and files):
            raise ValueError(f"{expected}, got {folder} with {min(others or names)!r}: choose another one")

    def open(self, folder: Path, settings: msgspec.Struct) -> Lock:
        """The lock of the folder, which is made or belongs to a run of these settings.

        Raises:
            ValueError: a folder that holds something else, or a run of other settings; or another process uses it.
            OSError: the folder cannot be read or written.
        """
        self.check(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder)
        try:
            for name in os.listdir(folder):
                if self.temporary.fullmatch(name):  # of a process that was killed, because no other one has the lock
                    with suppress(FileNotFoundError):
                        os.unlink(folder / name)
            if (folder / RUN).exists():
                self._refuse_others(folder, read_json(folder / RUN, self.form, MAX_BYTES), settings)
            else:
                write_json(folder / RUN, self.form, settings, MAX_BYTES)
        except BaseException:
            lock.release()
            raise
        return lock

    def remove(self, folder: Path) -> None:
        """Remove the folder of such a run, if it is there; run.json goes last, so that a kill leaves a state.

        Raises:
            ValueError: a folder that holds something else; it is left as it is.
            OSError: a file cannot be removed.
        """
        self.check(folder)
        if not folder.exists():
            return
        for name in sorted(os.listdir(folder), key=lambda name: (name == RUN, name)):
            with suppress(FileNotFoundError):
                os.unlink(folder / name)
        with suppress(OSError):
            folder.rmdir()

    def _refuse_others(self, folder: Path, written: Any, settings: Any) -> None:
        """Raise ValueError, which says what differs, unless two runs have the same settings."""
        names = [name for name in settings.__struct_fields__ if getattr(written, name) != getattr(settings, name)]
        if names:
            raise ValueError(
                f"expected the run that state {folder} began, got one with "
                f"{', '.join(self.describe(names, written, settings))}: {self.remedy}"
            )
