"""What the fused forms of heads cost on this machine's CPU, beside the formulas as they are published.

    python -m bench.cost.heads --out heads-cost.csv
    python -m bench.cost.heads --threads 2

Fused is what `ck.ops` and `ck.TipX` run here. B = 64, P = 196, K = 1000, n = 16,000, E = 512, random features: CPU time
of one thread or wall time, and the most memory that was ever held beyond what was there before, in a process of its
own, beside what is kept of the support from call to call.
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
from bench.cost import peak_rss as resident
from bench.naive import heads as literal_heads
from bench.result_files import write
from clipkernels import ops
from clipkernels.measure.environment import environment
from clipkernels.measure.timing import Clock, measure

COMPUTATIONS = ("CALIP", "Tip-Adapter", "TIP-X")


class Case(NamedTuple):
    """One computation: its inputs, the forms that it has, and what each keeps of the support from call to call."""

    inputs: tuple[Tensor, ...]
    forms: dict[str, Callable[..., Tensor]]
    kept: dict[str, Sequence[Tensor]]


def case_of(
    name: str, batch: int = 64, patches: int = 196, classes: int = 1000, width: int = 512, shots: int = 16
) -> Case:
    """One of the computations at a size."""

    def units(*size: int) -> Tensor:
        return normalize(torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))), dim=-1)

    images, known, text = units(batch, width), units(classes * shots, width), units(classes, width)
    if name == "CALIP":
        inputs = (units(batch, patches, width), images, text)
        literal = partial(literal_heads.calip_logits, alpha=0.5, beta2=1.12, beta3=0.02)
        return Case(inputs, {"fused": ops.calip_logits, "literal": literal}, {"fused": (), "literal": ()})
    labels, offsets = torch.arange(classes).repeat_interleave(shots), torch.arange(classes + 1) * shots
    beta, tau, hot = 5.5, 0.5, one_hot(labels, classes).float()
    if name == "Tip-Adapter":
        fused = partial(ops.affinity, labels=labels, classes=classes, beta=beta, offsets=offsets)
        forms = {"fused": fused, "literal": partial(literal_heads.affinity, one_hot=hot, beta=beta)}
        return Case((images, known), forms, {"fused": (known, labels, offsets), "literal": (known, hot)})
    head = ck.TipX(text, known, labels, 1.0, beta, 1.0, tau, "sum")
    near, nearest, like, unlike = head._support.extrema
    slope, others = (nearest - near) / (unlike - like), (known @ text.T / tau).log_softmax(1)

    def tipx(images: Tensor) -> Tensor:
        votes = literal_heads.affinity(images, known, hot, beta)
        alike = literal_heads.likeness(images, text, others, hot, tau)
        return 100 * images @ text.T + votes + shots * (near + slope * unlike) + slope * alike

    kept = {"fused": (known, labels, offsets, head._support.mass), "literal": (known, hot, others)}
    return Case((images,), {"fused": head, "literal": tipx}, kept)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    clock: Clock = "process" if arguments.threads == 1 else "wall"
    found = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(COMPUTATIONS))
        for name in COMPUTATIONS:
            bar.update(task, description=name)
            found += costs(name, arguments.threads, arguments.rounds, clock)
            bar.advance(task)
    Console(width=None if sys.stdout.isatty() else 160).print(draw(found, clock))
    if arguments.out:
        header = {
            "environment": environment(),
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "clock": clock,
        }
        write(found, header, arguments.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="rows; a .json beside it adds the environment")
    return parser.parse_args()


def costs(name: str, threads: int, rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """Time and memory of a computation's forms, which must agree."""
    case = case_of(name)
    with torch.inference_mode():
        results = [form(*case.inputs) for form in case.forms.values()]
        # Published, TIP-X takes differences of logarithms near -7, which fp32 rounds.
        torch.testing.assert_close(results[0], results[1], atol=1e-2, rtol=1e-4)
        times = measure({kind: partial(form, *case.inputs) for kind, form in case.forms.items()}, rounds, clock=clock)
    ratio = times.ratio("fused", "literal")
    found = []
    for kind in case.forms:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            held = pool.apply(most_held, (name, kind, threads))
        row = {"computation": name, "form": kind, "milliseconds": round(1e3 * times.of(kind).median, 2)}
        kept = sum(tensor.nbytes for tensor in case.kept[kind])
        row |= {"peak_mib": round(held / 2**20, 1), "kept_mib": round(kept / 2**20, 1), "threads": threads}
        row |= {f"over_literal{end}": round(value, 3) for end, value in zip(("", "_p10", "_p90"), ratio, strict=True)}
        found.append({**row, "commit": environment()["commit"]})
    return found


def draw(found: list[dict[str, Any]], clock: Clock) -> Table:
    """The rows for people."""
    table = Table("computation", "form", "ms", "peak MiB", "kept MiB", "× literal [p10-p90]", title=f"{clock} time")
    for row in found:
        speed = f"{row['over_literal']:.2f} [{row['over_literal_p10']:.2f}-{row['over_literal_p90']:.2f}]"
        figures = (f"{row[key]:.1f}" for key in ("milliseconds", "peak_mib", "kept_mib"))
        table.add_row(row["computation"], row["form"], *figures, speed if row["form"] == "fused" else "")
    return table


def most_held(name: str, kind: str, threads: int) -> int:
    """Bytes that one call holds at most beyond what was held before it."""
    torch.set_num_threads(threads)
    case = case_of(name)
    with torch.inference_mode():
        torch.randn(256, 256) @ torch.randn(256, 256)  # what the library allocates once
        return resident.most_held(partial(case.forms[kind], *case.inputs))


if __name__ == "__main__":
    main()
