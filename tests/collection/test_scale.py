"""A million items through a model that costs nothing: memory and time do not grow with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MANY, FEW, ADDED = 1_000_000, 10_000, 50


def embed(out: Path, items: int, workers: int) -> dict[str, Any]:
    """Embed synthetic items in a process of its own; return its figures (`synthetic.main`)."""
    command = [sys.executable, "-m", "tests.collection.synthetic", str(out), str(items), str(workers)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    figures = json.loads(process.stdout)
    print(items, workers, figures)
    assert isinstance(figures, dict)
    return figures


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_and_start_at_a_million_items(workers: int, tmp_path: Path) -> None:
    few = embed(tmp_path / "few", FEW, workers)
    many = embed(tmp_path / "many", MANY, workers)
    assert many["embeddings"] + many["errors"] == MANY
    assert many["peak"] - few["peak"] < 200e6
    assert many["workers_peak"] - few["workers_peak"] < 200e6
    again = embed(tmp_path / "many", MANY + ADDED, workers)
    assert again["encoded"] + again["errors"] == ADDED
    assert again["embeddings"] + again["all_errors"] == MANY + ADDED
    assert again["seconds_to_first_unit"] < 5
    assert again["peak"] - few["peak"] < 200e6
