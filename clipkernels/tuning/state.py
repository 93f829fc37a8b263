"""The folder of a tuning, from which a run that was killed goes on.

run.json        the tower, the photographs, the budget and the settings, signed
plan-HASH.json  the evaluation of a plan on one part of the photographs
speed-HASH.json the paired timing of a plan

Every file is written under another name and renamed as soon as its forward is done, so a kill costs the forward in
flight. The search depends on the evaluations alone, so a run that goes on ends as it would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import msgspec

from clipkernels.formats import Count, Digest, Fingerprint, Format, Line, Size
from clipkernels.measure.timing import Band
from clipkernels.plan import Plan
from clipkernels.plan_records import PlanRecord, read_plan, record_plan
from clipkernels.run_folder import MAX_BYTES, RunFolder
from clipkernels.state_files import read_json, write_json
from clipkernels.tuning.evaluations import Evaluation, PartName

Damage = Annotated[float, msgspec.Meta(ge=0, le=2)]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that the result of a tuning depends on, besides the threads."""

    tower: Fingerprint
    images: Size
    pixels: Digest
    labels: Digest | None
    captions: Digest | None
    budget: Line
    against: Line
    cost: Line
    families: list[Line]
    evaluations: Size
    search_share: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    batch_size: Size
    device: Line
    precision: Line
    seed: Count


class EvaluationRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The evaluation of a plan on a part."""

    part: PartName
    plan: PlanRecord
    mean: Damage
    tail: Damage
    p1: Annotated[float, msgspec.Meta(ge=-1, le=1)]
    figures: list[float]
    bounds: list[float]
    risk: Annotated[float, msgspec.Meta(ge=0, le=1)]

    def __post_init__(self) -> None:
        read_plan(self.plan)
        if len(self.figures) != len(self.bounds):
            raise ValueError("other numbers of figures and of bounds")


class SpeedRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The paired speed-up of a plan over the fastest dense tower: median, 10 % and 90 % quantiles over rounds."""

    plan: PlanRecord
    median: float
    low: float
    high: float

    def __post_init__(self) -> None:
        read_plan(self.plan)


RUN_FORMAT = Format("clipkernels.tuning.1", "the state of a tuning", Settings, lambda header: {})
EVALUATION_FORMAT = Format(
    "clipkernels.tuning_evaluation.1", "an evaluation of a tuning", EvaluationRecord, lambda header: {}
)
SPEED_FORMAT = Format("clipkernels.tuning_speed.1", "a timing of a tuning", SpeedRecord, lambda header: {})


def _differences(names: Sequence[str], written: Settings, settings: Settings) -> list[str]:
    """The differences of two runs: digests are long, and say little to people."""
    digests = ("tower", "pixels", "labels", "captions")
    return [f"other {name}" if name in digests else _difference(name, written, settings) for name in names]


def _difference(name: str, written: Settings, settings: Settings) -> str:
    before, now = (
        value if isinstance(value := getattr(each, name), str | int) else "/".join(value)
        for each in (written, settings)
    )
    return f"{name.replace('_', ' ')} {before} instead of {now}"


FOLDER = RunFolder("a tuning", RUN_FORMAT, r"(plan|speed)-[0-9a-f]{32}\.json", _differences)


class State:
    """The evaluations of one tuning, in a folder, or in memory alone for None.

    Use it in a `with` block, in which no other process can use the folder.

    Args:
        folder: a new or empty folder, or one of a tuning.
        settings: the settings of this tuning.
    Raises:
        ValueError: a folder that holds something else, or a tuning of other settings; or another process uses it.
        OSError: the folder cannot be read or written.
    """

    def __init__(self, folder: Path | None, settings: Settings) -> None:
        self.folder = folder
        self._evaluations: dict[tuple[PartName, Plan], Evaluation] = {}
        self._speeds: dict[Plan, Band] = {}
        self._lock = None if folder is None else FOLDER.open(folder, settings)
        try:
            self._read()
        except BaseException:
            self.__exit__()
            raise

    def _read(self) -> None:
        for file in () if self.folder is None else sorted(self.folder.iterdir()):
            if file.name.startswith("plan-"):
                record = read_json(file, EVALUATION_FORMAT, MAX_BYTES)
                evaluation = Evaluation(
                    record.mean, record.tail, record.p1, tuple(record.figures), tuple(record.bounds), record.risk
                )
                self._evaluations[record.part, read_plan(record.plan)] = evaluation
            elif file.name.startswith("speed-"):
                record = read_json(file, SPEED_FORMAT, MAX_BYTES)
                self._speeds[read_plan(record.plan)] = Band(record.median, record.low, record.high)

    def __enter__(self) -> State:
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def get(self, part: PartName, plan: Plan) -> Evaluation | None:
        """The evaluation of a plan on a part, or None."""
        return self._evaluations.get((part, plan))

    def put(self, part: PartName, plan: Plan, evaluation: Evaluation) -> None:
        """Keep the evaluation of a plan on a part."""
        self._evaluations[part, plan] = evaluation
        figures, bounds = list(evaluation.figures), list(evaluation.bounds)
        record = EvaluationRecord(
            part, record_plan(plan), evaluation.mean, evaluation.tail, evaluation.p1, figures, bounds, evaluation.risk
        )
        self._write("plan", f"{part} {plan!r}", EVALUATION_FORMAT, record)

    def speed(self, plan: Plan) -> Band | None:
        """The paired speed-up of a plan, or None."""
        return self._speeds.get(plan)

    def put_speed(self, plan: Plan, speed: Band) -> None:
        """Keep the paired speed-up of a plan."""
        self._speeds[plan] = speed
        self._write("speed", repr(plan), SPEED_FORMAT, SpeedRecord(record_plan(plan), *speed))

    def _write(self, kind: str, key: str, form: Format, record: msgspec.Struct) -> None:
        if self.folder is not None:
            name = f"{kind}-{sha256(key.encode()).hexdigest()[:32]}.json"
            write_json(self.folder / name, form, record, MAX_BYTES)
