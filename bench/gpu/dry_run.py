"""Run a benchmark of `make gpu` without a GPU: every line of it, at toy sizes, with meaningless figures.

    python -m bench.gpu.dry_run -m bench.towers --models ViT-B-16 --graphs 8 --out towers.csv
    python -m bench.gpu.dry_run -m pytest bench/ops.py --rows ops.csv

The benchmark times the variants of a GPU on the CPU. A call that requests a kernel runs the reference, so results are
still checked. torch.compile leaves code as it is. A CUDA graph is a plain call. Every tower is the bundled one. Batches
have at most two images. Pools of processes are threads. Tests are collected and not run.
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
    """Return the arguments for the CPU: one round, operations at one shape and batch, tests collected only."""
    short = ["cpu" if argument == "cuda" else argument for argument in arguments]
    if "--rounds" in short:
        short[short.index("--rounds") + 1] = "1"
    if "bench/ops.py" in short:
        expression = short.index("-k") + 1
        short[expression] = f"({short[expression]}) and B-16-b256"
    if any(argument.startswith("tests/") for argument in short):
        short.append("--collect-only")
    return short


def install() -> None:
    """Replace everything that needs a GPU. It has to run before any benchmark is imported."""
    from bench import models, runners
    from clipkernels import backend, bundled
    from clipkernels.testing import inputs

    choose = backend.choose

    def reference(option: str, *arguments: Any, **options: Any) -> str:
        return choose("reference" if option == "triton" else option, *arguments, **options)

    def toy_source(original: Callable[..., None]) -> Callable[..., None]:
        def init(source: Any, shape: Any, batch: int, *arguments: Any, **options: Any) -> None:
            original(source, shape, min(batch, TOY_BATCH), *arguments, **options)

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
    runners.in_cuda_graph = lambda variant, images: variant
    runners.capture_calls = call_in_turn
    runners.launches = lambda run: len([run()])
    torch.compile = compiled  # type: ignore[assignment]
    concurrent.futures.ProcessPoolExecutor = Threads  # type: ignore[assignment, misc]


def call_in_turn(
    call: Callable[..., object], inputs: Sequence[Sequence[Tensor]], span: float = 0.0, max_calls: int = 1
) -> tuple[Callable[[], None], int]:
    """Stand in for `bench.runners.capture_calls`: plain calls in place of a CUDA graph."""

    def replay() -> None:
        for arguments in inputs:
            call(*arguments)

    return replay, len(inputs)


def compiled(function: Any = None, **options: Any) -> Any:
    """Stand in for torch.compile: return the function as it is."""
    return function if function is not None else lambda inner: inner


class Threads(concurrent.futures.ThreadPoolExecutor):
    """A pool of one thread that accepts the arguments of a pool of processes."""

    def __init__(self, jobs: int | None = None, mp_context: object = None, **options: Any) -> None:
        super().__init__(1, **options)


if __name__ == "__main__":
    main()
