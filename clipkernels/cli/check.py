"""`clipkernels check`: every operation on this machine, compared with fp64."""

from __future__ import annotations

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
from clipkernels.cli.parts.models import choose_device
from clipkernels.cli.parts.options import PRECISIONS, device_option, format_option, once, output_option
from clipkernels.cli.parts.output import opened, progress, write_results
from clipkernels.comparison.towers import DTYPES
from clipkernels.measure.environment import environment
from clipkernels.testing import exact_interpreter_dot
from clipkernels.testing.cases import CASES, Case
from clipkernels.testing.fp64 import check_against_fp64, flat, is_checkable
from clipkernels.testing.inputs import SHAPES, InputFactory, Shape

# For CPUs, where the interpreter needs a tenth of a second for microseconds of a GPU.
SMALL = {"small": Shape(65, 128, 2, 1, 13), "small-no-prefix": Shape(50, 192, 3, 0, 25)}

ABBREVIATIONS = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}

EXAMPLE = """\b
Example:
  clipkernels check --ops prune_tokens,merge_tokens --precision bf16
  clipkernels check --shapes small --precision fp32
  clipkernels check --interpret --ops match_tokens --format json
"""


@click.command(epilog=EXAMPLE)
@device_option
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(PRECISIONS),
    help="Precision of the inputs; may be repeated.  [default: all three]",
)
@once("--ops", "names", metavar="NAME,…", help="Operations whose names begin like this.  [default: all]")
@once(
    "--shapes", "towers", metavar="NAME,…", help="Shapes, such as B-16.  [default: all on a GPU, small ones on a CPU]"
)
@click.option("--interpret", is_flag=True, help="Run the kernels in Triton's interpreter, on the CPU.")
@format_option
@output_option
def check(
    device: str | None,
    precisions: tuple[str, ...],
    names: str | None,
    towers: str | None,
    interpret: bool,
    form: str,
    output: str | None,
) -> None:
    """Check every operation against fp64.

    Where the Triton kernels can run they are checked, together with the backend that `auto` prefers to them. Elsewhere
    the PyTorch reference is checked.

    A selection must equal the reference's. A value may be off by twice the reference's own error plus one rounding. A
    second run, and a run on one image, must give the same bits. Where only the reference runs, its own error may be 16
    roundings.

    The exit status is 1 if a check fails.
    """
    if interpret and not backend.interpreting():
        # A process of its own, because Triton reads the variable when it is imported, and it is imported by now.
        arguments = sys.argv[sys.argv.index("check") :]
        environ = {**os.environ, "TRITON_INTERPRET": "1"}
        sys.exit(subprocess.call([sys.executable, "-m", "clipkernels", *arguments], env=environ))
    if interpret and device not in (None, "cpu"):
        raise click.UsageError(f"expected --device cpu with --interpret, got {device}")
    where = choose_device("cpu" if interpret else device)
    prefixes = tuple(name.strip() for name in names.split(",")) if names else ("",)
    chosen = {name: case for name, case in CASES.items() if name.startswith(prefixes)}
    if not chosen:
        raise click.UsageError(f"expected --ops among {', '.join(CASES)}, got {names}")
    shapes = _shapes(towers, where)
    with progress() as bar, opened(output) as stream:
        jobs = list(_jobs(chosen, precisions or PRECISIONS, where, shapes))
        task = bar.add_task("checking", total=len(jobs))
        rows = []
        for name, tower, shape, precision, run_on in jobs:
            bar.update(task, description=f"{name} {tower} {precision}")
            rows.append(_row(name, chosen[name], tower, shape, DTYPES[precision], run_on, where))
            bar.advance(task)
        write_results(form, stream, rows, {"environment": environment(), "rows": rows}, lambda: [draw_table(rows)])
    failed = [row for row in rows if row["verdict"] != "ok"]
    click.echo(f"{len(rows) - len(failed)} of {len(rows)} passed on {where} ({environment()['device']})", err=True)
    if failed:
        sys.exit(1)


def _shapes(towers: str | None, device: torch.device) -> dict[str, Shape]:
    """Return the shapes of the named towers; without names, all on a GPU and the small ones on a CPU.

    Raises:
        click.UsageError: an unknown name.
    """
    if towers is None:
        return SHAPES if device.type == "cuda" else SMALL
    known = SMALL | SHAPES
    names = [name.strip() for name in towers.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.UsageError(f"expected --shapes among {', '.join(known)}, got {', '.join(unknown)}")
    return {name: known[name] for name in names}


def _jobs(
    chosen: dict[str, Case], precisions: Sequence[str], device: torch.device, shapes: dict[str, Shape]
) -> Iterator[tuple[str, str, Shape, str, str]]:
    """Yield operation, tower, shape, precision and backend of every check.

    Raises:
        click.UsageError: the kernels cannot run on the device.
    """
    runs = "triton" if device.type == "cuda" or backend.interpreting() else "reference"
    try:
        backend.choose(runs, device, torch.float32, "any op")
    except RuntimeError as error:
        raise click.UsageError(str(error)) from error
    for name in chosen:
        for tower, shape in shapes.items():
            for precision in precisions:
                if not is_checkable(name, shape):
                    continue
                yield name, tower, shape, precision, runs
                if device.type == "cuda" and name.startswith("attention"):  # which may be SDPA with a score kernel
                    yield name, tower, shape, precision, "auto"


@exact_interpreter_dot()
def _row(
    name: str, case: Case, tower: str, shape: Shape, dtype: torch.dtype, run_on: str, device: torch.device
) -> dict[str, Any]:
    """Return the row of one operation at one shape: error, budget and verdict."""
    source = InputFactory(shape, 3, dtype, device)
    inputs = case.inputs(source)
    row = {"op": name, "shape": tower, "dtype": str(dtype).removeprefix("torch."), "backend": run_on}
    try:
        with torch.inference_mode():
            outputs = flat(case.call(source, run_on, *inputs))
            verdict = check_against_fp64(case, source, inputs, outputs, "triton" if run_on == "triton" else "reference")
            fault = verdict.fault
            if fault is None and run_on == "triton":
                fault = _bit_difference(case, source, inputs, outputs)
    except Exception as error:  # a kernel that does not launch is a fault like others
        # The end of a compiler's message names the error.
        message = f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"
        return row | {"error": None, "allowed": None, "reference": None, "verdict": message}
    figures = {"error": verdict.error, "allowed": verdict.allowed, "reference": verdict.reference_error}
    return row | figures | {"verdict": fault or "ok"}


def _bit_difference(case: Case, source: InputFactory, inputs: tuple[Tensor, ...], outputs: list[Tensor]) -> str | None:
    """Return what changes the bits of the outputs: a second run, or the last image alone; None if neither does."""
    repeated = flat(case.call(source, "triton", *inputs))
    if not all(torch.equal(one, other) for one, other in zip(outputs, repeated, strict=True)):
        return "a second run gives other bits"
    batched = len(inputs) - case.num_shared
    last_image = [tensor[-1:] if tensor.ndim > 1 and at < batched else tensor for at, tensor in enumerate(inputs)]
    alone = flat(case.call(source, "triton", *last_image))
    if not all(torch.equal(one[-1:], other) for one, other in zip(outputs, alone, strict=True)):
        return "the last image alone gives other bits"
    return None


def draw_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows as a table, with failed verdicts in red; the title names the backend if there is only one."""
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    several = len(backends) > 1
    table = Table(title=None if several else f"backend: {backends[0]}", title_justify="left")
    for column in ("operation", "shape", "dtype", *["backend"] * several, "error", "allowed", "verdict"):
        table.add_column(column, overflow="fold", no_wrap=column in ("dtype", "error", "allowed"))
    for row in rows:
        figures = ("" if row[key] is None else f"{row[key]:.1e}" for key in ("error", "allowed"))
        cells = (row["op"], row["shape"], ABBREVIATIONS[row["dtype"]], *[row["backend"]] * several, *figures)
        style = "green" if row["verdict"] == "ok" else "bold red"
        table.add_row(*cells, Text(row["verdict"], style=style))
    return table
