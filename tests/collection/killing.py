"""Runs of `ck.embed` in processes of their own, to be killed, and the state that they must end in."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

MARK = "CLIPKERNELS_TEST_RUN"
ROOT = Path(__file__).parents[2]
ENDING_SECONDS = 120
"""The time that the children of a killed process have to end by themselves."""


def write_images(folder: Path, count: int, caption: str = "") -> dict[str, str]:
    """Write images of noise, some broken, with a caption in a file of text if there is one.

    Returns:
        The ids of the broken images, each with a word of its reason.
    """
    rng = np.random.default_rng(25)
    broken: dict[str, str] = {}
    for start in range(0, count, 100):
        (folder / f"{start:05d}").mkdir(parents=True)
        for number in range(start, min(start + 100, count)):
            name = f"{start:05d}/{number:05d}.png"
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / name, compress_level=1)
            if caption:
                (folder / name).with_suffix(".txt").write_text(caption)
            if number % 97 == 5:
                content = (folder / name).read_bytes()
                (folder / name).write_bytes(content[: (0, 40, 1000)[number % 3]])
                broken[name] = ("not an image", "not an image", "truncated")[number % 3]
    return broken


class Run:
    """A process that embeds a folder. It and its children have a mark in their environment.

    Args:
        source, out: the images and the collection.
        environment: further variables.
        options: of `embedding_process.main`.
    """

    def __init__(self, source: Path, out: Path, environment: dict[str, str] | None = None, **options: Any) -> None:
        self.mark = uuid4().hex
        arguments = {"source": str(source), "out": str(out), **options}
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        variables = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", MARK: self.mark, **(environment or {})}
        self.errors = out.parent / f"{self.mark}.stderr"
        command = [sys.executable, str(ROOT / "tests/collection/embedding_process.py"), json.dumps(arguments)]
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **variables}
            )

    def kill_after(self, units: int, delay: float) -> int:
        """Kill the process a moment after some units; return the units that it wrote, or the code if it ended."""
        assert self.process.stdout is not None
        written = 0
        for line in self.process.stdout:
            written += line == "unit\n"
            if written == units:
                break
        time.sleep(delay)
        self.process.kill()
        return written

    def wait(self) -> int:
        """Wait for the end of the process; return its exit status."""
        return self.process.wait()

    def words(self) -> str:
        """All that the process has written to stderr."""
        return self.errors.read_text()

    def finish(self) -> dict[str, Any]:
        """Wait for the run, which must succeed; return the fields of its `Embedded`."""
        output, _ = self.process.communicate()
        assert self.process.returncode == 0, self.words()
        result = json.loads(output.splitlines()[-1].removeprefix("done "))
        assert isinstance(result, dict)
        return result


def await_end(runs: Sequence[Run]) -> list[str]:
    """Wait until no process that runs started is left; kill those that do not end, and return their command lines."""
    marks, deadline = [run.mark for run in runs], time.monotonic() + ENDING_SECONDS
    while (left := _processes(marks)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for number in left:
        os.kill(number, signal.SIGKILL)
    return list(left.values())


def _processes(marks: Sequence[str]) -> dict[int, str]:
    """The command lines of the processes whose environment holds a mark, by their numbers."""
    wanted, processes = [f"{MARK}={mark}".encode() for mark in marks], dict[int, str]()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and set(wanted) & set((entry / "environ").read_bytes().split(b"\0")):
                processes[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended
            continue
    return processes


def kill_and_finish(
    source: Path, out: Path, kills: int, seed: int, least: int | None = None, **options: Any
) -> dict[str, Any]:
    """Kill runs, each a moment after one to three new units, and start the next at once; return the result of the last.

    Their processes must end by themselves. `options` are of `Run`. With `least`, fewer kills will do, because actors of
    killed runs write units for a while, and none may be left.
    """
    rng, runs = random.Random(seed), list[Run]()
    for _ in range(kills):
        run = Run(source, out, **options)
        wanted = rng.randint(1, 3)
        if run.kill_after(wanted, rng.random() / 20) != wanted:
            assert least is not None and len(runs) >= least, run.words()
            break
        runs.append(run)
    result = Run(source, out, **options).finish()
    assert [run.wait() for run in runs] == [-signal.SIGKILL] * len(runs)
    assert await_end(runs) == []
    return result


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of a collection by name, without its manifest, which names the sources."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "manifest.json")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def check_ids(folder: Path, source: Path, broken: dict[str, str]) -> None:
    """Check that each image's id is there once: in the errors if it is broken, else in the shards."""
    ids = pq.read_table(folder / "embeddings", columns=["id"])["id"].to_pylist()
    errors = pq.read_table(folder / "errors").to_pydict()
    names = {str(file.relative_to(source)) for file in source.rglob("*.png")}
    assert len(ids) == len(set(ids)) and set(ids) == names - set(broken)
    assert errors["id"] == sorted(broken)
    for name, reason in zip(errors["id"], errors["reason"], strict=True):
        assert broken[name] in reason
