"""Measure time and memory of the heads' fused forms on this machine's CPU, against the published formulas.

    python -m bench.cost.heads --out heads-cost.csv
    python -m bench.cost.heads --threads 2

The fused forms are `ck.ops` and `ck.TipX`. B = 64, P = 196, K = 1000, n = 16,000, E = 512, random features. Figures are
CPU time of one thread, or wall time of several; the peak memory of a call above the memory before it, in a separate
process; and the memory of the support that is kept between calls.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize, one_hot

import clipkernels as ck
from bench.cost import peak_rss
from bench.naive import heads as literal_heads
from bench.result_files import write
from clipkernels import ops
from clipkernels.measure.environment import environment
from clipkernels.measure.timing import Clock, measure

COMPUTATIONS = ("CALIP", "Tip-Adapter", "TIP-X")


class Case(NamedTuple):
    """One computation: its inputs, its forms, and the tensors of the support that each form keeps between calls."""

    inputs: tuple[Tensor, ...]
    forms: dict[str, Callable[..., Tensor]]
    stored: dict[str, Sequence[Tensor]]


def case_of(
    name: str, batch: int = 64, patches: int = 196, classes: int = 1000, width: int = 512, shots: int = 16
) -> Case:
    """Return one of the computations at a size."""

    def units(*size: int) -> Tensor:
        return normalize(torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))), dim=-1)

    images, support, text = units(batch, width), units(classes * shots, width), units(classes, width)
    if name == "CALIP":
        inputs = (units(batch, patches, width), images, text)
        literal = partial(literal_heads.calip_logits, alpha=0.5, beta2=1.12, beta3=0.02)
        return Case(inputs, {"fused": ops.calip_logits, "literal": literal}, {"fused": (), "literal": ()})
    labels, offsets = torch.arange(classes).repeat_interleave(shots), torch.arange(classes + 1) * shots
    beta, tau, hot = 5.5, 0.5, one_hot(labels, classes).float()
    if name == "Tip-Adapter":
        fused = partial(ops.affinity, labels=labels, classes=classes, beta=beta, offsets=offsets)
        forms = {"fused": fused, "literal": partial(literal_heads.affinity, one_hot=hot, beta=beta)}
        return Case((images, support), forms, {"fused": (support, labels, offsets), "literal": (support, hot)})
    head = ck.TipX(text, support, labels, 1.0, beta, 1.0, tau, "sum")
    min_affinity, max_affinity, min_divergence, max_divergence = head._support.extrema
    slope, log_shares = (
        (max_affinity - min_affinity) / (max_divergence - min_divergence),
        (support @ text.T / tau).log_softmax(1),
    )

    def tipx(images: Tensor) -> Tensor:
        votes = literal_heads.affinity(images, support, hot, beta)
        likeness = literal_heads.likeness(images, text, log_shares, hot, tau)
        return 100 * images @ text.T + votes + shots * (min_affinity + slope * max_divergence) + slope * likeness

    stored = {"fused": (support, labels, offsets, head._support.mass), "literal": (support, hot, log_shares)}
    return Case((images,), {"fused": head, "literal": tipx}, stored)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    clock: Clock = "process" if arguments.threads == 1 else "wall"
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(COMPUTATIONS))
        for name in COMPUTATIONS:
            bar.update(task, description=name)
            rows += costs(name, arguments.threads, arguments.rounds, clock)
            bar.advance(task)
    Console(width=None if sys.stdout.isatty() else 160).print(draw(rows, clock))
    if arguments.out:
        header = {
            "environment": environment(),
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "clock": clock,
        }
        write(rows, header, arguments.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds; default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="rows; FILE.json adds the environment")
    return parser.parse_args()


def costs(name: str, threads: int, rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """Return rows with time and memory of a computation's forms, whose results must agree."""
    case = case_of(name)
    with torch.inference_mode():
        results = [form(*case.inputs) for form in case.forms.values()]
        # TIP-X as published subtracts logarithms near -7, which fp32 rounds.
        torch.testing.assert_close(results[0], results[1], atol=1e-2, rtol=1e-4)
        times = measure({kind: partial(form, *case.inputs) for kind, form in case.forms.items()}, rounds, clock=clock)
    ratio = times.ratio("fused", "literal")
    rows = []
    for kind in case.forms:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(peak_bytes, (name, kind, threads))
        row = {"computation": name, "form": kind, "milliseconds": round(1e3 * times.of(kind).median, 2)}
        stored = sum(tensor.nbytes for tensor in case.stored[kind])
        row |= {"peak_mib": round(peak / 2**20, 1), "kept_mib": round(stored / 2**20, 1), "threads": threads}
        row |= {f"over_literal{end}": round(value, 3) for end, value in zip(("", "_p10", "_p90"), ratio, strict=True)}
        rows.append({**row, "commit": environment()["commit"]})
    return rows


def draw(rows: list[dict[str, Any]], clock: Clock) -> Table:
    """Return a terminal table of the rows."""
    table = Table("computation", "form", "ms", "peak MiB", "kept MiB", "× literal [p10-p90]", title=f"{clock} time")
    for row in rows:
        speed = f"{row['over_literal']:.2f} [{row['over_literal_p10']:.2f}-{row['over_literal_p90']:.2f}]"
        figures = (f"{row[key]:.1f}" for key in ("milliseconds", "peak_mib", "kept_mib"))
        table.add_row(row["computation"], row["form"], *figures, speed if row["form"] == "fused" else "")
    return table


def peak_bytes(name: str, kind: str, threads: int) -> int:
    """Return the peak bytes of one call above the memory before it."""
    torch.set_num_threads(threads)
    case = case_of(name)
    with torch.inference_mode():
        torch.randn(256, 256) @ torch.randn(256, 256)  # triggers the library's one-time allocations
        return peak_rss.peak_increase(partial(case.forms[kind], *case.inputs))


if __name__ == "__main__":
    main()
