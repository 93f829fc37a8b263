"""The folder of the state of `clipkernels distill`, from which a run that was killed goes on, and later runs add to.

run.json                the teacher, the data and the settings that every figure depends on, signed
images-SPLIT.json       the images of a split: those that cannot be read, and digests of all
score-KEY.json          the scores of one training: a method, a share of the labels and a seed
checkpoint.safetensors  the training that is under way

A run may have other shares, seeds and methods than the one before: what is there is not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from clipkernels.formats import FLOATS, Count, Digest, Fingerprint, Format, Line, Positive, Share, Size, TensorSpec
from clipkernels.questions.training import Checkpoint
from clipkernels.run_folder import CheckpointClock, RunFolder
from clipkernels.state_files import read_json, read_state, write_json, write_state

CHECKPOINT = "checkpoint.safetensors"
MAX_BYTES = 1 << 24


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that all figures depend on."""

    task: Line
    tower: Fingerprint
    text_tower: Fingerprint
    method: Line
    reader: Line
    preprocess: Line
    train: Digest
    test: Digest
    held_out: list[Line]
    student: Line
    student_source: Line
    tuned: Line
    steps: Size
    batch_size: Size
    lr: Positive
    strength: Annotated[float, msgspec.Meta(ge=0)]
    keep: Positive
    temperature: Positive


class ScoreRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The result of one training.

    scores: by split and name of the score.
    counts: by split, the annotations that were scored.
    train: annotations that were trained on.
    classes: classes of these.
    steps: steps of the training.
    weight: mean weight of the distances, or None.
    seconds: time of the training.
    """

    scores: dict[Line, dict[Line, Share]]
    counts: dict[Line, Count]
    train: Count
    classes: Count
    steps: Size
    weight: Share | None
    seconds: Annotated[float, msgspec.Meta(ge=0)]

    def __post_init__(self) -> None:
        if not self.scores or self.scores.keys() != self.counts.keys() or not all(self.scores.values()):
            raise ValueError(f"scores of {', '.join(self.scores) or 'no split'} and counts of {', '.join(self.counts)}")


class ImagesRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The images of a split, and the texts beside them.

    failed: the images that cannot be read, with the reasons.
    regions: true if the regions of the others are in the cache.
    files: a digest of the paths, sizes and times of the files: as long as it stays, they are not read again.
    content: a digest of the preprocessed images.
    cut: distinct texts whose end the teacher's tokenizer cuts off.
    """

    failed: dict[Line, Line]
    regions: bool
    files: Digest
    content: Digest
    cut: Count


class CheckpointHeader(msgspec.Struct, forbid_unknown_fields=True):
    """The header of a checkpoint: its training, its step, the sum of the weights of the distances, and the time."""

    key: Line
    step: Count
    weight: float
    weighed: Count
    seconds: float


RUN_FORMAT = Format("clipkernels.distillation.1", "the state of a distillation", Settings, lambda header: {})
SCORE_FORMAT = Format("clipkernels.distillation_score.1", "a score of a distillation", ScoreRecord, lambda header: {})
IMAGES_FORMAT = Format(
    "clipkernels.distillation_images.1", "the faulty images of a distillation", ImagesRecord, lambda header: {}
)
CHECKPOINT_FORMAT = Format(
    "clipkernels.distillation_checkpoint.1",
    "a checkpoint of a distillation",
    CheckpointHeader,
    lambda header: {
        **{name: TensorSpec(FLOATS, "values") for name in ("weights", "first", "second")},
        "buffers": TensorSpec((torch.float64,), "buffers*"),
    },
)
OPAQUE = ("tower", "text_tower", "preprocess", "train", "test", "student_source")
"""Settings whose values say little to people."""


def _differences(names: Sequence[str], written: Settings, settings: Settings) -> list[str]:
    return [
        f"another {name.replace('_', ' ')}{' split' if name in ('train', 'test') else ''}"
        if name in OPAQUE
        else f"{name} {getattr(written, name)} instead of {getattr(settings, name)}"
        for name in names
    ]


FOLDER = RunFolder(
    "a distillation",
    RUN_FORMAT,
    r"(checkpoint\.safetensors|images-(train|test)\.json|score-[0-9a-f]{32}\.json)",
    _differences,
    "repeat it as it was, or choose another folder (--out)",
)


class State:
    """The folder of the state of one distillation.

    Use it in a `with` block, in which no other process can use the folder.

    Args:
        folder: a new or empty folder, or one of a distillation.
        settings: the settings of this one.
    Raises:
        ValueError: a folder that holds something else, or a run of other settings; or another process uses it.
        OSError: the folder cannot be read or written.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self._clock = CheckpointClock()
        self._lock = FOLDER.open(folder, settings)

    def __enter__(self) -> State:
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def images(self, split: str) -> ImagesRecord | None:
        """The record of the images of a split; None if they were not all tried yet."""
        file = self.folder / f"images-{split}.json"
        record: ImagesRecord | None = read_json(file, IMAGES_FORMAT, MAX_BYTES) if file.exists() else None
        return record

    def save_images(self, split: str, record: ImagesRecord) -> None:
        """Keep the record of the images of a split, once all were tried."""
        write_json(self.folder / f"images-{split}.json", IMAGES_FORMAT, record, MAX_BYTES)

    def score(self, key: str) -> ScoreRecord | None:
        """The result of a training, or None."""
        file = self._score_file(key)
        record: ScoreRecord | None = read_json(file, SCORE_FORMAT, MAX_BYTES) if file.exists() else None
        return record

    def save_score(self, key: str, record: ScoreRecord) -> None:
        """Keep the result of a training, and remove its checkpoint."""
        write_json(self._score_file(key), SCORE_FORMAT, record, MAX_BYTES)
        (self.folder / CHECKPOINT).unlink(missing_ok=True)

    def checkpoint(self, key: str) -> tuple[Checkpoint, float] | None:
        """The checkpoint of a training and its seconds so far, or None."""
        file = self.folder / CHECKPOINT
        if not file.exists():
            return None
        header, tensors = read_state(file, CHECKPOINT_FORMAT)
        if header["key"] != key:  # of a run that was stopped with other shares, seeds or methods
            return None
        tensors_of: dict[str, Tensor] = tensors
        return (
            Checkpoint(header["step"], header["weight"], header["weighed"], **tensors_of),
            header["seconds"],
        )

    def save_checkpoint(self, key: str, make: Callable[[], Checkpoint], seconds: float, at_once: bool) -> None:
        """Write a checkpoint if that is worth its time, or at once."""
        if not at_once and not self._clock.is_due():
            return
        with self._clock.writing():
            content: dict[str, Any] = make()._asdict()
            header = {"key": key, "seconds": seconds}
            header |= {name: content.pop(name) for name in ("step", "weight", "weighed")}
            write_state(self.folder / CHECKPOINT, CHECKPOINT_FORMAT, header, content)

    def _score_file(self, key: str) -> Path:
        return self.folder / f"score-{sha256(key.encode()).hexdigest()[:32]}.json"
