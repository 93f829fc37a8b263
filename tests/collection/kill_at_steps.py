"""Kill a run before every single change of a file, go on, and compare the result with an uninterrupted run.

    python -m tests.collection.kill_at_steps FOLDER [STRIDE]

With a stride above 1, only every STRIDE-th change is tried. Each run is a forked child, so that the packages are
imported once. It prints the number of kills.
"""

from __future__ import annotations

import builtins
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.collection.collections import embedded, expected, failed, listing, open_store, run, tables

FIRST = {f"{index:02d}{'?' if index % 3 == 0 else ''}": index // 2 for index in range(23)}
SECOND = {name: time + (index % 4 == 1) for index, (name, time) in enumerate(FIRST.items()) if index % 7 != 2}
SECOND |= {f"new{index:02d}{'?' if index % 2 else ''}": index for index in range(9)}


def kill_before(step: int, folder: Path) -> Callable[[], int]:
    """Let the process kill itself before its `step`-th opening, replacing or removal of a file below a folder."""
    count = 0

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *args: Any, **keywords: Any) -> Any:
            nonlocal count
            if not isinstance(path, int) and os.fspath(path).startswith(str(folder)):
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(path, *args, **keywords)

        return wrapped

    for module, names in ((os, ("replace", "unlink", "open", "mkdir")), (builtins, ("open",))):
        for name in names:
            setattr(module, name, wrap(getattr(module, name)))
    return lambda: count


def in_child(work: Callable[[], object]) -> int:
    """Run a function in a forked child; return its exit status, -9 if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check_readers(folder: Path, names: set[str]) -> None:
    """An id is in one shard at most, and not among the errors too."""
    good, bad = embedded(folder), failed(folder)
    assert not good.keys() & bad.keys()
    assert {*good, *bad} <= names


def is_finished(folder: Path, items: dict[str, int]) -> bool:
    """True if no plan is left and the rows are those of a listing."""
    return not [*folder.glob("plans/*.parquet")] and (embedded(folder), failed(folder)) == expected(items)


def killed_run(folder: Path, step: int, items: dict[str, int], seed: int, **options: Any) -> bool:
    """Embed a listing until its `step`-th change of a file; True if it was killed there."""

    def work() -> None:
        kill_before(step, folder)
        run(folder, items, seed, **options)

    status = in_child(work)
    assert status in (0, -signal.SIGKILL), status
    check_readers(folder, {*FIRST, *SECOND})
    return status != 0


def kill_everywhere(
    root: Path, before: dict[str, int] | None, items: dict[str, int], stride: int, **options: Any
) -> int:
    """Kill the run of a listing at each step in turn, each time from the same state; then run it again.

    Returns:
        The number of kills.
    """
    start, whole, folder = root / "start", root / "whole", root / "killed"
    start.mkdir(parents=True)
    if before is not None:
        run(start, before)
    shutil.copytree(start, whole)
    run(whole, items, seed=1, **options)
    uninterrupted = tables(whole)
    kept = dict(items) if options.get("prune") or before is None else {**before, **items}
    assert (embedded(whole), failed(whole)) == expected(kept)
    kills = 0
    for step in range(1, 10_000, stride):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        killed = killed_run(folder, step, items, seed=step, **options)
        if not killed:
            break
        kills += 1
        if is_finished(folder, kept):  # nothing is left but files of units, and the errors would be tried once more
            options = {**options, "retry": False}
        run(folder, items, seed=-step, **options)
        assert tables(folder) == uninterrupted, f"step {step}"
    return kills


def kill_often(root: Path, rounds: int) -> int:
    """Kill a run at random steps until it gets to its end; its listing is the second while a first plan is there."""
    whole, kills = root / "whole", 0
    run(whole, FIRST)
    run(whole, SECOND, prune=True, retry=True)
    for number in range(rounds):
        folder, order = root / f"{number}", random.Random(number)
        with open_store(folder) as store:
            assert store.plan(listing(FIRST)).generation == 1
        steps = order.randint(5, 60)
        while killed_run(
            folder, steps, SECOND, order.randint(0, 99), prune=True, retry=not is_finished(folder, SECOND)
        ):
            kills, steps = kills + 1, steps + order.randint(0, 40)
        assert tables(folder) == tables(whole), f"round {number}"
    return kills


def main(root: Path, stride: int) -> None:
    os.fsync = lambda number: None  # a killed process loses no written data; without this, the disk takes all the time
    kills = [
        kill_everywhere(root / "first", None, FIRST, stride),
        kill_everywhere(root / "second", FIRST, SECOND, stride, prune=True, retry=True),
        kill_everywhere(root / "kept", FIRST, SECOND, stride),
        kill_often(root / "often", 8 if stride == 1 else 1),
    ]
    print(*kills)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
