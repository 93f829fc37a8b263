"""Runs a bench of `make gpu` without a GPU: every line of it at toy sizes, no figure meaning anything.

    python -m bench.gpu.dry_run -m bench.towers --models ViT-B-16 --graphs 8 --out towers.csv
    python -m bench.gpu.dry_run -m pytest bench/ops.py --rows ops.csv

A bench then times the variants of a GPU on the CPU: what asks for a kernel takes the reference, so that results are
still checked; torch.compile leaves code as it is; a CUDA graph is a plain call; a tower is the bundled one; batches
hold two images at most; pools of processes are threads. Tests are collected and not run.
"""

from __future__ import annotations

import concurrent.futures
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

TOY_BATCH = 2


def main() -> None:
    install()
    arguments = shortened(sys.argv[1:])
    module, *rest = arguments[1:]  # after -m
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def shortened(arguments: list[str]) -> list[str]:
    """The arguments of a bench on the CPU with one round, operations at one shape and batch, and tests collected."""
    short = ["cpu" if argument == "cuda" else argument for argument in arguments]
    if "--rounds" in short:
        short[short.index("--rounds") + 1] = "1"
    if "bench/ops.py" in short:
        chosen = short.index("-k") + 1
        short[chosen] = f"({short[chosen]}) and B-16-b256"
    if any(argument.startswith("tests/") for argument in short):
        short.append("--collect-only")
    return short


def install() -> None:
    """Replaces what needs a GPU, before any bench is imported."""
    from bench import models, runners
    from clipkernels import backend, bundled
    from clipkernels.testing import inputs

    choose = backend.choose

    def reference(wanted: str, *arguments: Any, **named: Any) -> str:
        return choose("reference" if wanted == "triton" else wanted, *arguments, **named)

    def toy_source(made: Callable[..., None]) -> Callable[..., None]:
        def init(source: Any, shape: Any, batch: int, *arguments: Any, **named: Any) -> None:
            made(source, shape, min(batch, TOY_BATCH), *arguments, **named)

        return init

    def toy_images(tower: Any, batch: int, dtype: torch.dtype, sets: int = 3) -> tuple[Tensor, ...]:
        return images(tower, min(batch, TOY_BATCH), dtype, sets)

    images = models.images
    backend.choose = reference
    inputs.SHAPES.update({name: inputs.Shape(21, 128, 2, shape.prefix, 4) for name, shape in inputs.SHAPES.items()})
    inputs.InputFactory.__init__ = toy_source(inputs.InputFactory.__init__)  # type: ignore[method-assign]
    models.build = lambda name, dtype: bundled()[0].to(dtype)  # type: ignore[assignment]
    models.images = toy_images
    runners.CUDA, runners.MATMUL_SIDE["cpu"], runners.COPY_BYTES["cpu"] = True, 256, 1 << 22
    runners.captured = lambda variant, images: variant
    runners.replayed = call_in_turn
    runners.launches = lambda run: len([run()])
    torch.compile = compiled  # type: ignore[assignment]
    concurrent.futures.ProcessPoolExecutor = Threads  # type: ignore[assignment, misc]


def call_in_turn(
    call: Callable[..., object], inputs: Sequence[Sequence[Tensor]], span: float = 0.0, most: int = 1
) -> tuple[Callable[[], None], int]:
    """Plain calls in place of a CUDA graph."""

    def replay() -> None:
        for own in inputs:
            call(*own)

    return replay, len(inputs)


def compiled(function: Any = None, **options: Any) -> Any:
    """torch.compile, which compiles nothing."""
    return function if function is not None else lambda inner: inner


class Threads(concurrent.futures.ThreadPoolExecutor):
    """A pool of one thread with the arguments of a pool of processes."""

    def __init__(self, jobs: int | None = None, mp_context: object = None, **options: Any) -> None:
        super().__init__(1, **options)


if __name__ == "__main__":
    main()
