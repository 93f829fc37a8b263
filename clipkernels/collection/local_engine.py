"""The local engine: loader processes that decode, and one model per device."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock, Thread
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Sampler

from clipkernels.collection.encoder import Encoder
from clipkernels.collection.packages import pyarrow
from clipkernels.collection.preparation import Key, UnitItems, keys_of

if TYPE_CHECKING:
    import pyarrow as pa

SECONDS_BETWEEN_LOOKS = 1.0
"""The time after which a loader process looks again whether its parent lives."""


class _Keys(Sampler[Key]):
    """The keys of batches, as units are taken from an iterator that several loaders share."""

    def __init__(self, units: Iterator[tuple[int, int]], batch_size: int) -> None:
        self.units, self.batch_size = units, batch_size

    def __iter__(self) -> Iterator[Key]:
        return keys_of(self.units, self.batch_size)


class _Shared(Iterator[tuple[int, int]]):
    """An iterator that several threads share."""

    def __init__(self, units: Iterable[tuple[int, int]]) -> None:
        self.units, self.lock = iter(units), Lock()

    def __next__(self) -> tuple[int, int]:
        with self.lock:
            return next(self.units)


def encode_units(
    items: UnitItems,
    encoders: Sequence[Encoder],
    units: Sequence[tuple[int, int]],
    workers: int,
    write: Callable[[int, pa.Table], None],
    after_batch: Callable[[int, int], bool],
) -> None:
    """Encode units and write each as it is complete. At most 2·workers + 2 batches per encoder are in memory.

    Args:
        items: the batches by key.
        encoders: one per device. Each takes the next unit that none has taken.
        units: their numbers and rows.
        workers: loader processes of each encoder; 0 decodes in this process.
        write: called with a unit and its rows.
        after_batch: called with the items of a batch and those without an embedding; returns true to stop.
    """
    shared, lock = _Shared(units), Lock()
    lengths = dict(units)
    stopped = False

    def run(encoder: Encoder) -> None:
        nonlocal stopped
        try:
            encode(encoder)
        except BaseException:
            stopped = True  # the other devices
            raise

    def encode(encoder: Encoder) -> None:
        nonlocal stopped
        loader = DataLoader(
            items,
            batch_size=None,  # a key already names a batch
            sampler=_Keys(shared, encoder.batch_size),
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            worker_init_fn=partial(_start_worker, os.getpid()),
            generator=torch.Generator(),  # a loader draws a seed, which must not move the caller's generator
            pin_memory=encoder.weights.device.type == "cuda",
        )
        parts: list[pa.Table] = []
        for batch in loader:
            rows = encoder(batch)
            parts.append(rows)
            unit, _, stop = batch.key
            with lock:
                if stop == lengths[unit]:
                    write(unit, pyarrow().concat_tables(parts))
                    parts.clear()
                stopped = after_batch(len(rows), len(rows) - rows["reason"].null_count) or stopped
            if stopped:
                return

    if len(encoders) == 1:
        run(encoders[0])
        return
    with ThreadPoolExecutor(len(encoders)) as pool:
        try:
            for future in [pool.submit(run, encoder) for encoder in encoders]:
                future.result()
        finally:  # an interruption of the thread that waits
            stopped = True


def _start_worker(parent: int, worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which may reach all of a group, to the process that writes, and end with that one.

    A loader process that torch has started notices a killed parent too, but then waits until a batch has gone through a
    full pipe that nobody reads.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)
