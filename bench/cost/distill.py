"""Measure time and memory of CLIP-TD's distance, forward and backward, against the published formula.

    python -m bench.cost.distill --out distill-cost.csv
    python -m bench.cost.distill --device cuda --dtype bfloat16 --batch 256

The fused form is `ck.ops.targeted_l1`. The inputs are B = 64 texts of 50 tokens and images of 197 tokens, d = 768,
E = 512, with two in five tokens selected. Gradients are those of the tokens and of each modality's projection. Figures
are CPU time of one thread, or wall time of several threads or of a GPU; and the peak memory above the memory before the
call, gradients included: of a separate process on a CPU, of PyTorch's allocator on a GPU.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.cost import peak_rss
from bench.naive import distill as literal_distill
from bench.result_files import write
from clipkernels import ops
from clipkernels.measure.environment import environment
from clipkernels.measure.memory import peak
from clipkernels.measure.timing import Clock, measure

LOSSES = {"text": (50,), "image": (197,), "both": (50, 197)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ModalityInputs(NamedTuple):
    """One modality: student (B,n,d), teacher (B,n,E), projection (E,d), weights and mask (B,n)."""

    student: Tensor
    teacher: Tensor
    projection: Tensor
    weights: Tensor
    mask: Tensor


def inputs_of(
    loss: str,
    batch: int = 64,
    width: int = 768,
    embedding: int = 512,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[ModalityInputs]:
    """Return random inputs of a loss, one for each modality, with leaves where the loss has gradients.

    Every distance is far enough from 0 that rounding cannot change its sign.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    inputs = []
    for tokens in LOSSES[loss]:
        order = torch.rand(batch, tokens, generator=generator, device=device).argsort(1)
        mask = order < math.ceil(0.4 * tokens)
        weights = torch.rand(batch, tokens, generator=generator, device=device)
        student, projection = normal(batch, tokens, width), normal(embedding, width) * width**-0.5
        teacher = normal(batch, tokens, embedding)
        # Row by row, because the freed temporaries of one large product would hide the peak of the timed call.
        for teacher_row, student_row in zip(teacher, student, strict=True):
            teacher_row.clamp_(-1, 1).add_(teacher_row.sign(), alpha=0.1).add_(student_row @ projection.T)
        inputs.append(ModalityInputs(student.requires_grad_(), teacher, projection.requires_grad_(), weights, mask))
    return inputs


def fused(inputs: ModalityInputs) -> Tensor:
    """Return the distances (B,) by the fused operation."""
    return ops.targeted_l1(*inputs)


def literal(inputs: ModalityInputs) -> Tensor:
    """Return the distances (B,) by the published formula."""
    return literal_distill.targeted_l1(*inputs)


FORMS = {"fused": fused, "literal": literal}


def step(form: Callable[[ModalityInputs], Tensor], inputs: Sequence[ModalityInputs]) -> tuple[Tensor, ...]:
    """Return the loss and its gradients with respect to the students and projections."""
    loss = torch.stack([form(modality).mean() for modality in inputs]).sum()
    leaves = [leaf for modality in inputs for leaf in (modality.student, modality.projection)]
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    clock: Clock = "process" if arguments.threads == 1 and arguments.device == "cpu" else "wall"
    rows = [row for loss in LOSSES for row in costs(loss, arguments, clock)]
    Console(width=None if sys.stdout.isatty() else 160).print(draw(rows, clock))
    if arguments.out:
        header = {"environment": environment(), "threads": arguments.threads, "rounds": arguments.rounds}
        header |= {"clock": clock, "device": arguments.device, "dtype": arguments.dtype, "batch": arguments.batch}
        write(rows, header, arguments.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="texts and images; default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds; default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="rows; FILE.json adds the environment")
    return parser.parse_args()


def costs(loss: str, arguments: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """Return rows with time and memory of a loss's forms, whose results must agree."""
    options = {"batch": arguments.batch, "dtype": DTYPES[arguments.dtype], "device": arguments.device}
    inputs = inputs_of(loss, **options)
    check(inputs)

    def run(form: Callable[[ModalityInputs], Tensor]) -> None:
        step(form, inputs)
        if arguments.device == "cuda":
            torch.cuda.synchronize()

    times = measure({name: partial(run, form) for name, form in FORMS.items()}, arguments.rounds, clock=clock)
    ratio = times.ratio("fused", "literal")
    rows = []
    for name in FORMS:
        if arguments.device == "cuda":
            num_bytes = peak(partial(step, FORMS[name], inputs), torch.device("cuda")) or 0
        else:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                num_bytes = pool.apply(peak_bytes, (loss, name, arguments.threads, options))
        row = {"loss": loss, "form": name, "milliseconds": round(1e3 * times.of(name).median, 2)}
        row |= {"peak_mib": round(num_bytes / 2**20, 1), "threads": arguments.threads}
        row |= {f"over_literal{end}": round(value, 3) for end, value in zip(("", "_p10", "_p90"), ratio, strict=True)}
        rows.append({**row, "commit": environment()["commit"]})
    return rows


def check(inputs: Sequence[ModalityInputs]) -> None:
    """Compare loss and gradients of both forms.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    allowed = max(2 * torch.finfo(inputs[0].student.dtype).eps, 1e-5)
    for actual, expected in zip(step(fused, inputs), step(literal, inputs), strict=True):
        error = (actual.double() - expected.double()).norm() / expected.double().norm()
        assert error <= allowed, f"fused and literal forms differ by {error:.1e}, expected at most {allowed:.0e}"


def draw(rows: list[dict[str, Any]], clock: Clock) -> Table:
    """Return a terminal table of the rows."""
    table = Table("loss", "form", "ms", "peak MiB", "× literal [p10-p90]", title=f"{clock} time")
    for row in rows:
        speed = f"{row['over_literal']:.2f} [{row['over_literal_p10']:.2f}-{row['over_literal_p90']:.2f}]"
        figures = (f"{row[key]:.1f}" for key in ("milliseconds", "peak_mib"))
        table.add_row(row["loss"], row["form"], *figures, speed if row["form"] == "fused" else "")
    return table


def peak_bytes(loss: str, name: str, threads: int, options: dict[str, Any]) -> int:
    """Return the peak bytes of one step above the memory before it."""
    torch.set_num_threads(threads)
    inputs = inputs_of(loss, **options)
    step(FORMS[name], inputs_of("text", **{**options, "batch": 2}))  # triggers the libraries' one-time allocations
    return peak_rss.peak_increase(partial(step, FORMS[name], inputs))


if __name__ == "__main__":
    main()
