"""`--deadline` and `--rows`: a long run of benchmarks that ends in time, and has written what it measured by then."""

import time

import pytest

START = time.monotonic()
# What a run that may be cut short measures first.
BATCHES, TOWERS = (256, 1, 64, 8), ("B-16", "L-14", "B-32", "L-14-336")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--deadline", type=float, metavar="SECONDS", help="skip what has not begun by then")
    parser.addoption("--rows", metavar="FILE.csv", help="append one row for each operation, as it is measured")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--deadline") is not None:
        items.sort(key=_urgency)


def pytest_runtest_setup(item: pytest.Item) -> None:
    deadline = item.config.getoption("--deadline")
    if deadline is not None and time.monotonic() - START > deadline:
        pytest.skip(f"not begun within {deadline:.0f} s")


def _urgency(item: pytest.Item) -> tuple[bool, int, int]:
    """Large batches first and small ones next, the usual tower first, and compiling small batches last."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    batch, tower = params.get("batch"), params.get("shape")
    slow = params.get("variant") == "compiled" and batch != BATCHES[0]
    return slow, *(order.index(value) if value in order else -1 for order, value in ((BATCHES, batch), (TOWERS, tower)))
