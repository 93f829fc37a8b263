"""What CLIP-TD's distance costs, forward and backward, beside the formula as it reads.

    python -m bench.cost.distill --out distill-cost.csv
    python -m bench.cost.distill --device cuda --dtype bfloat16 --batch 256

Fused is `ck.ops.targeted_l1`. B = 64 students' texts of 50 tokens and images of 197, d = 768, E = 512, two in five
tokens selected; gradients of the tokens and of each modality's projection. CPU time of one thread, wall time of more or
until a GPU is done, and the most memory that was ever held beyond what was there before, gradients included: on a CPU
of a process of its own, on a GPU by PyTorch's allocator.
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

from bench.cost import peak_rss as resident
from bench.naive import distill as literal_distill
from bench.result_files import write
from clipkernels import ops
from clipkernels.measure.environment import environment
from clipkernels.measure.memory import peak
from clipkernels.measure.timing import Clock, measure

LOSSES = {"text": (50,), "image": (197,), "both": (50, 197)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Told(NamedTuple):
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
) -> list[Told]:
    """What a loss is taken of: random, with leaves where it has a gradient, and no distance so near 0 that rounding
    could change its sign."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    found = []
    for tokens in LOSSES[loss]:
        order = torch.rand(batch, tokens, generator=generator, device=device).argsort(1)
        mask = order < math.ceil(0.4 * tokens)
        weights = torch.rand(batch, tokens, generator=generator, device=device)
        student, projection = normal(batch, tokens, width), normal(embedding, width) * width**-0.5
        teacher = normal(batch, tokens, embedding)
        for one, other in zip(teacher, student, strict=True):  # at once it would leave room that no peak shows
            one.clamp_(-1, 1).add_(one.sign(), alpha=0.1).add_(other @ projection.T)
        found.append(Told(student.requires_grad_(), teacher, projection.requires_grad_(), weights, mask))
    return found


def fused(told: Told) -> Tensor:
    return ops.targeted_l1(*told)


def literal(told: Told) -> Tensor:
    return literal_distill.targeted_l1(*told)


FORMS = {"fused": fused, "literal": literal}


def step(form: Callable[[Told], Tensor], given: Sequence[Told]) -> tuple[Tensor, ...]:
    """The loss and its gradients."""
    loss = torch.stack([form(told).mean() for told in given]).sum()
    leaves = [leaf for told in given for leaf in (told.student, told.projection)]
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    clock: Clock = "process" if arguments.threads == 1 and arguments.device == "cpu" else "wall"
    found = [row for loss in LOSSES for row in costs(loss, arguments, clock)]
    Console(width=None if sys.stdout.isatty() else 160).print(draw(found, clock))
    if arguments.out:
        header = {"environment": environment(), "threads": arguments.threads, "rounds": arguments.rounds}
        header |= {"clock": clock, "device": arguments.device, "dtype": arguments.dtype, "batch": arguments.batch}
        write(found, header, arguments.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="rows; a .json beside it adds the environment")
    return parser.parse_args()


def costs(loss: str, arguments: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """Time and memory of a loss's forms, which must agree."""
    options = {"batch": arguments.batch, "dtype": DTYPES[arguments.dtype], "device": arguments.device}
    given = inputs_of(loss, **options)
    check(given)

    def run(form: Callable[[Told], Tensor]) -> None:
        step(form, given)
        if arguments.device == "cuda":
            torch.cuda.synchronize()

    times = measure({name: partial(run, form) for name, form in FORMS.items()}, arguments.rounds, clock=clock)
    ratio = times.ratio("fused", "literal")
    found = []
    for name in FORMS:
        if arguments.device == "cuda":
            held = peak(partial(step, FORMS[name], given), torch.device("cuda")) or 0
        else:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                held = pool.apply(most_held, (loss, name, arguments.threads, options))
        row = {"loss": loss, "form": name, "milliseconds": round(1e3 * times.of(name).median, 2)}
        row |= {"peak_mib": round(held / 2**20, 1), "threads": arguments.threads}
        row |= {f"over_literal{end}": round(value, 3) for end, value in zip(("", "_p10", "_p90"), ratio, strict=True)}
        found.append({**row, "commit": environment()["commit"]})
    return found


def check(given: Sequence[Told]) -> None:
    """Fails unless both forms give the same loss and gradients, up to rounding."""
    within = max(2 * torch.finfo(given[0].student.dtype).eps, 1e-5)
    for one, other in zip(step(fused, given), step(literal, given), strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error <= within, f"fused and literal forms differ by {error:.1e}, {within:.0e} allowed"


def draw(found: list[dict[str, Any]], clock: Clock) -> Table:
    """The rows for people."""
    table = Table("loss", "form", "ms", "peak MiB", "× literal [p10-p90]", title=f"{clock} time")
    for row in found:
        speed = f"{row['over_literal']:.2f} [{row['over_literal_p10']:.2f}-{row['over_literal_p90']:.2f}]"
        figures = (f"{row[key]:.1f}" for key in ("milliseconds", "peak_mib"))
        table.add_row(row["loss"], row["form"], *figures, speed if row["form"] == "fused" else "")
    return table


def most_held(loss: str, name: str, threads: int, options: dict[str, Any]) -> int:
    """Bytes that one step holds at most beyond what was held before it."""
    torch.set_num_threads(threads)
    given = inputs_of(loss, **options)
    step(FORMS[name], inputs_of("text", **{**options, "batch": 2}))  # what libraries allocate once
    return resident.most_held(partial(step, FORMS[name], given))


if __name__ == "__main__":
    main()
