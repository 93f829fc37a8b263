"""Packages that an export needs, imported when they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def required(name: str) -> Any:
    """A package by name.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        expected = f"expected {name} to be installed (pip install {name})"
        raise ImportError(f"{expected}, got: {error}", name=error.name) from error
