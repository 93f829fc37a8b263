"""The local engine: loader processes that decode, and one model per device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING

from torch.utils.data import Sampler

from clipkernels.collection.encoder import Encoder
from clipkernels.collection.packages import pyarrow
from clipkernels.collection.preparation import Key, Prepared, UnitItems, keys_of
from clipkernels.images.loaders import Loader

if TYPE_CHECKING:
    import pyarrow as pa


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

    def load(encoder: Encoder) -> Iterator[Prepared]:
        loader: Loader[Prepared] = Loader(
            items,
            workers,
            batch_size=None,  # a key already names a batch
            sampler=_Keys(shared, encoder.batch_size),
            pin_memory=encoder.weights.device.type == "cuda",
        )
        return iter(loader)

    def run(encoder: Encoder, batches: Iterator[Prepared]) -> None:
        nonlocal stopped
        try:
            encode(encoder, batches)
        except BaseException:
            stopped = True  # the other devices
            raise

    def encode(encoder: Encoder, batches: Iterator[Prepared]) -> None:
        nonlocal stopped
        parts: list[pa.Table] = []
        for batch in batches:
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

    # The processes of all loaders start before a thread does: one that is forked beside busy threads may die at once.
    batches = [load(encoder) for encoder in encoders]
    if len(encoders) == 1:
        run(encoders[0], batches[0])
        return
    with ThreadPoolExecutor(len(encoders)) as pool:
        try:
            for future in [pool.submit(run, *pair) for pair in zip(encoders, batches, strict=True)]:
                future.result()
        finally:  # an interruption of the thread that waits
            stopped = True
