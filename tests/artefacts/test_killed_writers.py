"""Folders that a killed `ck.save` leaves behind: the next one removes them, and returns what had moved aside."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import clipkernels as ck
from clipkernels.artefacts import folders
from clipkernels.artefacts.folders import replaced_folder

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(folders.fcntl is None, reason="this system has no locks that end with a process"),
]


def killed(action: Callable[[], Any]) -> None:
    """Run an action in a child process that must be killed in it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill_this_process(*arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_and_die(folder: Path, rename: int) -> None:
    """Replace a folder, and die before the rename of this number; 0 is before the first."""
    renames: list[Any] = []
    true_rename = os.rename

    def counted(before: Any, after: Any) -> None:
        if len(renames) == rename:
            kill_this_process()
        renames.append(after)
        true_rename(before, after)

    os.rename = counted  # type: ignore[assignment]
    with replaced_folder(folder) as temporary:
        (temporary / "model").write_text("half")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("rename", [0, 1])
def test_the_next_save_removes_what_a_killed_one_left(rename: int, tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    ck.save(ck.patch(tiny, ck.ToMe(4)), folder)
    killed(lambda: write_and_die(folder, rename))
    assert len(names(tmp_path)) == (3 if rename == 0 else 2) and folder.exists() is (rename == 0)
    with pytest.raises(OSError, match="no space left"), replaced_folder(folder):
        raise OSError("no space left")
    assert names(tmp_path) == ["tower"]  # a save that fails leaves the artefact that a killed one had moved
    assert ck.method_of(ck.load(folder).model) == ck.ToMe(4)
    killed(lambda: write_and_die(folder, rename))
    ck.save(ck.unpatch(tiny), folder)
    assert names(tmp_path) == ["tower"] and ck.method_of(ck.load(folder).model) is None


def test_a_kill_before_the_first_artefact_leaves_nothing_either(tmp_path: Path) -> None:
    folder = tmp_path / "a [1]*"  # no pattern
    killed(lambda: write_and_die(folder, 0))
    assert len(names(tmp_path)) == 1
    with replaced_folder(folder) as temporary:
        (temporary / "model").write_text("whole")
    assert names(tmp_path) == [folder.name] and (folder / "model").read_text() == "whole"


def test_writers_that_live_and_other_folders_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    others = [".tower.new.ABCDEFGH", ".tower.new.abcdefgh.txt", ".towers.new.abcdefgh", "tower.new.abcdefgh"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".tower.new.abcdefgh").write_text("a file")
    os.symlink(tmp_path / others[0], tmp_path / ".tower.old.abcdefgh")
    with replaced_folder(folder) as first:
        (first / "model").write_text("first")
        with replaced_folder(folder) as second:
            assert first.exists() and second != first
            (second / "model").write_text("second")
        assert (folder / "model").read_text() == "second"
        (folder / "model").unlink()  # an empty folder may be replaced
    assert (folder / "model").read_text() == "first"
    assert names(tmp_path) == sorted([*others, ".tower.new.abcdefgh", ".tower.old.abcdefgh", "tower"])


def test_without_locks_nothing_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "fcntl", None)
    (tmp_path / ".tower.new.abcdefgh").mkdir()
    with replaced_folder(tmp_path / "tower") as temporary:
        (temporary / "model").write_text("whole")
    assert names(tmp_path) == [".tower.new.abcdefgh", "tower"]
