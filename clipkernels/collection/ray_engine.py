"""The Ray engine: units as the items of a Ray Data pipeline, whose actors encode them and write their files.

The files are the checkpoint. Ray's own checkpoints drop rows after they are read, which would change the batches and so
the bytes.

An actor may outlive its killed driver for a while, and Ray may encode a unit twice. A file that comes late does no
harm: it replaces one with the same rows, or it belongs to a unit that a shard holds or to a plan that has ended, and
the store ignores and deletes those. The folder may also hold a new collection by then, whose plan has the same number.
So an actor writes only as long as the plan is the file that its driver saw. Between that look and the file's renaming
the plan may change still; a unit of other items or settings is then refused when the store reads it.
"""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn

from clipkernels.collection.encoder import Encoder
from clipkernels.collection.packages import pyarrow, required
from clipkernels.collection.preparation import UnitItems, keys_of
from clipkernels.collection.store.plans import plan_file
from clipkernels.collection.store.units import read_unit_header, write_unit
from clipkernels.messages import first_line

MAX_BLOCKS = 4096
"""Blocks of a pipeline, each of which is a task to schedule."""
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Variables of Ray that are set unless they are set already: no telemetry, no warning about accelerators."""


class UnitEncoder:
    """An actor: it encodes units and writes their files. It returns its errors, because Ray would log and wrap them.

    Args:
        items: the batches by key.
        plan: the stamp of the plan's file (`plan_stamp`).
        model: a reference to the model on the CPU, in eval mode and in its precision.
        device: the kind of device that it runs on.
        options: the other arguments of `Encoder`.
        notes: of a unit's file.
        threads: of torch.
    """

    def __init__(
        self,
        items: UnitItems,
        plan: tuple[int, int],
        model: Any,
        device: str,
        options: dict[str, Any],
        notes: dict[str, str],
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        self.restarted = bool(required("ray", "ray").get_runtime_context().was_current_actor_reconstructed)
        self.items, self.plan, self.notes = items, plan, notes
        self.model, self.device, self.options = model, device, options
        self._encoder: Encoder | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Encode the unit of a batch.

        Returns:
            Lists of one item: the unit, its rows, those without an embedding, captions that were cut, the pickled
            exception if there was one, else no bytes, and true if the actor died before, and encoded nothing now.
        """
        failed, cut, error = 0, 0, b""
        [unit], [rows] = batch["unit"].tolist(), batch["rows"].tolist()
        try:
            if not self.restarted:  # else Ray would start an actor that always dies again for ever
                failed, cut = self._encode(unit, rows)
        except Exception as exception:
            error = _pickled(exception)
        result = {"unit": unit, "rows": rows, "failed": failed, "cut": cut, "error": error, "died": self.restarted}
        return {name: [value] for name, value in result.items()}

    def _encode(self, unit: int, rows: int) -> tuple[int, int]:
        if self._encoder is None:
            model = required("ray", "ray").get(self.model).to(self.device)
            self._encoder = Encoder(model, **self.options)
        before = self._encoder.cut_texts
        parts = [self._encoder(self.items[key]) for key in keys_of([(unit, rows)], self._encoder.batch_size)]
        table = pyarrow().concat_tables(parts)
        if plan_stamp(self.items) != self.plan:
            raise ValueError(f"expected {self.items.folder} to have one writer, got a new plan: stop the other run")
        write_unit(self.items.folder, self.items.settings, self.items.generation, unit, table, self.notes)
        return rows - table["reason"].null_count, self._encoder.cut_texts - before


def plan_stamp(items: UnitItems) -> tuple[int, int]:
    """The number and the modification time of the plan's file; a plan that is written again has others.

    Raises:
        OSError: there is no plan any more.
    """
    status = os.stat(plan_file(items.folder, items.generation))
    return status.st_ino, status.st_mtime_ns


def _pickled(error: Exception) -> bytes:
    """An exception without its traceback, or a RuntimeError with its first line if it cannot be pickled."""
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
        return content
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {first_line(error)}"))


def encode_units(
    items: UnitItems,
    model: nn.Module,
    units: Sequence[tuple[int, int]],
    *,
    device: torch.device,
    actors: int,
    threads: int,
    options: dict[str, Any],
    notes: dict[str, str],
    after_unit: Callable[[int, int, int], bool],
) -> None:
    """Encode units on a Ray cluster: the one that RAY_ADDRESS names, or one of this machine that ends with the call.

    Args:
        items, threads, options, notes: as in `UnitEncoder`.
        model, device: the model, in eval mode and in its precision, and its device.
        units: their numbers and rows.
        actors: models at a time.
        after_unit: called with the rows of a unit, those without an embedding, and captions that were cut; returns true
            to stop.
    Raises:
        Exception: the exception of an actor.
        RuntimeError: Ray loses its actors and finishes no unit between.
        ValueError: no machine of the cluster has as many CPUs as an actor has threads.
    """
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    ray = required("ray", "ray")
    data = required("ray.data", "ray")
    started = not ray.is_initialized()
    try:
        if started:
            ray.init(log_to_driver=False, logging_level="CRITICAL", **_cluster(actors * threads))
        _check_threads(ray.nodes(), threads)
        context = data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        arguments = items, plan_stamp(items), ray.put(deepcopy(model).cpu()), device.type, options, notes, threads
        left = dict(units)
        while left:
            before, reason = len(left), "it gave no result"
            try:
                for row in _pipeline(data, left, actors, threads, device, arguments).iter_rows():
                    if row["died"]:  # the next pipeline has new actors
                        reason = "an actor died"
                        break
                    if row["error"]:
                        raise pickle.loads(row["error"])
                    left.pop(int(row["unit"]), None)
                    if after_unit(int(row["rows"]), int(row["failed"]), int(row["cut"])):
                        return
            except ray.exceptions.RayError as error:  # a machine is lost, or its memory is full
                reason = f"{type(error).__name__}: {first_line(error)}"
            for unit, failed in _written_units(items, left):
                if after_unit(left.pop(unit), failed, 0):
                    return
            if len(left) == before:
                raise RuntimeError(f"Ray stopped: {reason}, and no unit was finished since the last time")
    finally:
        if started:
            ray.shutdown()


def _written_units(items: UnitItems, units: Iterable[int]) -> list[tuple[int, int]]:
    """The units whose files are there although their results are lost, with their rows without an embedding."""
    written = []
    for unit in units:
        with suppress(OSError, ValueError):  # not there, in a shard, or not whole: it is encoded again
            header = read_unit_header(items.folder, items.generation, unit)
            if header.settings == items.settings:
                written.append((unit, header.errors))
    return written


def _pipeline(
    data: Any, units: Mapping[int, int], actors: int, threads: int, device: torch.device, arguments: tuple[Any, ...]
) -> Any:
    """A dataset of the results of units."""
    rows = [{"unit": unit, "rows": length} for unit, length in units.items()]
    blocks = data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS))
    # Ray 2.64 is to remove extra arguments; an actor that is started again then says so by itself (UnitEncoder).
    kinds = {parameter.kind for parameter in signature(blocks.map_batches).parameters.values()}
    no_restarts = {"max_restarts": 0} if Parameter.VAR_KEYWORD in kinds else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        return blocks.map_batches(
            UnitEncoder,
            batch_size=1,
            compute=data.ActorPoolStrategy(size=actors),
            num_cpus=threads,
            num_gpus=1 if device.type == "cuda" else 0,
            fn_constructor_args=arguments,
            **no_restarts,
        )


def _cluster(cpus: int) -> dict[str, Any]:
    """The arguments of `ray.init` for the cluster that RAY_ADDRESS names, or for one of this machine.

    Without an address Ray would join any cluster of this machine.
    """
    if os.environ.get("RAY_ADDRESS", "local") != "local":
        return {}
    return {"address": "local", "include_dashboard": False, "num_cpus": cpus}


def _check_threads(nodes: Sequence[dict[str, Any]], threads: int) -> None:
    """Raise ValueError if no machine can hold an actor, because Ray would wait for one without a word."""
    cpus = max((int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]), default=0)
    if 0 < cpus < threads:
        raise ValueError(
            f"expected a machine of Ray with a CPU for each of torch's {threads} threads, got {cpus}: lower "
            "OMP_NUM_THREADS"
        )
