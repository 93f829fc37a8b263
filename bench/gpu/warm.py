"""Compile the kernels that the first steps of `make gpu` launch, in parallel processes, without timing anything.

    python -m bench.gpu.warm --models ViT-B-16 ViT-L-14

Every process runs its jobs once, on the GPU, at the shapes that are timed later. Triton and PyTorch's compiler keep the
results on disk, where later processes find them. A failing job is reported and does not stop the others; the step that
measures it reports the details.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import NamedTuple

import torch

import clipkernels as ck
from bench.models import build, images, methods
from bench.runners import DEVICE
from clipkernels.measure.timing import HOST, vary
from clipkernels.testing.cases import CASES
from clipkernels.testing.inputs import SHAPES, InputFactory

JOBS = 8
SHAPES_FIRST = ("B-16", "L-14-336")


class Job(NamedTuple):
    """An operation at a shape and batch, a model's methods at a batch, or a model's compiled host and `Dense()`."""

    kind: str
    name: str
    batch: int


def main() -> None:
    arguments = parse()
    started = time.monotonic()
    jobs = [Job("compiled", name, batch) for name in arguments.models[:1] for batch in (256, 1)]
    jobs += [Job("tower", name, batch) for name in arguments.models for batch in (1, 32)]
    jobs += [Job(op, shape, batch) for op in CASES for shape in SHAPES_FIRST for batch in (1, 2)]
    failed = 0
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(call, job): job for job in jobs}
        for future in as_completed(futures):
            problem = future.result()
            if problem:
                failed += 1
                print(f"{' '.join(map(str, futures[future]))}: {problem}", flush=True)
    print(f"{len(jobs) - failed} of {len(jobs)} ran, in {time.monotonic() - started:.0f} s")
    if failed == len(jobs):
        sys.exit(1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B-16"], metavar="NAME", help="open_clip models")
    parser.add_argument("--jobs", type=int, default=JOBS, metavar="N", help="processes; default %(default)s")
    return parser.parse_args()


def call(job: Job) -> str | None:
    """Run a job once; return the last line of its traceback, or None if it succeeds."""
    try:
        with torch.inference_mode():
            if job.kind == "tower":
                run_tower(job.name, job.batch)
            elif job.kind == "compiled":
                run_compiled(job.name, job.batch)
            else:
                source = InputFactory(SHAPES[job.name], job.batch, torch.bfloat16, DEVICE)
                CASES[job.kind].call(source, "triton", *CASES[job.kind].inputs(source))
    except Exception:  # the step that measures the job reports the full traceback
        return traceback.format_exc().splitlines()[-1]
    return None


def run_tower(name: str, batch: int) -> None:
    """Run every method of the first steps on one batch."""
    model = build(name, torch.bfloat16)
    tower = ck.tower_of(model)
    for method in methods(name, model).values():
        if method is not None:
            with ck.patched(model, method):
                tower.encode(images(tower, batch, torch.bfloat16, 1)[0])


def run_compiled(name: str, batch: int) -> None:
    """Run the host and `Dense()` under torch.compile."""
    model = build(name, torch.bfloat16)
    for variant in vary(model, {HOST: None, "Dense()": ck.Dense()}).values():
        encode = torch.compile(variant.encode, mode="default", dynamic=False)
        encode(images(ck.tower_of(model), batch, torch.bfloat16, 1)[0])


if __name__ == "__main__":
    main()
