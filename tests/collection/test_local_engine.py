"""The local engine and its batches: how many are in memory, and what several threads share."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("pyarrow")

import pyarrow as pa

from clipkernels.collection import preparation
from clipkernels.collection.local_engine import encode_units
from clipkernels.collection.preparation import Key, Prepared, UnitItems

BATCHES = 24


class CountedItems:
    """Batches of one item. It counts those that are begun, over all processes."""

    def __init__(self) -> None:
        self.begun = multiprocessing.Value("i", 0)

    def __getitem__(self, key: Key) -> Prepared:
        with self.begun.get_lock():
            self.begun.value += 1
        return Prepared(key, [str(key[1])], torch.zeros(1, 3, 2, 2), [None], [{}])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_device_holds_two_batches_and_two_for_each_worker(workers: int) -> None:
    items, ahead = CountedItems(), list[int]()

    def encode(batch: Prepared) -> pa.Table:
        """Wait until the loaders are as far ahead as they may be, and a moment longer."""
        number = len(ahead)
        most = min(number + 2 * workers + 1, BATCHES)
        deadline = time.monotonic() + 60
        while items.begun.value < most and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        ahead.append(items.begun.value - number)
        return pa.table({"id": batch.ids, "reason": pa.nulls(1, pa.string())})

    encoder: Any = encode
    encoder.batch_size, encoder.weights = 1, torch.zeros(1)
    written = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as torch's about more loaders than CPUs
        encode_units(
            items, [encoder], [(0, BATCHES)], workers, lambda unit, table: written.append(len(table)), lambda *_: False
        )  # type: ignore[arg-type, func-returns-value]
    assert written == [BATCHES] and len(ahead) == BATCHES
    # The batch before is freed when the next one is there, so that there is one more for that moment.
    assert max(ahead) == 2 * workers + 1


def test_torch_does_not_warn_of_the_number_of_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    encoder: Any = SimpleNamespace(batch_size=1, weights=torch.zeros(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_units(CountedItems(), [encoder], [], 2, lambda unit, table: None, lambda *_: False)  # type: ignore[arg-type]


def test_threads_that_share_items_have_their_own_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "read_items", lambda folder, generation, unit: f"items of unit {unit}")

    class Interrupted(UnitItems):
        """Another thread reads unit 1 just after this one has read unit 0."""

        @property
        def _unit(self) -> Any:
            return self.__dict__["last"]

        @_unit.setter
        def _unit(self, last: Any) -> None:
            self.__dict__["last"] = last
            if last is not None and last[0] == 0:
                other = Thread(target=self._items_of, args=(1,))
                other.start()
                other.join()

    items = Interrupted(Path(), "0" * 64, 1, [], [], lambda image: torch.zeros(3, 2, 2), (3, 2, 2), True)
    assert items._items_of(0) == "items of unit 0"
    assert items._items_of(1) == "items of unit 1"
