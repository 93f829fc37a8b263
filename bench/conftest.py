"""`--deadline`: a long run of benchmarks that ends in time, with what it has."""

import time

import pytest

START = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--deadline", type=float, metavar="SECONDS", help="skip what has not begun by then")


def pytest_runtest_setup(item: pytest.Item) -> None:
    deadline = item.config.getoption("--deadline")
    if deadline is not None and time.monotonic() - START > deadline:
        pytest.skip(f"not begun within {deadline:.0f} s")
