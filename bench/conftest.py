"""`--deadline` and `--rows`: a long run of benchmarks that ends in time, keeps what it measured and goes on with it."""

import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench.result_files import EXIT_DEADLINE, TRIES, attempts, note_attempt, read_csv

START = time.monotonic()
# The order of a run that may be cut short, and the part of it that the targets are about.
BATCHES, TOWERS = (256, 1, 64, 8), ("B-16", "L-14-336", "L-14", "B-32", "SO400M-14-384")
FIRST_BATCHES, FIRST_TOWERS = BATCHES[:2], TOWERS[:2]
LATE, GIVEN_UP = pytest.StashKey[int](), pytest.StashKey[int]()
TRIED = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--deadline", type=float, metavar="SECONDS", help="skip what has not begun by then, exit with 75")
    parser.addoption("--rows", metavar="FILE.csv", help="append one row for each operation that it does not have yet")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[LATE], config.stash[GIVEN_UP], config.stash[TRIED] = 0, 0, Counter()
    if config.getoption("--rows"):
        done = _done(Path(config.getoption("--rows")))
        config.hook.pytest_deselected(items=[item for item in items if _names(item) in done])
        items[:] = [item for item in items if _names(item) not in done]
    if config.getoption("--deadline") is not None:
        items.sort(key=_urgency)
    if config.getoption("--rows"):
        config.stash[TRIED] = attempts(Path(config.getoption("--rows")))
        items.sort(key=lambda item: config.stash[TRIED][item.nodeid])


def pytest_runtest_setup(item: pytest.Item) -> None:
    deadline, stash = item.config.getoption("--deadline"), item.config.stash
    if stash[TRIED][item.nodeid] >= TRIES:
        stash[GIVEN_UP] += 1
        pytest.skip(f"begun {stash[TRIED][item.nodeid]} times, never measured")
    if deadline is not None and time.monotonic() - START > deadline:
        stash[LATE] += 1
        pytest.skip(f"not begun within {deadline:.0f} s")
    if item.config.getoption("--rows"):
        note_attempt(Path(item.config.getoption("--rows")), item.nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the device is lost: {error}", returncode=EXIT_DEADLINE)


def pytest_sessionfinish(session: pytest.Session) -> None:
    ended = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)  # what failed is tried once more, then given up
    if session.exitstatus in ended and session.config.stash.get(LATE, 0):
        session.exitstatus = EXIT_DEADLINE
    elif session.exitstatus == pytest.ExitCode.OK and session.config.stash.get(GIVEN_UP, 0):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.getoption("--rows"):
        session.exitstatus = pytest.ExitCode.OK  # all were there


def _done(rows: Path) -> set[tuple[str, ...]]:
    """What a file has rows of."""
    return {tuple(row[key] for key in ("op", "variant", "tower", "batch", "dtype")) for row in read_csv(rows)}


def _names(item: pytest.Item) -> tuple[str, ...] | None:
    """What a benchmark of an operation calls its row."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if "op" not in params:
        return None
    dtype = str(params["dtype"]).removeprefix("torch.")
    return params["op"], params["variant"], params["shape"], str(params["batch"]), dtype


def _urgency(item: pytest.Item) -> tuple[bool, bool, int, int]:
    """The key that sorts benchmarks: those of the targets first, those that take a compiler seconds last, and large
    batches of the usual tower before the rest.

    Of the plain references a target is about matching alone; of what is compiled, about published formulas.
    """
    params = item.callspec.params if hasattr(item, "callspec") else {}
    op, variant, batch, tower = (params.get(name) for name in ("op", "variant", "batch", "shape"))
    slow = variant in ("compiled", "topk_compiled")
    plain = variant == "reference" and op != "match_tokens"
    first = tower in FIRST_TOWERS and batch in FIRST_BATCHES and not plain
    places = (order.index(value) if value in order else -1 for order, value in ((BATCHES, batch), (TOWERS, tower)))
    return slow, not first, *places
