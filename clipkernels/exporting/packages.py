"""Packages that an export needs, and the error of one that is not installed."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from clipkernels.messages import list_names

INSTALL = "pip install 'clipkernels[export]'"


def needed(*names: str) -> list[Any]:
    """The modules of packages.

    Raises:
        ImportError: packages that are not installed, all of them in one line.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ImportError(f"expected {list_names(names)} for this export, got no {list_names(missing)}: {INSTALL}")
    return [import_module(name) for name in names]
