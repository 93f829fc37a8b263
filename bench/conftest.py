"""`--deadline` and `--rows`: a long run of benchmarks that ends in time, keeps what it measured and goes on with it."""

import time
from pathlib import Path

import pytest
import torch

from rows import MORE, begin, read_csv, unfinished

START = time.monotonic()
# What a run that may be cut short measures first.
BATCHES, TOWERS = (256, 1, 64, 8), ("B-16", "L-14", "B-32", "L-14-336", "SO400M-14-384")
LATE = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--deadline", type=float, metavar="SECONDS", help="skip what has not begun by then, exit with 75")
    parser.addoption("--rows", metavar="FILE.csv", help="append one row for each operation that it does not have yet")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[LATE] = 0
    if config.getoption("--rows"):
        done = _done(Path(config.getoption("--rows")))
        config.hook.pytest_deselected(items=[item for item in items if _names(item) in done])
        items[:] = [item for item in items if _names(item) not in done]
    if config.getoption("--deadline") is not None:
        items.sort(key=_urgency)
    if config.getoption("--rows"):
        begun = unfinished(Path(config.getoption("--rows")))
        items.sort(key=lambda item: item.nodeid in begun)


def pytest_runtest_setup(item: pytest.Item) -> None:
    deadline = item.config.getoption("--deadline")
    if deadline is not None and time.monotonic() - START > deadline:
        item.config.stash[LATE] += 1
        pytest.skip(f"not begun within {deadline:.0f} s")
    if item.config.getoption("--rows"):
        begin(Path(item.config.getoption("--rows")), item.nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the device is lost: {error}", returncode=MORE)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.exitstatus == pytest.ExitCode.OK and session.config.stash.get(LATE, 0):
        session.exitstatus = MORE
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


def _urgency(item: pytest.Item) -> tuple[bool, int, int]:
    """Large batches first and small ones next, the usual tower first, and last what a compiler takes seconds for,
    but for the formulas as published, which targets are about."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    batch, tower = params.get("batch"), params.get("shape")
    slow = params.get("variant") == "compiled"
    return slow, *(order.index(value) if value in order else -1 for order, value in ((BATCHES, batch), (TOWERS, tower)))
