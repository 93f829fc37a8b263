"""The folder of a tuning, from which a run that was killed goes on.

run.json        the tower, the photographs, the budget and the settings, signed
plan-HASH.json  the evaluation of a plan on one part of the photographs
speed-HASH.json the paired timing of a plan

Every file is written under another name and renamed as soon as its forward is done, so a kill costs the forward in
flight. The search depends on the evaluations alone, so a run that goes on ends as it would have.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import msgspec

from clipkernels.folder_lock import LOCK, Lock
from clipkernels.formats import Count, Digest, Fingerprint, Format, Line, Size
from clipkernels.measure.timing import Band
from clipkernels.plan import Plan
from clipkernels.plan_records import PlanRecord, read_plan, record_plan
from clipkernels.state_files import read_json, write_json
from clipkernels.tuning.evaluations import Evaluation, PartName

RUN = "run.json"
MAX_BYTES = 1 << 22
NAMES = re.compile(r"(plan|speed)-[0-9a-f]{32}\.json")
TEMPORARY = re.compile(r"\.(run|(plan|speed)-[0-9a-f]{32})\.json\.[a-z0-9_]{8}")
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
        if folder is None:
            return
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(folder)
        try:
            self._open(folder, settings)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, folder: Path, settings: Settings) -> None:
        for name in sorted(os.listdir(folder)):
            if TEMPORARY.fullmatch(name):  # of a process that was killed, because no other one has the lock
                with suppress(FileNotFoundError):
                    os.unlink(folder / name)
        if not (folder / RUN).exists():
            write_json(folder / RUN, RUN_FORMAT, settings, MAX_BYTES)
            return
        _refuse_others(folder, read_json(folder / RUN, RUN_FORMAT, MAX_BYTES), settings)
        for name in sorted(os.listdir(folder)):
            match = NAMES.fullmatch(name)
            if match and match[1] == "plan":
                record = read_json(folder / name, EVALUATION_FORMAT, MAX_BYTES)
                evaluation = Evaluation(
                    record.mean, record.tail, record.p1, tuple(record.figures), tuple(record.bounds)
                )
                self._evaluations[record.part, read_plan(record.plan)] = evaluation
            elif match:
                record = read_json(folder / name, SPEED_FORMAT, MAX_BYTES)
                self._speeds[read_plan(record.plan)] = Band(record.median, record.low, record.high)

    def __enter__(self) -> State:
        return self

    def __exit__(self, *error: object) -> None:
        if self.folder is not None:
            self._lock.release()

    def get(self, part: PartName, plan: Plan) -> Evaluation | None:
        """The evaluation of a plan on a part, or None."""
        return self._evaluations.get((part, plan))

    def put(self, part: PartName, plan: Plan, evaluation: Evaluation) -> None:
        """Keep the evaluation of a plan on a part."""
        self._evaluations[part, plan] = evaluation
        figures, bounds = list(evaluation.figures), list(evaluation.bounds)
        record = EvaluationRecord(
            part, record_plan(plan), evaluation.mean, evaluation.tail, evaluation.p1, figures, bounds
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


def check_folder(folder: Path) -> None:
    """Raise ValueError unless a folder is new, empty, or that of a tuning with nothing else in it.

    Raises:
        OSError: the folder cannot be read.
    """
    expected = "expected state to be a new or empty folder, or that of a tuning"
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"{expected}, got {folder}, which is no folder: choose another one")
    names = set(os.listdir(folder))
    others = {name for name in names if not _is_ours(name)}
    if others or (RUN not in names and any(NAMES.fullmatch(name) for name in names)):
        raise ValueError(f"{expected}, got {folder} with {min(others or names)!r}: choose another one")


def remove_state(folder: Path) -> None:
    """Remove the folder of a tuning, if it is there; run.json goes last, so that a kill leaves a state.

    Raises:
        ValueError: a folder that holds something else; it is left as it is.
        OSError: a file cannot be removed.
    """
    check_folder(folder)
    if not folder.exists():
        return
    for name in sorted(os.listdir(folder), key=lambda name: (name == RUN, name)):
        with suppress(FileNotFoundError):
            os.unlink(folder / name)
    with suppress(OSError):
        folder.rmdir()


def _is_ours(name: str) -> bool:
    fixed = name in (RUN, LOCK)
    return fixed or NAMES.fullmatch(name) is not None or TEMPORARY.fullmatch(name) is not None


def _refuse_others(folder: Path, written: Settings, settings: Settings) -> None:
    """Raise ValueError, which names what differs, unless two runs have the same settings."""
    names = [name for name in Settings.__struct_fields__ if getattr(written, name) != getattr(settings, name)]
    if not names:
        return
    digests = ("tower", "pixels", "labels", "captions")  # long, and they say little to people
    details = [f"other {name}" if name in digests else _difference(name, written, settings) for name in names]
    raise ValueError(
        f"expected the run that state {folder} began, got one with {', '.join(details)}: repeat that call, or choose "
        "another state"
    )


def _difference(name: str, written: Any, settings: Any) -> str:
    before, now = (
        value if isinstance(value := getattr(each, name), str | int) else "/".join(value)
        for each in (written, settings)
    )
    return f"{name.replace('_', ' ')} {before} instead of {now}"
