"""The folder of an evaluation, from which a run that was killed goes on, and which later runs add to.

run.json                    the towers, the reader and the settings that every figure depends on, signed
features-KEY-N.safetensors  features of a split, by images and method
row-KEY.json                the score of one head on one data set by one method
speed-KEY.json              the paired timing of the methods

A run may have other data sets, methods, heads and shots than the one before: what is there is not made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from clipkernels.formats import Fingerprint, Format, Line, Positive, Share, Size
from clipkernels.run_folder import RunFolder

Spread = Annotated[float, msgspec.Meta(ge=0)]
MAX_BYTES = 1 << 20
ROUNDING = 1e-9


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that all figures of an evaluation depend on."""

    tower: Fingerprint
    text_tower: Fingerprint
    preprocess: Line
    reader: Line
    precision: Line
    batch_size: Size


class ScoreRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The scores of one combination by metric: mean, lower and upper bound, spread over the runs, images.

    unread: by split, the number of images without features, the name of the first and the reason.
    """

    values: Annotated[dict[Line, tuple[Share, Share, Share, Spread | None, Size]], msgspec.Meta(min_length=1)]
    runs: Size
    unread: dict[Line, tuple[Size, str, str]]
    weights: Line

    def __post_init__(self) -> None:
        for mean, low, high, spread, _ in self.values.values():
            if not low - ROUNDING <= mean <= high + ROUNDING:
                raise ValueError(f"a mean of {mean} outside of its interval {low} to {high}")
            if (spread is None) != (self.runs == 1):
                raise ValueError("a spread of one run, or several runs without one")


class SpeedRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """GMACs as executed, images/s, speed-up and η of each method, by its name."""

    methods: Annotated[dict[Line, tuple[Positive, Positive, Positive, Positive]], msgspec.Meta(min_length=1)]


RUN_FORMAT = Format("clipkernels.evaluation.1", "the state of an evaluation", Settings, lambda header: {})
SCORE_FORMAT = Format("clipkernels.evaluation_score.2", "a score of an evaluation", ScoreRecord, lambda header: {})
SPEED_FORMAT = Format("clipkernels.evaluation_speed.1", "speeds of an evaluation", SpeedRecord, lambda header: {})


def _differences(names: Sequence[str], written: Settings, settings: Settings) -> list[str]:
    """The differences of two runs: fingerprints say little to people."""
    return [
        f"another {name.replace('_', ' ')}"
        if name in ("tower", "text_tower", "preprocess")
        else f"{name} {getattr(written, name)} instead of {getattr(settings, name)}"
        for name in names
    ]


FOLDER = RunFolder(
    "an evaluation",
    RUN_FORMAT,
    r"features-[0-9a-f]{32}-\d+\.safetensors|(row|speed)-[0-9a-f]{32}\.json",
    _differences,
    "repeat it as it was, or choose another folder (--out)",
)
