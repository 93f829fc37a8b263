"""The lock of a folder: one process writes at a time.

The file names the process: its number, its host, and when it started, because numbers are used again. The process also
holds an advisory lock on it, which the system releases however the process ends. A file that a killed process of this
host left is taken over. One of another host is refused, because nothing here tells whether that process lives.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: the content of the file decides alone
    fcntl = None  # type: ignore[assignment]

from clipkernels.files import naming

LOCK = ".lock"
MAX_BYTES = 1 << 12
_open_numbers: set[int] = set()


def _close_in_child() -> None:
    """Close the locks of a parent process, because an open file would keep them when the parent is killed."""
    for number in _open_numbers:
        with suppress(OSError):
            os.close(number)
    _open_numbers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


class Lock:
    """The lock of a folder.

    Args:
        folder: an existing folder.
    Raises:
        ValueError: another process writes there; the message names its number and host.
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOCK
        self.pid = os.getpid()
        with naming(self.file):
            self.number = self._acquire()

    def release(self) -> None:
        """Remove the file and release the lock; a forked child leaves both as they are."""
        number, self.number = self.number, -1  # another lock may have the number by a second call
        if number in _open_numbers and os.getpid() == self.pid:
            _open_numbers.discard(number)
            with suppress(FileNotFoundError):
                os.unlink(self.file)
            os.close(number)

    def _acquire(self) -> int:
        while True:
            number = os.open(self.file, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            try:
                locked = _lock(number)
                owner = _owner(number)
                if not locked or (owner and not _is_dead(owner)):
                    raise ValueError(_refusal(self.file, owner))
                # The process that held the lock may have removed the file since it was opened.
                if _is_current(number, self.file):
                    os.ftruncate(number, 0)
                    os.lseek(number, 0, os.SEEK_SET)
                    os.write(number, json.dumps(_this_process()).encode())
                    _open_numbers.add(number)
                    return number
            except BaseException:
                os.close(number)
                raise
            os.close(number)


def _lock(number: int) -> bool:
    """Lock an open file if no other process has; a file system without locks counts as success."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "start": _start_of(os.getpid())}


def _start_of(pid: int) -> int | None:
    """The clock ticks from the start of the system to that of a process; None if the system does not tell.

    A process that has ended and whose parent does not know yet counts as started at -1.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return -1 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _owner(number: int) -> dict[str, Any] | None:
    """The process that a lock names; None for an empty or damaged file, whose writer was killed while it wrote."""
    try:
        content = json.loads(os.read(number, MAX_BYTES))
    except ValueError:
        return None
    valid = isinstance(content, dict) and isinstance(content.get("pid"), int) and content["pid"] > 0
    return content if valid else None


def _is_dead(owner: dict[str, Any]) -> bool:
    """True if a process of this host has ended, or another one has its number now."""
    if owner.get("host") != socket.gethostname() or fcntl is None:  # os.kill would end a process of Windows
        return False
    try:
        os.kill(owner["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    start = _start_of(owner["pid"])
    return start is not None and owner.get("start") is not None and start != owner["start"]


def _is_current(number: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.stat(file))
    except FileNotFoundError:
        return False


def _refusal(file: Path, owner: dict[str, Any] | None) -> str:
    if owner is None:
        return f"expected {file.parent} to have one writer, got another process that has just locked it: wait for it"
    process = f"process {owner['pid']} on {owner.get('host')}"
    if owner.get("host") == socket.gethostname():
        return f"expected {file.parent} to have one writer, got {process}: wait for it or stop it"
    return f"expected {file.parent} to have one writer, got {process}: if that process has ended, delete {file}"
