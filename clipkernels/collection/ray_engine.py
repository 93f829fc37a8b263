"""The Ray engine: units as the items of a Ray Data pipeline, whose actors encode them and write their files.

The files are the checkpoint. Ray's own checkpoints drop rows after they are read, which would change the batches and so
the bytes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from clipkernels.collection.encoder import Encoder
from clipkernels.collection.packages import pyarrow, required
from clipkernels.collection.preparation import UnitItems, keys_of
from clipkernels.collection.units import write_unit

MAX_BLOCKS = 4096
"""Blocks of a pipeline, each of which is a task to schedule."""


class UnitEncoder:
    """An actor: it encodes units and writes their files.

    Args:
        items: the batches by key.
        model: a reference to the model, in eval mode and in its precision.
        device: the device that it runs on.
        options: the other arguments of `Encoder`.
        notes: of a unit's file.
        threads: of torch.
    """

    def __init__(
        self,
        items: UnitItems,
        model: Any,
        device: str,
        options: dict[str, Any],
        notes: dict[str, str],
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        self.items, self.notes = items, notes
        self.encoder = Encoder(required("ray", "ray").get(model).to(device), **options)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Encode the units of a block; return their numbers, rows and rows without an embedding."""
        pa, failed = pyarrow(), []
        for unit, rows in zip(batch["unit"].tolist(), batch["rows"].tolist(), strict=True):
            parts = [self.encoder(self.items[key]) for key in keys_of([(unit, rows)], self.encoder.batch_size)]
            table = pa.concat_tables(parts)
            write_unit(self.items.folder, self.items.generation, unit, table, self.notes)
            failed.append(rows - table["reason"].null_count)
        return {"unit": batch["unit"], "rows": batch["rows"], "failed": failed}


def encode_units(
    items: UnitItems,
    model: nn.Module,
    units: Sequence[tuple[int, int]],
    *,
    device: str,
    actors: int,
    threads: int,
    options: dict[str, Any],
    notes: dict[str, str],
    after_unit: Callable[[int, int], bool],
) -> None:
    """Encode units on a Ray cluster: the one that RAY_ADDRESS names, or one of this machine that ends with the call.

    Args:
        items, model, device, threads, options, notes: as in `UnitEncoder`.
        units: their numbers and rows.
        actors: models at a time.
        after_unit: called with the rows of a unit and those without an embedding; returns true to stop.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray = required("ray", "ray")
    data = required("ray.data", "ray")
    local = not os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {"include_dashboard": False, "num_cpus": max(actors * threads, 1)} if local else {}
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, logging_level="ERROR", **own)
    try:
        context = data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = [{"unit": unit, "rows": length} for unit, length in units]
        blocks = data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS))
        finished = blocks.map_batches(
            UnitEncoder,
            batch_size=1,
            compute=data.ActorPoolStrategy(size=actors),
            num_cpus=threads,
            num_gpus=1 if device.startswith("cuda") else 0,
            fn_constructor_args=(items, ray.put(model), device, options, notes, threads),
        )
        for row in finished.iter_rows():
            if after_unit(int(row["rows"]), int(row["failed"])):
                return
    finally:
        if started:
            ray.shutdown()
