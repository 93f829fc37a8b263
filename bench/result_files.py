"""Rows of towers that were timed: a table for people, and files that appear whole."""

from __future__ import annotations

import csv
import json
import statistics
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from clipkernels.files import atomic_write, write_csv
from clipkernels.measure.environment import environment
from clipkernels.measure.timing import Speed

EXIT_DEADLINE = 75
"""The exit status of a run that its deadline cut short."""
MACHINE_KEYS = ("cpu", "driver", "commit", "date")
"""What may differ between two machines, or two days, of one measurement: every row has its own."""


def draw(title: str, rows: Sequence[Speed]) -> Table:
    """The rows for people."""
    table = Table("variant", "ms", "images/s", "speed-up", "η [p10-p90]", "against", title=title, title_justify="left")
    for row in rows:
        table.add_row(
            row.name,
            f"{1e3 * row.seconds.median:.1f}",
            f"{row.images_per_second:.2f}",
            f"×{row.speedup.median:.2f}",
            f"{row.efficiency.median:.2f} [{row.efficiency.low:.2f}-{row.efficiency.high:.2f}]",
            row.baseline,
        )
    return table


def write(records: Sequence[Mapping[str, Any]], header: Mapping[str, Any], out: Path) -> None:
    """The CSV, and beside it a JSON of the same rows with the environment and how they were taken."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".csv", ".json"):
        target = out.with_suffix(suffix)
        with atomic_write(target) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            if suffix == ".csv":
                write_csv(records, file)
            else:
                json.dump({**header, "rows": records}, file, indent=1)


def save(figure: Any, file: Path) -> None:
    """A picture, in the format that its file is named for, which appears whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format=file.suffix[1:] or "png", dpi=110)


def read_csv(table: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none where there is no such file."""
    if not table.exists():
        return []
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def resume(out: Path | None, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that an earlier run left in a file; ends the program where they were taken otherwise."""
    source = out and out.with_suffix(".json")
    if source is None or not source.exists():
        return []
    before = json.loads(source.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = before.pop("rows")
    kept = {name: before["environment"].get(name) for name in MACHINE_KEYS}
    if before != {**header, "environment": header["environment"] | kept}:
        raise SystemExit(f"error: {source} was taken with other options or versions: choose another --out")
    return rows


TRIES = 2
"""How often something is begun that ends the run it is in, before it is given up."""


def attempts(out: Path | None) -> Counter[str]:
    """How often earlier runs began each thing."""
    file = out and out.with_suffix(".begun")
    return Counter(file.read_text(encoding="utf-8").splitlines() if file is not None and file.exists() else [])


def remaining(every: Iterable[tuple[Any, ...]], done: Container[Any], out: Path | None) -> tuple[list[Any], list[str]]:
    """What is not done, in order, but what earlier runs began goes last, for it may have ended them; and the names of
    what they began too often."""
    tried = attempts(out)
    left = sorted((each for each in every if each not in done), key=lambda each: tried[str(each)])
    return [each for each in left if tried[str(each)] < TRIES], [str(e) for e in left if tried[str(e)] >= TRIES]


def note_attempt(out: Path | None, name: str) -> None:
    """Notes that something is begun."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.with_suffix(".begun").open("a", encoding="utf-8") as file:
            file.write(f"{name}\n")


def stamp() -> dict[str, Any]:
    """When, of what and under which driver a row is measured."""
    now = environment()
    return {name: now[name] for name in ("driver", "commit", "date")}


def header_of(arguments: Any, *names: str) -> dict[str, Any]:
    """How a study of the bundled CLIP was made: where, on which images, with which of its options."""
    files = {name: getattr(arguments, name).name for name in ("images", "pool") if hasattr(arguments, name)}
    options = {name: getattr(arguments, name) for name in names}
    return {"environment": environment(), "model": "the CLIP that ships with clipkernels", **files, **options}


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of several values, 0 of one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
