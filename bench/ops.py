"""Every operation, on every backend that serves this machine, at the shapes of four CLIP towers.

    pytest bench/ops.py -k "prune and B-16 and float32" --benchmark-json=ops.json
    pytest bench/ops.py --benchmark-autosave --benchmark-compare
    OMP_NUM_THREADS=1 pytest bench/ops.py --benchmark-timer=time.process_time    # on a shared machine

A case is first checked against the fp64 reference and fails without a time if it is wrong. Inputs are several sets
used in turn; on CUDA one run is a CUDA graph over all of them. `extra_info` holds shape, dtype and environment, the
bytes that must move (each input and output once), and what follows: microseconds per call and GB/s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import cycle
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import clipkernels as ck
from clipkernels.cli.info import environment
from clipkernels.testing import assert_within_budget

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BACKENDS = ("reference", "triton") if CUDA else ("reference",)
BATCHES = (1, 8, 64, 256) if CUDA else (1, 8)
DTYPES = (torch.float32, torch.bfloat16, *([torch.float16] if CUDA else []))
SETS = 4
ALLOWED = 16  # error of the reference itself, in units of eps(dtype) · ‖f‖∞


class Shape(NamedTuple):
    """A tower: tokens, width, heads, and a ToMe r that about halves them over its depth."""

    tokens: int
    width: int
    heads: int
    r: int


SHAPES = {
    "B-32": Shape(50, 768, 12, 4),
    "B-16": Shape(197, 768, 12, 13),
    "L-14": Shape(257, 1024, 16, 7),
    "L-14-336": Shape(577, 1024, 16, 16),
}


class Source:
    """Random inputs of one dtype at one shape and batch."""

    def __init__(self, shape: Shape, batch: int, dtype: torch.dtype, seed: int) -> None:
        self.shape, self.batch, self.dtype = shape, batch, dtype
        self.generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(self.batch, *size, generator=self.generator, device=DEVICE).to(self.dtype)

    def heads(self) -> Tensor:
        return self.normal(self.shape.heads, self.shape.tokens, self.shape.width // self.shape.heads)

    def keys(self) -> Tensor:
        return self.normal(self.shape.tokens, self.shape.width // self.shape.heads)

    def tokens(self) -> Tensor:
        return self.normal(self.shape.tokens, self.shape.width)

    def scores(self) -> Tensor:
        size = (self.batch, self.shape.tokens - 1)
        return torch.randn(size, generator=self.generator, device=DEVICE).softmax(1)

    def norm(self) -> tuple[Tensor, Tensor]:
        return self.normal(self.shape.width)[0], self.normal(self.shape.width)[0]

    def sizes(self) -> Tensor:
        size = (self.batch, self.shape.tokens)
        return torch.randint(1, 5, size, generator=self.generator, device=DEVICE).float()

    def match(self) -> tuple[Tensor, ...]:
        return ck.ops.match_tokens(self.keys(), self.shape.r, backend="reference")

    @property
    def keep(self) -> int:
        return math.ceil(0.7 * (self.shape.tokens - 1))


class Case(NamedTuple):
    """An operation: flat inputs, the call, and the bytes that it need not read although they are passed."""

    inputs: Callable[[Source], tuple[Tensor, ...]]
    call: Callable[..., Any]
    unread: Callable[[Source], int] = lambda source: 0


def attention(signal: str | None) -> Case:
    return Case(
        lambda source: (source.heads(), source.heads(), source.heads()),
        lambda source, backend, q, k, v: ck.ops.attention(q, k, v, signal=signal, backend=backend),
    )


CASES = {
    "attention": attention(None),
    "attention_cls": attention("cls"),
    "attention_received": attention("received"),
    "attention_keys": attention("keys"),
    "rank_tokens": Case(
        lambda source: (source.heads(), source.heads()),
        lambda source, backend, q, k: ck.ops.rank_tokens(q, k, backend=backend),
        lambda source: source.batch * (source.shape.tokens - 1) * source.shape.width * source.dtype.itemsize,
    ),
    "prune_tokens": Case(
        lambda source: (source.tokens(), source.scores()),
        lambda source, backend, x, scores: ck.ops.prune_tokens(x, scores, source.keep, backend=backend),
        lambda source: (
            source.batch * (source.shape.tokens - 1 - source.keep) * source.shape.width * source.dtype.itemsize
        ),
    ),
    "prune_tokens_fuse_norm": Case(
        lambda source: (source.tokens(), source.scores(), *source.norm()),
        lambda source, backend, x, scores, weight, bias: ck.ops.prune_tokens(
            x, scores, source.keep, fuse=True, norm=(weight, bias, 1e-5), backend=backend
        ),
    ),
    "match_tokens": Case(
        lambda source: (source.keys(),),
        lambda source, backend, metric: ck.ops.match_tokens(metric, source.shape.r, backend=backend),
    ),
    "merge_tokens": Case(
        lambda source: (source.tokens(), source.sizes(), *source.match()),
        lambda source, backend, x, size, *match: ck.ops.merge_tokens(x, ck.ops.Match(*match), size, backend=backend),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: f"b{batch}")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", CASES)
def test_op(benchmark: Any, op: str, backend: str, shape: str, batch: int, dtype: torch.dtype) -> None:
    """Time of one call of one operation."""
    case = CASES[op]
    source = Source(SHAPES[shape], batch, dtype, seed=0)
    inputs = [case.inputs(source) for _ in range(SETS)]
    with torch.inference_mode():
        try:
            came = case.call(source, backend, *inputs[0])
        except RuntimeError as error:
            if "has no Triton kernel" not in str(error):
                raise
            pytest.skip(str(error))
        check(case, source, backend, inputs[0], flat(came))
        run, calls = runner(case, source, backend, inputs)
        benchmark.group = f"{op} {shape} b{batch} {dtype}"
        benchmark(run)
    moved = sum(tensor.nbytes for tensor in (*inputs[0], *flat(came))) - case.unread(source)
    info = {"op": op, "backend": backend, **source.shape._asdict(), "batch": batch, "dtype": str(dtype), "bytes": moved}
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median / calls
        info |= {"microseconds": 1e6 * seconds, "gb_per_s": moved / seconds / 1e9}
    benchmark.extra_info |= info | environment()


def runner(
    case: Case, source: Source, backend: str, inputs: list[tuple[Tensor, ...]]
) -> tuple[Callable[[], object], int]:
    """What to time, and how many calls it makes."""
    if not CUDA:
        turn = cycle(inputs)
        return lambda: case.call(source, backend, *next(turn)), 1
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up and compilation stay out of the graph
        for some in inputs:
            case.call(source, backend, *some)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for some in inputs:
            case.call(source, backend, *some)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay, len(inputs)


def check(case: Case, source: Source, backend: str, inputs: tuple[Tensor, ...], came: list[Tensor]) -> None:
    """Fails unless the result is right: choices equal to the reference's, values within the error budget."""
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    exact = flat(case.call(source, "reference", *wide))
    eager = flat(case.call(source, "reference", *inputs))
    for result, right, plain in zip(came, exact, eager, strict=True):
        if not result.is_floating_point():
            torch.testing.assert_close(result, plain, rtol=0, atol=0)
        elif backend == "reference":
            error, scale = (result.double() - right).abs().max(), right.abs().max()
            assert error <= ALLOWED * torch.finfo(source.dtype).eps * scale, (
                f"error {error:.2e} on values to {scale:.2e}"
            )
        else:
            assert_within_budget(result, right, plain)


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result if part is not None for tensor in flat(part)]
