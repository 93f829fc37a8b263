"""Packages of the extras, imported when they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def pyarrow() -> Any:
    """The package pyarrow, with its modules for Parquet and computing.

    Raises:
        ImportError: it is not installed.
    """
    package = required("pyarrow", "embed")
    required("pyarrow.parquet", "embed")
    required("pyarrow.compute", "embed")
    return package


def required(name: str, extra: str) -> Any:
    """A module by name.

    Raises:
        ImportError: it is not installed; the message names the extra that brings it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        expected = f"expected {package} to be installed (pip install 'clipkernels[{extra}]')"
        raise ImportError(f"{expected}, got: {error}", name=error.name) from error
