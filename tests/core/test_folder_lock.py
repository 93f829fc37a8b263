"""The lock of a folder: one writer, whatever became of the last one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clipkernels import folder_lock as lock
from clipkernels.folder_lock import Lock

HOLDER = """
import os, sys, time
from pathlib import Path
from clipkernels.folder_lock import Lock
lock = Lock(Path(sys.argv[1]))
forks = len(sys.argv) > 2
if forks and os.fork():
    time.sleep(60)
print(os.getpid() if forks else 0, flush=True)  # by the child, which has then let go of the lock
if forks:
    os.close(1)
time.sleep(60)
"""


def write(folder: Path, **changes: Any) -> None:
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "start": lock._start_of(os.getpid())}
    (folder / ".lock").write_text(json.dumps({**owner, **changes}))


def test_a_second_writer_is_refused_by_process_and_host(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"0\n"
        message = f"got process {holder.pid} on {socket.gethostname()}: wait for it or stop it"
        with pytest.raises(ValueError, match=message):
            Lock(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        Lock(tmp_path).release()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_child_of_a_killed_writer_does_not_keep_the_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), "fork"], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        holder.kill()
        holder.wait()
        os.kill(child, 0)
        Lock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_a_lock_that_is_released_twice_leaves_other_locks(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    first = Lock(folders[0])
    first.release()
    second = Lock(folders[1])  # with the number of the first
    first.release()
    with pytest.raises(ValueError, match="to have one writer"):
        Lock(folders[1])
    second.release()
    assert not (folders[1] / ".lock").exists()


def test_a_second_lock_of_one_process_is_refused(tmp_path: Path) -> None:
    first = Lock(tmp_path)
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        Lock(tmp_path)
    first.release()
    Lock(tmp_path).release()


def test_a_released_lock_leaves_no_file(tmp_path: Path) -> None:
    held = Lock(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text()) == {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "start": lock._start_of(os.getpid()),
    }
    held.release()
    held.release()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": "x"}', b'{"pid": -1}', b"\xff"])
def test_a_lock_that_names_nobody_is_taken(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".lock").write_bytes(content)
    Lock(tmp_path).release()


def test_a_process_that_has_ended_is_taken_over(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    write(tmp_path, pid=ended.pid, start=lock._start_of(ended.pid))
    ended.wait()
    Lock(tmp_path).release()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell when a process started")
def test_an_ended_process_that_nobody_waited_for_is_taken_over(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    write(tmp_path, pid=ended.pid, start=lock._start_of(ended.pid))
    assert ended.stdout is not None and ended.stdout.read() == b""
    while lock._start_of(ended.pid) != -1:
        pass
    Lock(tmp_path).release()
    ended.stdout.close()
    ended.wait()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell when a process started")
def test_a_number_that_another_process_has_now_is_taken_over(tmp_path: Path) -> None:
    write(tmp_path, start=12)
    Lock(tmp_path).release()


def test_a_living_process_is_refused_without_its_file_lock(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        Lock(tmp_path)
    assert (tmp_path / ".lock").exists()


def test_a_process_of_another_host_is_refused_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path, host="elsewhere", pid=4)
    message = f"got process 4 on elsewhere: if that process has ended, delete {tmp_path / '.lock'}"
    with pytest.raises(ValueError, match=message):
        Lock(tmp_path)


def test_a_file_system_without_locks_goes_by_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    held = Lock(tmp_path)
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        Lock(tmp_path)
    held.release()
    write(tmp_path, start=12)
    Lock(tmp_path).release()
