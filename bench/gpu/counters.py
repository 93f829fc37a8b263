"""Read a GPU's counters of the two kernels furthest from their floor: run `ncu` on a few calls of each.

    python -m bench.gpu.counters --ops bench/results/nvidia-h200/ops.csv --out counters.csv
    python -m bench.gpu.counters --call prune_tokens B-16 256     # the command that ncu profiles

The operations are those whose Triton kernel has the smallest `of_floor` at the largest batch, in a table written by
`bench/ops.py --rows`. If ncu is missing or may not read the counters, a line says so and nothing is written.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from bench.result_files import read_csv
from clipkernels.files import atomic_write, write_csv
from clipkernels.testing.cases import CASES
from clipkernels.testing.inputs import SHAPES, InputFactory

METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sector_hit_rate.pct",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)


def main() -> None:
    arguments = parse()
    if arguments.call:
        op, tower, batch = arguments.call
        call(op, tower, int(batch))
        return
    if not arguments.ops or not arguments.out:
        sys.exit("error: expected --ops with --out, or --call, got neither")
    ncu = shutil.which("ncu")
    if ncu is None:
        print("no counters: ncu is not installed")
        return
    chosen = furthest(arguments.ops)
    if not chosen:
        sys.exit(f"error: expected rows of Triton kernels in {arguments.ops}, got none")
    rows: list[dict[str, str]] = []
    for op, tower, batch in chosen:
        command = [ncu, "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base"]
        command += ["--metrics", ",".join(METRICS)]
        command += ["--kernel-name", "regex:^_.*_kernel", "--target-processes", "application-only"]
        command += [sys.executable, __file__, "--call", op, tower, batch]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        launches = parse_launches(process.stdout.splitlines())
        if process.returncode or not launches:
            print(f"no counters: ncu failed on {op} {tower} b{batch}: {(process.stdout + process.stderr)[-300:]}")
            return
        rows += [{"op": op, "tower": tower, "batch": batch, **row} for row in launches]
        with atomic_write(arguments.out) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            write_csv(rows, file)
    print(f"{len(rows)} launches in {arguments.out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", type=Path, metavar="FILE.csv", help="a table written by bench/ops.py --rows")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="one row for each launch")
    parser.add_argument("--call", nargs=3, metavar=("OP", "SHAPE", "BATCH"), help="only call an operation three times")
    return parser.parse_args()


def call(op: str, tower: str, batch: int) -> None:
    """Call one operation's kernels three times."""
    case = CASES[op]
    source = InputFactory(
        SHAPES[tower], batch, torch.bfloat16, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    inputs = case.inputs(source)
    for _ in range(3):
        case.call(source, "triton", *inputs)


def furthest(table: Path, count: int = 2) -> list[tuple[str, str, str]]:
    """Return op, tower and batch of the `count` operations furthest from their floor, at the worst tower of each."""
    rows = [row for row in read_csv(table) if row["variant"] == "triton"]
    largest = max((int(row["batch"]) for row in rows), default=0)
    rows = sorted((row for row in rows if int(row["batch"]) == largest), key=lambda row: float(row["of_floor"]))
    worst: dict[str, tuple[str, str, str]] = {}
    for row in rows:
        worst.setdefault(row["op"], (row["op"], row["tower"], row["batch"]))
    return list(worst.values())[:count]


def parse_launches(lines: Iterable[str]) -> list[dict[str, str]]:
    """Return the launches in ncu's output: a table between its messages; the table's second row has the units."""
    table = [line for line in lines if line.startswith('"')]
    rows = list(csv.DictReader(table))
    units, launches = (rows[0], rows[1:]) if rows else ({}, [])
    columns = {name: f"{name} [{units[name]}]" if units[name] else name for name in METRICS if name in units}
    return [{"kernel": row["Kernel Name"], **{columns[name]: row[name] for name in columns}} for row in launches]


if __name__ == "__main__":
    main()
