"""Read and write rows of benchmarks: tables for the terminal, files written atomically, and resuming from them."""

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
"""Exit status of a run that reached its deadline."""
MACHINE_KEYS = ("cpu", "driver", "commit", "date")
"""Environment keys that may differ between rows of one file, measured on other machines or days; each row has them."""


def draw(title: str, rows: Sequence[Speed]) -> Table:
    """Return a terminal table of the rows."""
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
    """Write the rows as CSV to `out`, and with the header (environment and options) as JSON to the same name."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".csv", ".json"):
        target = out.with_suffix(suffix)
        with atomic_write(target) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            if suffix == ".csv":
                write_csv(records, file)
            else:
                json.dump({**header, "rows": records}, file, indent=1)


def save(figure: Any, file: Path) -> None:
    """Write a figure atomically, in the format of the file's extension."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format=file.suffix[1:] or "png", dpi=110)


def read_csv(table: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV; empty if the file does not exist."""
    if not table.exists():
        return []
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def resume(out: Path | None, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that an earlier run wrote to the JSON of `out`; empty without such a file.

    Raises:
        SystemExit: the file's header differs from `header` in more than MACHINE_KEYS.
    """
    source = out and out.with_suffix(".json")
    if source is None or not source.exists():
        return []
    earlier = json.loads(source.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = earlier.pop("rows")
    machine = {name: earlier["environment"].get(name) for name in MACHINE_KEYS}
    if earlier != {**header, "environment": header["environment"] | machine}:
        raise SystemExit(f"error: {source} was measured with other options or versions: choose another --out")
    return rows


MAX_ATTEMPTS = 2
"""A case is given up after this many attempts that ended their runs."""


def attempts(out: Path | None) -> Counter[str]:
    """Return the number of times that earlier runs started each case."""
    file = out and out.with_suffix(".begun")
    return Counter(file.read_text(encoding="utf-8").splitlines() if file is not None and file.exists() else [])


def remaining(every: Iterable[tuple[Any, ...]], done: Container[Any], out: Path | None) -> tuple[list[Any], list[str]]:
    """Return the cases that are not done, in order, and the names of those that were started too often.

    Cases that earlier runs started come last, because they may have ended those runs.
    """
    counts = attempts(out)
    pending = sorted((case for case in every if case not in done), key=lambda case: counts[str(case)])
    return (
        [case for case in pending if counts[str(case)] < MAX_ATTEMPTS],
        [str(case) for case in pending if counts[str(case)] >= MAX_ATTEMPTS],
    )


def note_attempt(out: Path | None, name: str) -> None:
    """Record that a case is started."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.with_suffix(".begun").open("a", encoding="utf-8") as file:
            file.write(f"{name}\n")


def stamp() -> dict[str, Any]:
    """Return driver, commit and date of a row measured now."""
    now = environment()
    return {name: now[name] for name in ("driver", "commit", "date")}


def header_of(arguments: Any, *names: str) -> dict[str, Any]:
    """Return the header of a study of the bundled CLIP: environment, image files, and the options in `names`."""
    files = {name: getattr(arguments, name).name for name in ("images", "pool") if hasattr(arguments, name)}
    options = {name: getattr(arguments, name) for name in names}
    return {"environment": environment(), "model": "the bundled CLIP", **files, **options}


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation of the values; 0 of a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
