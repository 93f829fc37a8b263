"""The engines of a run: pending units are encoded in this process or on a Ray cluster, and compacted on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from clipkernels.collection import local_engine, ray_engine
from clipkernels.collection.encoder import Encoder
from clipkernels.collection.preparation import UnitItems
from clipkernels.collection.store import Store
from clipkernels.collection.store.units import write_unit
from clipkernels.encode import tower_weight

if TYPE_CHECKING:
    import pyarrow as pa


class Progress(NamedTuple):
    """The items of a run that are done, all of its items, and the items without an embedding so far."""

    done: int
    total: int
    errors: int


class Run:
    """The units of a run, encoded by an engine, and how far they are.

    Args:
        store: the collection.
        model: the model.
        encoder: the arguments of `Encoder` besides the model.
        notes: of each unit's file.
        progress: as in `embed`.
    """

    def __init__(
        self,
        store: Store,
        model: nn.Module,
        encoder: dict[str, Any],
        notes: dict[str, Any],
        progress: Callable[[Progress], bool | None] | None,
    ) -> None:
        self.store, self.model, self.encoder, self.progress = store, model, encoder, progress
        self.notes = {key: str(value) for key, value in notes.items()}
        self.done = self.errors = self.total = self.cut_texts = self._finished = 0
        self.stopped = False

    def locally(self, items: UnitItems, workers: int, devices: Sequence[torch.device | str] | None) -> None:
        """Encode the pending units in this process."""
        models = [self.model]
        if devices is not None:
            models = [deepcopy(self.model).to(device) for device in devices]
        encoders = [Encoder(model, **self.encoder) for model in models]

        def write(unit: int, table: pa.Table) -> None:
            write_unit(items.folder, items.settings, items.generation, unit, table, self.notes)
            self._after_unit()

        local_engine.encode_units(items, encoders, self._pending(), workers, write, self._after_batch)
        self.cut_texts += sum(encoder.cut_texts for encoder in encoders)
        self.store.compact(final=True)

    def with_ray(self, items: UnitItems, actors: int) -> None:
        """Encode the pending units on a Ray cluster."""

        def after_unit(rows: int, errors: int, cut_texts: int) -> bool:
            self.cut_texts += cut_texts
            self._after_unit()
            return self._after_batch(rows, errors)

        ray_engine.encode_units(
            items, self.model, self._pending(), device=tower_weight(self.model).device, actors=actors,
            threads=torch.get_num_threads(), options=self.encoder, notes=self.notes, after_unit=after_unit,
        )  # fmt: skip
        self.store.compact(final=True)

    def _pending(self) -> list[tuple[int, int]]:
        rows = self.store.unit_lengths()
        units = [(unit, rows[unit]) for unit in self.store.pending()]
        self.total += sum(length for _, length in units)
        return units

    def _after_unit(self) -> None:
        """Compact when the finished units may complete a shard."""
        self._finished += 1
        if self._finished * self.store.unit_rows >= self.store.shard_rows:
            self._finished = 0
            self.store.compact(final=False)

    def _after_batch(self, rows: int, errors: int) -> bool:
        self.done += rows
        self.errors += errors
        if self.progress is not None and self.progress(Progress(self.done, self.total, self.errors)):
            self.stopped = True
        return self.stopped
