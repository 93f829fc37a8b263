"""`clipkernels check`: every operation on this machine against fp64."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from clipkernels import backend
from clipkernels.cli.parts.output import opened, progress, write_table
from clipkernels.measure.environment import environment
from clipkernels.testing import exact_interpreter_dot
from clipkernels.testing.cases import CASES, Case
from clipkernels.testing.fp64 import check_against_fp64, flat, is_checkable
from clipkernels.testing.inputs import SHAPES, InputFactory, Shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# For CPUs, where the interpreter takes a tenth of a second for what a GPU does in microseconds.
SMALL = {"small": Shape(65, 128, 2, 1, 13), "small-no-prefix": Shape(50, 192, 3, 0, 25)}

EXAMPLE = """\b
Example:
  clipkernels check --ops prune_tokens,merge_tokens --dtype bfloat16
  clipkernels check --shapes small --dtype float32
  clipkernels check --interpret --ops match_tokens --format json
"""


@click.command(epilog=EXAMPLE)
@click.option("--device", "device_name", metavar="NAME", help="Where to run; default a GPU if there is one.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="May be repeated; default all.")
@click.option("--ops", "names", metavar="NAME,…", help="Operations whose names begin so; default all.")
@click.option("--shapes", "towers", metavar="NAME,…", help="Shapes, such as B-16; default all that suit the device.")
@click.option("--interpret", is_flag=True, help="Run the kernels in Triton's interpreter, on the CPU.")
@click.option("--format", "form", type=click.Choice(["table", "json", "csv"]), default="table", show_default=True)
@click.option("--output", metavar="FILE", help="Write there instead of to the screen.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def check(
    device_name: str | None,
    dtypes: tuple[str, ...],
    names: str | None,
    towers: str | None,
    interpret: bool,
    form: str,
    output: str | None,
    quiet: bool,
) -> None:
    """Check every operation against fp64.

    The kernels wherever they can run, and what `auto` takes in their place; the reference elsewhere. Choices must equal
    the reference's, values lie within twice the reference's own error and a rounding, and the kernels give the same
    bits when run again and for an image alone. Where only the reference runs, its own error may be 16 roundings. The
    exit status is 1 if anything is wrong.
    """
    if interpret and not backend.interpreting():
        # Triton reads this when it is imported, which has happened.
        again = sys.argv[sys.argv.index("check") :]
        interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
        sys.exit(subprocess.call([sys.executable, "-m", "clipkernels", *again], env=interpreted))
    device = _device(device_name, interpret)
    asked = [name.strip() for name in names.split(",")] if names else [""]
    chosen = {name: case for name, case in CASES.items() if any(name.startswith(start) for start in asked)}
    if not chosen:
        raise click.UsageError(f"expected --ops among {', '.join(CASES)}, got {names}")
    shapes = _shapes(towers, device)
    with progress(quiet) as bar, opened(output) as stream:
        jobs = list(_jobs(chosen, dtypes or tuple(DTYPES), device, shapes))
        task = bar.add_task("checking", total=len(jobs))
        rows = []
        for name, tower, shape, dtype, run_on in jobs:
            bar.update(task, description=f"{name} {tower} {dtype}")
            rows.append(_row(name, chosen[name], tower, shape, dtype, run_on, device))
            bar.advance(task)
        if form == "json":
            json.dump({"environment": environment(), "rows": rows}, stream, indent=1)
            stream.write("\n")
        elif form == "csv":
            writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        else:
            write_table(_table(rows), stream)
    wrong = [row for row in rows if row["verdict"] != "ok"]
    click.echo(f"{len(rows) - len(wrong)} of {len(rows)} are right on {device} ({environment()['device']})", err=True)
    if wrong:
        sys.exit(1)


def _device(name: str | None, interpret: bool) -> torch.device:
    if interpret and name not in (None, "cpu"):
        raise click.UsageError(f"expected --device cpu with --interpret, got {name}")
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() and not interpret else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(
            f"expected a device of this machine for --device, got {name}: {str(error).splitlines()[0]}"
        ) from error
    return device


def _shapes(towers: str | None, device: torch.device) -> dict[str, Shape]:
    """The shapes of the named towers; all of a GPU's, or the small ones on a CPU, where none is named."""
    if towers is None:
        return SHAPES if device.type == "cuda" else SMALL
    known = SMALL | SHAPES
    names = [name.strip() for name in towers.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.UsageError(f"expected --shapes among {', '.join(known)}, got {', '.join(unknown)}")
    return {name: known[name] for name in names}


def _jobs(
    chosen: dict[str, Case], dtypes: Sequence[str], device: torch.device, shapes: dict[str, Shape]
) -> Iterator[tuple[str, str, Shape, str, str]]:
    runs = "triton" if device.type == "cuda" or backend.interpreting() else "reference"
    try:
        backend.choose(runs, device, torch.float32, "any op")
    except RuntimeError as error:
        raise click.UsageError(str(error)) from error
    for name in chosen:
        for tower, shape in shapes.items():
            for dtype in dtypes:
                if not is_checkable(name, shape):
                    continue
                yield name, tower, shape, dtype, runs
                if device.type == "cuda" and name.startswith("attention"):  # which may be SDPA with a score kernel
                    yield name, tower, shape, dtype, "auto"


@exact_interpreter_dot()
def _row(
    name: str, case: Case, tower: str, shape: Shape, dtype: str, run_on: str, device: torch.device
) -> dict[str, Any]:
    """One operation at one shape: error, budget and verdict."""
    source = InputFactory(shape, 3, DTYPES[dtype], device)
    inputs = case.inputs(source)
    row = {"op": name, "shape": tower, "dtype": dtype, "backend": run_on}
    try:
        with torch.inference_mode():
            came = flat(case.call(source, run_on, *inputs))
            verdict = check_against_fp64(case, source, inputs, came, "triton" if run_on == "triton" else "reference")
            wrong = verdict.wrong
            if wrong is None and run_on == "triton":
                wrong = _bits(case, source, inputs, came)
    except Exception as error:  # a kernel that does not launch is one of the things to be found out
        # A compiler says last what is wrong.
        said = f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"
        return row | {"error": None, "allowed": None, "reference": None, "verdict": said}
    figures = {"error": verdict.error, "allowed": verdict.allowed, "reference": verdict.eager}
    return row | figures | {"verdict": wrong or "ok"}


def _bits(case: Case, source: InputFactory, inputs: tuple[Tensor, ...], came: list[Tensor]) -> str | None:
    """What differs in its bits when run again, or for the last image alone."""
    again = flat(case.call(source, "triton", *inputs))
    if not all(torch.equal(one, other) for one, other in zip(came, again, strict=True)):
        return "a second run gives other bits"
    own = len(inputs) - case.shared
    alone = [tensor[-1:] if tensor.ndim > 1 and at < own else tensor for at, tensor in enumerate(inputs)]
    last = flat(case.call(source, "triton", *alone))
    if not all(torch.equal(one[-1:], other) for one, other in zip(came, last, strict=True)):
        return "the last image alone gives other bits"
    return None


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("operation", "shape", "dtype", "backend", "error", "allowed", "reference's", "verdict")
    for row in rows:
        figures = ("" if row[key] is None else f"{row[key]:.1e}" for key in ("error", "allowed", "reference"))
        style = "green" if row["verdict"] == "ok" else "bold red"
        table.add_row(
            row["op"], row["shape"], row["dtype"], row["backend"], *figures, Text(row["verdict"], style=style)
        )
    return table
