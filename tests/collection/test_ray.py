"""The Ray engine: the bytes of the local one, kills, errors, and the clusters that it starts and joins."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.collection.killing import Run, await_end, check_ids, files_of, kill_and_finish, write_images

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray"),
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a system with SIGKILL"),
]
OPTIONS: dict[str, Any] = {"batch_size": 64, "unit_rows": 128, "shard_rows": 300}
RAY: dict[str, Any] = {**OPTIONS, "engine": "ray", "actors": 2}


def test_ray_writes_the_bytes_of_local_and_no_word(tmp_path: Path) -> None:
    broken = write_images(source := tmp_path / "images", 1000)
    run = Run(source, tmp_path / "ray", **RAY)
    result = run.finish()
    assert result["all_errors"] == result["errors"] == len(broken) and result["encoded"] == 1000 - len(broken)
    assert run.words() == ""
    assert await_end([run]) == []
    check_ids(tmp_path / "ray", source, broken)
    Run(source, tmp_path / "local", **OPTIONS).finish()
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")


def test_killed_ray_runs_end_in_the_bytes_of_one_local_run(tmp_path: Path) -> None:
    broken = write_images(source := tmp_path / "images", 5000)
    result = kill_and_finish(source, tmp_path / "killed", 10, seed=25, least=5, **RAY)
    assert result["all_errors"] == len(broken) and result["embeddings"] == 5000 - len(broken)
    check_ids(tmp_path / "killed", source, broken)
    Run(source, tmp_path / "whole", **OPTIONS).finish()
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("model", "RuntimeError: the model is broken"),
        ("disk", "OSError: [Errno 28] No space left on device: '{out}/units/"),
        ("folder", "ValueError: expected {out} to have one writer, got a new plan: stop the other run"),
        ("crashes", "RuntimeError: Ray stopped: ActorDiedError: "),
        ("plan", "ValueError: expected a plan of a collection (clipkernels.plan.1), got "),
    ],
)
def test_an_error_in_an_actor_is_the_error_of_the_call(fault: str, expected: str, tmp_path: Path) -> None:
    broken = write_images(source := tmp_path / "images", 600)
    run = Run(source, tmp_path / "out", fault=fault, **RAY)
    assert run.wait() == 1
    assert run.words().splitlines()[-1].startswith(expected.format(out=tmp_path / "out"))
    assert "ray.exceptions" not in run.words() and "site-packages/ray" not in run.words()
    assert await_end([run]) == []
    if fault != "plan":
        Run(source, tmp_path / "out", **OPTIONS).finish()
        check_ids(tmp_path / "out", source, broken)


def test_actors_that_crash_are_started_again(tmp_path: Path) -> None:
    broken = write_images(source := tmp_path / "images", 600)
    run = Run(source, tmp_path / "out", fault="crash", **{**RAY, "actors": 1, "shard_rows": 50_000})
    result = run.finish()
    assert run.words() == "" and result["encoded"] == 600 - len(broken)
    check_ids(tmp_path / "out", source, broken)


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """Yield the variables that name a cluster of another process of this machine, which has a token of its own."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid4().hex}
    code = (
        "import ray; print(ray.init('local', num_cpus=4, include_dashboard=False).address_info['gcs_address']); input()"
    )
    command = [sys.executable, "-u", "-c", code]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **token}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        yield {"RAY_ADDRESS": process.stdout.readline().strip(), **token}
        process.communicate("\n")
    assert process.returncode == 0


def test_ray_joins_the_cluster_of_its_address(tmp_path: Path) -> None:
    broken = write_images(source := tmp_path / "images", 1000)
    with cluster() as environment:
        run = Run(source, tmp_path / "joined", environment, **RAY)
        run.finish()
        assert run.words() == ""
        kill_and_finish(source, tmp_path / "killed", 2, seed=1, environment=environment, **RAY)
    check_ids(tmp_path / "joined", source, broken)
    Run(source, tmp_path / "local", **OPTIONS).finish()
    assert files_of(tmp_path / "joined") == files_of(tmp_path / "killed") == files_of(tmp_path / "local")


def test_a_unit_that_an_orphan_writes_late_does_no_harm(tmp_path: Path) -> None:
    broken = write_images(source := tmp_path / "images", 600)
    run = Run(source, tmp_path / "out", **OPTIONS)
    assert run.kill_after(2, 0) == 2
    run.wait()
    late = {file.name: file.read_bytes() for file in (tmp_path / "out/units").glob("*.parquet")}
    assert late
    Run(source, tmp_path / "out", **OPTIONS).finish()
    whole = files_of(tmp_path / "out")
    for name, content in late.items():
        (tmp_path / "out/units" / name).write_bytes(content)
    (tmp_path / "out/units/.000001-00000.parquet.abcd1234").write_bytes(b"half a unit")
    result = Run(source, tmp_path / "out", **OPTIONS).finish()
    assert result["encoded"] == 0 and files_of(tmp_path / "out") == whole
    check_ids(tmp_path / "out", source, broken)
