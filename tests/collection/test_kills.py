"""Runs that are killed: every id is there once, and the bytes are those of a run that nothing interrupted."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.collection.killing import Run, await_end, check_ids, files_of, kill_and_finish, write_images

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a system with SIGKILL")


@pytest.mark.parametrize(
    ("images", "kills", "shard_rows"), [(600, 2, 256), pytest.param(5000, 10, 600, marks=pytest.mark.slow)]
)
def test_killed_runs_end_in_the_bytes_of_one_run(images: int, kills: int, shard_rows: int, tmp_path: Path) -> None:
    broken = write_images(source := tmp_path / "images", images)
    options: dict[str, Any] = {"batch_size": 64, "unit_rows": 128, "workers": 2, "shard_rows": shard_rows}
    result = kill_and_finish(source, tmp_path / "killed", kills, seed=images, **options)
    assert result["all_errors"] == len(broken) and result["embeddings"] == images - len(broken)
    check_ids(tmp_path / "killed", source, broken)
    Run(source, tmp_path / "whole", **options).finish()
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("die", ["appending", "appended"])
def test_a_run_that_is_killed_while_it_compacts(die: str, tmp_path: Path) -> None:
    """The captions fill the loaders' pipe, which nobody reads any more."""
    broken = write_images(source := tmp_path / "images", 1000, "a caption " * 400)
    options: dict[str, Any] = {"batch_size": 64, "unit_rows": 128, "workers": 2, "shard_rows": 300, "columns": ["txt"]}
    for _ in range(2):
        run = Run(source, tmp_path / "killed", die=die, **options)
        assert run.wait() == -signal.SIGKILL and await_end([run]) == []
    Run(source, tmp_path / "killed", **options).finish()
    check_ids(tmp_path / "killed", source, broken)
    Run(source, tmp_path / "whole", **options).finish()
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
