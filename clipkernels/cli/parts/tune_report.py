"""The report of `clipkernels tune`: its frontier as a table, CSV or JSON, and the lines of its promise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from rich.table import Table
from rich.text import Text

from clipkernels.cli.parts.output import schedule, write_results
from clipkernels.measure.environment import environment
from clipkernels.messages import printable, quantity
from clipkernels.tuning.budget import Constraint
from clipkernels.tuning.results import Row, Tuned


def write_tuning(
    result: Tuned, constraints: Sequence[Constraint], run: dict[str, Any], out: str, form: str, stream: TextIO
) -> None:
    """Write the frontier and the promise as a table, everything as JSON, or the frontier as CSV."""
    records = records_of(result, constraints)
    promises = [
        {
            "constraint": promise.constraint.text,
            "figure": round(promise.figure, 6),
            "bound": round(promise.bound, 6),
            "images": promise.images,
            "trend": {str(size): round(value, 6) for size, value in promise.trend.items()},
        }
        for promise in result.promises
    ]
    document = {
        "environment": environment(),
        **run,
        "schedule": None if result.schedule is None else out,
        "reason": result.reason,
        "images": {"search": result.images[0], "held_out": result.images[1], "skipped": len(result.skipped)},
        "evaluations": result.evaluations,
        "gmacs_run": result.gmacs,
        "gmacs_dense": result.dense_gmacs,
        "cosines_held_out": None if result.cosines is None else dict(zip(("p1", "mean"), result.cosines, strict=True)),
        "speedup": None if result.speedup is None else result.speedup._asdict(),
        "promises": promises,
        "rows": records,
    }

    def draw() -> Iterator[Table | str]:
        yield draw_table(result, records)
        yield from lines_of(result, out)

    write_results(form, stream, records, document, draw)


def figures_of(row: Row, constraints: Sequence[Constraint]) -> dict[str, float]:
    """Return the figures of a row by name: those of the budget, and both of the cosine."""
    names = [constraint.figure_name for constraint in constraints if constraint.is_quality]
    return {
        **dict(zip(names, row.figures, strict=True)),
        "cosine_p1": row.cosine_p1,
        "cosine_mean": row.cosine_mean,
    }


def records_of(result: Tuned, constraints: Sequence[Constraint]) -> list[dict[str, Any]]:
    """Return the rows as plain values, by column."""
    return [
        {
            "plan": row.name,
            "tokens": row.plan.tokens,
            "milliseconds": None if row.milliseconds is None else round(row.milliseconds, 4),
            "gmacs_run": round(row.gmacs, 6),
            **{name: round(value, 6) for name, value in figures_of(row, constraints).items()},
            "keeps": row.keeps,
            "published": row.published,
            "chosen": row.chosen,
        }
        for row in result.rows
    ]


def draw_table(result: Tuned, records: Sequence[dict[str, Any]]) -> Table:
    """Return the table of the frontier; ✓ marks the plans that keep the budget, * published ones, → the chosen one."""
    names = [name for name in records[0] if name not in ("plan", "tokens", "milliseconds", "gmacs_run")]
    figures = [name for name in names if name not in ("keeps", "published", "chosen")]
    timed = records[0]["milliseconds"] is not None
    title = f"{quantity(result.evaluations, 'plan')} on {quantity(result.images[0], 'photograph')}; * is published"
    table = Table("", "plan", "tokens", *["ms"] * timed, "GMACs", *figures, "", title=title, title_justify="left")
    for record in records:
        cost = [f"{record['milliseconds']:.3f}"] if timed else []
        cells = [
            "→" if record["chosen"] else "",
            record["plan"] + " *" * record["published"],
            schedule(record["tokens"]),
            *cost,
            f"{record['gmacs_run']:.{2 if record['gmacs_run'] > 1 else 4}f}",
            *(f"{record[name]:.4f}" for name in figures),
            "✓" if record["keeps"] else "",
        ]
        table.add_row(*map(Text, cells))
    return table


def lines_of(result: Tuned, out: str) -> Iterator[str]:
    """Yield the promise, the cost and the use of the schedule, or why there is none."""
    for promise in result.promises:
        side = "at least" if promise.constraint.direction == ">=" else "at most"
        line = (
            f"{promise.constraint.text}: {promise.figure:.4f} on {quantity(promise.images, 'held-out photograph')}, "
            f"{side} {promise.bound:.4f} with 95 % confidence"
        )
        if promise.trend:
            line += "; " + ", ".join(f"{value:.4f} among {size}" for size, value in promise.trend.items())
        yield line
    if result.cosines is not None:
        low, mean = result.cosines
        yield f"cosine with dense on the held-out photographs: first percentile {low:.4f}, mean {mean:.4f}"
    if result.gmacs is not None:
        fewer = result.dense_gmacs / result.gmacs
        yield f"GMACs as executed: {result.gmacs:.4g} of {result.dense_gmacs:.4g}, ×{fewer:.2f} fewer"
    if result.speedup is not None:
        speed = result.speedup
        band = f"×{speed.low:.2f} to ×{speed.high:.2f}"
        yield f"measured speed-up over the fastest dense tower: ×{speed.median:.2f} ({band})"
    if result.schedule is not None:
        yield f"use it with --method {printable(out)}, or ck.Schedule.load({out!r})"
    else:
        yield f"no schedule: {result.reason}"
