"""The folder of a recovery's checkpoints, from which a run that was killed goes on.

run.json                the tower, the method, the settings and the number of images, signed
targets-N.safetensors   dense embeddings and digests of the images from row N on
checkpoint.safetensors  the weights, both moments of AdamW, the step and the evaluations
best-N.safetensors      the weights after step N, the best that were evaluated

Every file is written under another name and renamed. A checkpoint is one file, and names the best weights that it goes
with, so a kill at any moment leaves a whole one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import torch
from torch import Tensor

from clipkernels.formats import FLOATS, Count, Fingerprint, Format, Line, Positive, Share, Size, TensorSpec
from clipkernels.learn.recovery.results import Evaluation
from clipkernels.run_folder import CheckpointClock, RunFolder
from clipkernels.state_files import read_state, write_state

CHECKPOINT = "checkpoint.safetensors"
BEST = re.compile(r"best-(\d+)\.safetensors")


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that the weights of a recovery depend on besides the pixels, the device and the threads."""

    tower: Fingerprint
    method: Line
    plan: Line
    images: Size
    epochs: Size
    batch_size: Size
    lr: Positive
    warmup: Share
    weight_decay: Annotated[float, msgspec.Meta(ge=0)]
    contrast: Annotated[float, msgspec.Meta(ge=0)]
    held_out: Size | Share
    patience: Size
    lora: Size | None
    seed: Count


class PartHeader(msgspec.Struct, forbid_unknown_fields=True):
    """The header of a part of the targets: its first row, and the width of an embedding."""

    first: Count
    width: Size


class CheckpointHeader(msgspec.Struct, forbid_unknown_fields=True):
    """The header of a checkpoint: steps, and the sum of the losses of images since the last evaluation."""

    step: Count
    loss: float
    losses: Count
    history: list[Evaluation]


class BestHeader(msgspec.Struct, forbid_unknown_fields=True):
    """The header of the best weights: the step after which they were evaluated."""

    step: Count


def _check_history(header: CheckpointHeader, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the steps of the evaluations rise from 0 to that of the checkpoint at most."""
    steps = [evaluation.step for evaluation in header.history]
    if steps[:1] != [0] or steps != sorted(set(steps)) or steps[-1] > header.step:
        raise ValueError(f"evaluations whose steps do not rise from 0 to {header.step} at most")


def _weights(*names: str) -> dict[str, TensorSpec]:
    return {name: TensorSpec(FLOATS, "values") for name in names}


RUN_FORMAT = Format("clipkernels.recovery.1", "the state of a recovery", Settings, lambda header: {})
PART_FORMAT = Format(
    "clipkernels.recovery_targets.1",
    "dense embeddings of a recovery",
    PartHeader,
    lambda header: {
        "embeddings": TensorSpec((torch.float32,), "rows width", -1.01, 1.01),
        "digests": TensorSpec((torch.uint8,), "rows 32"),
    },
)
CHECKPOINT_FORMAT = Format(
    "clipkernels.recovery_checkpoint.1",
    "a checkpoint of a recovery",
    CheckpointHeader,
    lambda header: _weights("weights", "first", "second"),
    _check_history,
)
BEST_FORMAT = Format(
    "clipkernels.recovery_best.1", "the best weights of a recovery", BestHeader, lambda header: _weights("weights")
)


def _differences(names: Sequence[str], written: Settings, settings: Settings) -> list[str]:
    """The differences of two runs: fingerprints and plans are long, and say little to people."""
    shown = [name for name in names if name != "plan" or "method" not in names]
    return [
        f"another {name}"
        if name in ("tower", "plan")
        else f"{name} {getattr(written, name)} instead of {getattr(settings, name)}"
        for name in shown
    ]


FOLDER = RunFolder("a recovery", RUN_FORMAT, r"(checkpoint|targets-\d+|best-\d+)\.safetensors", _differences)


class Checkpoint(NamedTuple):
    """The state of a training after a step.

    step: steps that were made.
    loss, losses: sum and number of the losses of images since the last evaluation.
    history: the evaluations.
    weights, first, second: the weights and both moments of AdamW as vectors on the CPU.
    """

    step: int
    loss: float
    losses: int
    history: list[Evaluation]
    weights: Tensor
    first: Tensor
    second: Tensor


class State:
    """The folder of one recovery, or nothing for None, where all is kept in memory alone.

    Use it in a `with` block, in which no other process can use the folder.

    Args:
        folder: a new or empty folder, or one of a recovery.
        settings: the settings of this recovery.
    Raises:
        ValueError: a folder that holds something else, or a recovery of other settings; or another process uses it.
        OSError: the folder cannot be read or written.
    """

    def __init__(self, folder: Path | None, settings: Settings) -> None:
        self.folder = folder
        self._best: tuple[int, Tensor] | None = None
        self._clock = CheckpointClock()
        self._lock = None if folder is None else FOLDER.open(folder, settings)

    def __enter__(self) -> State:
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def targets(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The parts of the targets that are on disk, in order: embeddings (r,E) and digests (r,32)."""
        first = 0
        while self.folder is not None:
            file = self.folder / f"targets-{first}.safetensors"
            if not file.exists():
                return
            _, tensors = read_state(file, PART_FORMAT)
            yield tensors["embeddings"], tensors["digests"]
            first += len(tensors["digests"])

    def add_targets(self, first: int, embeddings: Tensor, digests: Tensor) -> None:
        """Write the part of the targets that begins with the row `first`."""
        if self.folder is not None:
            header = {"first": first, "width": embeddings.shape[1]}
            tensors = {"embeddings": embeddings, "digests": digests}
            write_state(self.folder / f"targets-{first}.safetensors", PART_FORMAT, header, tensors)

    def checkpoint(self) -> Checkpoint | None:
        """The last checkpoint, or None."""
        if self.folder is None or not (self.folder / CHECKPOINT).exists():
            return None
        header, tensors = read_state(self.folder / CHECKPOINT, CHECKPOINT_FORMAT)
        history = [msgspec.convert(each, Evaluation) for each in header["history"]]
        return Checkpoint(header["step"], header["loss"], header["losses"], history, **tensors)

    def is_due(self) -> bool:
        """Return true if a checkpoint is worth its time."""
        return self.folder is not None and self._clock.is_due()

    def save(self, checkpoint: Checkpoint, best: int) -> None:
        """Write a checkpoint, and remove the weights that were best before the step `best`."""
        if self.folder is None:
            return
        with self._clock.writing():
            content = checkpoint._asdict()
            header = {name: content.pop(name) for name in ("step", "loss", "losses", "history")}
            write_state(self.folder / CHECKPOINT, CHECKPOINT_FORMAT, header, content)
            for name in os.listdir(self.folder):
                match = BEST.fullmatch(name)
                if match and int(match[1]) != best:
                    os.unlink(self.folder / name)

    def save_best(self, step: int, weights: Tensor) -> None:
        """Keep the weights after a step, the best so far; the checkpoint that follows refers to them."""
        if self.folder is None:
            self._best = step, weights
        else:
            write_state(self.folder / f"best-{step}.safetensors", BEST_FORMAT, {"step": step}, {"weights": weights})

    def best(self, step: int) -> Tensor:
        """The weights that `save_best` kept after a step."""
        if self.folder is None:
            assert self._best is not None and self._best[0] == step
            return self._best[1]
        return read_state(self.folder / f"best-{step}.safetensors", BEST_FORMAT)[1]["weights"]
