"""`--deadline` and `--rows` for bench/ops.py: a long run ends in time, keeps its rows, and resumes from them."""

import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench.result_files import EXIT_DEADLINE, MAX_ATTEMPTS, attempts, note_attempt, read_csv

START = time.monotonic()
# The order of a run that may be interrupted, and the batches and towers of the targets.
BATCHES, TOWERS = (256, 1, 64, 8), ("B-16", "L-14-336", "L-14", "B-32", "SO400M-14-384")
FIRST_BATCHES, FIRST_TOWERS = BATCHES[:2], TOWERS[:2]
NUM_LATE, NUM_GIVEN_UP = pytest.StashKey[int](), pytest.StashKey[int]()
ATTEMPTS = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--deadline", type=float, metavar="SECONDS", help="skip cases not started by then; exit status 75")
    parser.addoption("--rows", metavar="FILE.csv", help="append a row for each case that the file lacks")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[NUM_LATE], config.stash[NUM_GIVEN_UP], config.stash[ATTEMPTS] = 0, 0, Counter()
    if config.getoption("--rows"):
        done = _done(Path(config.getoption("--rows")))
        config.hook.pytest_deselected(items=[item for item in items if _row_key(item) in done])
        items[:] = [item for item in items if _row_key(item) not in done]
    if config.getoption("--deadline") is not None:
        items.sort(key=_urgency)
    if config.getoption("--rows"):
        config.stash[ATTEMPTS] = attempts(Path(config.getoption("--rows")))
        items.sort(key=lambda item: config.stash[ATTEMPTS][item.nodeid])


def pytest_runtest_setup(item: pytest.Item) -> None:
    deadline, stash = item.config.getoption("--deadline"), item.config.stash
    if stash[ATTEMPTS][item.nodeid] >= MAX_ATTEMPTS:
        stash[NUM_GIVEN_UP] += 1
        pytest.skip(f"started {stash[ATTEMPTS][item.nodeid]} times, never measured")
    if deadline is not None and time.monotonic() - START > deadline:
        stash[NUM_LATE] += 1
        pytest.skip(f"not started within {deadline:.0f} s")
    if item.config.getoption("--rows"):
        note_attempt(Path(item.config.getoption("--rows")), item.nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the device is lost: {error}", returncode=EXIT_DEADLINE)


def pytest_sessionfinish(session: pytest.Session) -> None:
    ended = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)  # a failed case is attempted once more, then given up
    if session.exitstatus in ended and session.config.stash.get(NUM_LATE, 0):
        session.exitstatus = EXIT_DEADLINE
    elif session.exitstatus == pytest.ExitCode.OK and session.config.stash.get(NUM_GIVEN_UP, 0):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.getoption("--rows"):
        session.exitstatus = pytest.ExitCode.OK  # all rows exist already


def _done(rows: Path) -> set[tuple[str, ...]]:
    """Return the keys of the rows in a file: op, variant, tower, batch and dtype."""
    return {tuple(row[key] for key in ("op", "variant", "tower", "batch", "dtype")) for row in read_csv(rows)}


def _row_key(item: pytest.Item) -> tuple[str, ...] | None:
    """Return the key of the row that a benchmark writes, or None if it is not of an operation."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if "op" not in params:
        return None
    dtype = str(params["dtype"]).removeprefix("torch.")
    return params["op"], params["variant"], params["shape"], str(params["batch"]), dtype


def _urgency(item: pytest.Item) -> tuple[bool, bool, int, int]:
    """Return the sort key of a benchmark: targets first, slow compilations last; large batches and B-16 first.

    Among plain references only matching belongs to a target; among compiled forms only published formulas do.
    """
    params = item.callspec.params if hasattr(item, "callspec") else {}
    op, variant, batch, tower = (params.get(name) for name in ("op", "variant", "batch", "shape"))
    slow = variant in ("compiled", "topk_compiled")
    plain = variant == "reference" and op != "match_tokens"
    first = tower in FIRST_TOWERS and batch in FIRST_BATCHES and not plain
    places = (order.index(value) if value in order else -1 for order, value in ((BATCHES, batch), (TOWERS, tower)))
    return slow, not first, *places
