"""The modules of the runtimes, and the operators that the graph of a reduced tower may not have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib import import_module
from typing import Any

RUNTIMES = ("onnx", "openvino", "pt2")
SLOW = {
    "scatter": ("scatter", "index_put"),
    "nonzero": ("nonzero",),
    "loop": ("loop", "scan", "tensoriterator"),
    "if": ("if",),
}
"""Operators that are slow or make shapes depend on data, by the beginning of their names in lower case."""


def graphs_of(runtime: str) -> Any:
    """The module that writes and loads the graphs of a runtime."""
    return import_module(f"clipkernels.exporting.{runtime}")


def count_slow(operators: Counter[str]) -> dict[str, int]:
    """The number of nodes of a graph, and of those that are slow, by kind."""

    def is_kind(name: str, starts: tuple[str, ...]) -> bool:
        name = name.lower()
        return name in starts if starts == SLOW["if"] else name.startswith(starts)

    counts = {
        kind: sum(count for name, count in operators.items() if is_kind(name, starts)) for kind, starts in SLOW.items()
    }
    return {"nodes": operators.total(), **counts}


def check_slow(nodes: Mapping[str, int], method: str) -> None:
    """Raise ValueError if the graph of a reduced tower has nodes that are slow."""
    bad = [f"{nodes[kind]} {kind}" for kind in SLOW if nodes[kind]]
    if bad:
        raise ValueError(f"expected a graph of {method} without scatter, nonzero, loop and if, got {', '.join(bad)}")
