"""Speed and GMACs of the methods of an evaluation, paired, on images of one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clipkernels.encode import tower_weight
from clipkernels.evaluation.features import key_of
from clipkernels.evaluation.plan import Model
from clipkernels.evaluation.results import Progress
from clipkernels.evaluation.run import Stopped
from clipkernels.evaluation.state import MAX_BYTES, SPEED_FORMAT, SpeedRecord
from clipkernels.measure.timing import tabulate, time_variants, vary
from clipkernels.methods import Method
from clipkernels.patching import tower_of
from clipkernels.state_files import read_json, write_json


class Speed(NamedTuple):
    """GMACs of an image as executed, images/s, and speed-up and η over the fastest dense tower."""

    gmacs: float
    images_per_second: float
    speedup: float
    efficiency: float


def measure_speeds(
    model: Model,
    methods: Mapping[str, Method | None],
    images: Tensor,
    rounds: int,
    folder: Path,
    progress: Callable[[Progress], bool],
) -> dict[str, Speed] | None:
    """The speed of every method on this device, from the folder if an earlier run measured it; None if it is stopped.

    Args:
        model: the model, unpatched.
        methods: methods by name, a dense one among them.
        images: (B,3,S,S) preprocessed; they are moved to the model.
        rounds: timed runs of each method.
        folder: the folder of the state.
        progress: called after every forward; a true result stops.
    """
    tower, images = tower_of(model.model), images.to(tower_weight(model.model))
    names = {name: repr(method) for name, method in methods.items()}
    key = key_of(names, list(images.shape), rounds, str(images.device), torch.get_num_threads())
    file = folder / f"speed-{key}.json"
    if not file.exists():
        variants = vary(model.model, methods)
        forwards, total = count(1), (rounds + 1) * len(methods)

        def advance() -> None:
            if progress(Progress("timing", next(forwards), total, 0, "forward")):
                raise Stopped

        try:
            times = time_variants(variants, [images], rounds, progress=advance)
        except Stopped:
            return None
        table = tabulate(times, variants, tower, len(images))
        speeds = {
            row.name: (row.gmacs_run, row.images_per_second, row.speedup.median, row.efficiency.median) for row in table
        }
        write_json(file, SPEED_FORMAT, SpeedRecord(methods=speeds), MAX_BYTES)
    record = read_json(file, SPEED_FORMAT, MAX_BYTES)
    return {name: Speed(*values) for name, values in record.methods.items()}


def noise_batch(model: Model) -> Tensor:
    """A batch of random images."""
    size = (model.batch_size, 3, *tower_of(model.model).image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(0))
