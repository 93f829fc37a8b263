"""Environments of the processes that tests start."""

from __future__ import annotations

from collections.abc import Mapping


def without_xdist(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without pytest-xdist's variables, because pytest-benchmark times nothing in its workers."""
    return {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
