"""Time every operation at the shapes of CLIP towers: reference, compiled reference, kernels, and common alternatives.

    pytest bench/ops.py -k "prune and B-16 and float32" --benchmark-json=ops.json
    pytest bench/ops.py --benchmark-autosave --benchmark-compare
    OMP_NUM_THREADS=1 pytest bench/ops.py --benchmark-timer=time.process_time    # on a shared machine
    pytest bench/ops.py --deadline 200     # skip cases that have not started after 200 s

A case is first checked against the fp64 reference, on two images; a wrong case fails and is not timed. Several sets of
inputs are used in turn. Except at the smallest batches they exceed any cache. On CUDA one run is a CUDA graph of up to
`MAX_CALLS` calls, and uses every set at least once. `extra_info` and `--rows` hold shape, dtype and environment, the
bytes that must move (each input and output once), the operations of matrix products, and derived figures: microseconds
per call (median, 20 % and 80 %), GB/s, TFLOP/s and the share of the floor. The floor is the longer of two times, both
measured on this device in the same session: a copy of those bytes, and a large product of that many operations.

Variants: `reference`; on CUDA also `compiled` and `triton`, and for attention `auto`, SDPA with a score kernel.
`compiled` is torch.compile of the reference in its exportable form, without scatters and stable sorts. The alternatives
are `sdpa`, attention without any signal; `topk`, pruning as users write it; and `literal`, a head's published formula
with every intermediate in memory. On CUDA `topk_compiled` and `literal_compiled` are also timed.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, one_hot, scaled_dot_product_attention

from bench.naive import distill as literal_distill
from bench.naive import heads as literal_heads
from bench.runners import CUDA, DEVICE, capture_calls, copy_rate, matmul_rate
from clipkernels.measure.environment import environment
from clipkernels.testing.cases import CASES
from clipkernels.testing.fp64 import check_against_fp64, flat, is_checkable
from clipkernels.testing.inputs import SHAPES, InputFactory

BATCHES = (1, 8, 64, 256) if CUDA else (1, 8)
DTYPES = (torch.bfloat16, torch.float32, *([torch.float16] if CUDA else []))
TOWERS = ("B-32", "B-16", "L-14", "L-14-336", *(["SO400M-14-384"] if CUDA else []))
# Minimum of the bytes of all input sets together, beyond any cache, and maximum number of sets.
MIN_BYTES, MAX_SETS = (1 << 28, 32) if CUDA else (1 << 24, 4)
# Maximum number of calls in a CUDA graph, and the seconds that they should fill, so that launching the graph and
# waiting for it do not count.
MAX_CALLS, SPAN = 200, 5e-3
# Number of images that a result is checked on.
CHECKED_IMAGES = 2
Call = Callable[..., Any]


def variants(op: str) -> list[str]:
    """Return the variants that an operation is timed in."""
    fused = ["triton", "compiled"] if CUDA else []
    if op.startswith("attention"):
        return ["reference", *fused, *(["auto"] if CUDA else []), "sdpa"]
    if op == "targeted_l1" and CUDA:  # the reference cannot be captured: it counts selected tokens on the host
        return ["triton", "literal", "literal_compiled"]
    if op in LITERAL:
        return ["reference", *fused, "literal", *(["literal_compiled"] if CUDA else [])]
    pruning = op in ("prune_tokens", "prune_tokens_heads_fuse_norm")
    return ["reference", *fused, *(["topk", *(["topk_compiled"] if CUDA else [])] if pruning else [])]


def build(op: str, variant: str, source: InputFactory) -> Call:
    """Return a variant as a function of the case's inputs."""
    case = CASES[op]
    if variant == "sdpa":

        def attend(packed: Tensor, size: Tensor | None = None) -> Tensor:
            bias = None if size is None else size.log()[:, None, None].to(packed.dtype)
            return scaled_dot_product_attention(*source.split(packed), attn_mask=bias)

        return attend
    if variant == "topk":
        return lambda *inputs: topk(source, *inputs)
    if "compiled" in variant:
        torch._dynamo.reset()
        plain = build(op, variant.removesuffix("_compiled") if variant != "compiled" else "reference", source)
        return torch.compile(plain, fullgraph=True, dynamic=False)
    if variant == "literal":
        return LITERAL[op]
    return lambda *inputs: case.call(source, variant, *inputs)


def literal_affinity(queries: Tensor, support: Tensor, hot: Tensor) -> Tensor:
    """Return Tip-Adapter's votes from its two products."""
    return literal_heads.affinity(queries, support, hot, 5.5)


LITERAL: dict[str, Call] = {
    "calip_logits": lambda *inputs: literal_heads.calip_logits(*inputs, 0.5, 1.12, 0.02),
    "affinity": literal_affinity,
    "targeted_l1": lambda h, g, weights, mask, p: literal_distill.targeted_l1(h, g, p, weights, mask),
}


def input_sets(op: str, source: InputFactory) -> list[tuple[Tensor, ...]]:
    """Return 2 to MAX_SETS sets of inputs, with MIN_BYTES together if the maximum allows it."""
    first = CASES[op].inputs(source)
    sets = math.ceil(MIN_BYTES / sum(tensor.nbytes for tensor in first))
    return [first, *(CASES[op].inputs(source) for _ in range(max(2, min(MAX_SETS, sets)) - 1))]


def literal_inputs(op: str, source: InputFactory, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the arguments of a published formula that correspond to a case's inputs."""
    if op != "affinity":
        return inputs
    queries, support, labels, _ = inputs
    return queries, support, one_hot(labels, source.classes).to(queries.dtype)


def topk(source: InputFactory, x: Tensor, scores: Tensor, *norm: Tensor) -> tuple[Tensor, ...]:
    """Prune with topk, gather and cat. Per-head scores are averaged, other patches fused, and the result normed."""
    prefix, patches = x[:, : source.shape.prefix], x[:, source.shape.prefix :]
    mean = scores.mean(1) if scores.ndim == 3 else scores
    index = mean.topk(source.keep).indices
    kept_patches = patches.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    if not norm:
        return torch.cat([prefix, kept_patches], 1), index
    fused = mean.scatter(1, index, 0.0)[:, None].to(x.dtype) @ patches
    tokens = torch.cat([prefix, kept_patches, fused], 1)
    return tokens, index, layer_norm(tokens, x.shape[-1:], *norm)


def products(op: str, source: InputFactory) -> int | None:
    """Return the operations of an operation's matrix products, two for a multiply-add; None without products."""
    shape, batch = source.shape, source.batch
    n, similarities = shape.tokens, batch * source.patches * source.classes * source.embedding
    pooled, tokens, channels = 64, 32, 256  # as in clipkernels.testing.cases
    counts = {
        "rank_tokens": 2 * batch * n * shape.width,
        "predict_scores": 4 * batch * n * pooled * (tokens + channels),
        "match_tokens": 2 * batch * (n // 2) * (n - n // 2) * (shape.width // shape.heads),
        "cross_attention": 6 * similarities,
        "calip_logits": 4 * similarities,
        "affinity": 2 * batch * source.support * source.embedding,
        "targeted_l1": 2 * batch * math.ceil(0.4 * n) * shape.width * source.embedding,
    }
    return 4 * batch * n**2 * shape.width if op.startswith("attention") else counts.get(op)


@pytest.fixture(scope="session")
def matmul_tflops(request: pytest.FixtureRequest) -> dict[torch.dtype, float]:
    """Return TFLOP/s of a large product of random matrices, by timed dtype; measured before any graph is captured."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    timed = {values.get("dtype") for values in params}
    return {dtype: matmul_rate(dtype, DEVICE) for dtype in DTYPES if dtype in timed}


@pytest.fixture(scope="session")
def copy_gb() -> float:
    """Return GB/s of a large copy, measured before any graph is captured."""
    return copy_rate(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: f"b{batch}")
@pytest.mark.parametrize(
    ("op", "variant", "shape"),
    [(op, v, shape) for op in CASES for v in variants(op) for shape in TOWERS if is_checkable(op, SHAPES[shape])],
)
def test_op(
    benchmark: Any,
    request: pytest.FixtureRequest,
    copy_gb: float,
    matmul_tflops: dict[torch.dtype, float],
    op: str,
    variant: str,
    shape: str,
    batch: int,
    dtype: torch.dtype,
) -> None:
    """Time one call of one operation."""
    case = CASES[op]
    source = InputFactory(SHAPES[shape], batch, dtype, DEVICE)
    inputs = input_sets(op, source)
    call = build(op, variant, source)
    arguments = [literal_inputs(op, source, values) for values in inputs] if "literal" in variant else inputs
    with torch.inference_mode():
        check_small(op, variant, source)
        results = flat(call(*arguments[0]))
        assert results[0].isfinite().all()
        run, calls = runner(call, arguments)
        benchmark.group = f"{op} {shape} b{batch} {dtype}"
        benchmark(run)
    unread = case.unread_bytes(source) if case.unread_bytes else 0
    num_bytes = sum(tensor.nbytes for tensor in (*inputs[0], *results)) - unread
    flops = products(op, source)
    info = {"op": op, "variant": variant, **source.shape._asdict(), "tower": shape, "batch": batch}
    info |= {"dtype": str(dtype).removeprefix("torch."), "bytes": num_bytes, "copy_gb_per_s": copy_gb, "flops": flops}
    info |= {"matmul_tflop_per_s": matmul_tflops[dtype]}
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median / calls
        times = [1e6 * value / calls for value in benchmark.stats.stats.data]
        fifths = statistics.quantiles(times, n=5) if len(times) > 1 else times * 4
        info |= {"microseconds": 1e6 * seconds, "p20": fifths[0], "p80": fifths[3], "rounds": len(times)}
        info |= {"gb_per_s": num_bytes / seconds / 1e9, "of_copy": num_bytes / seconds / 1e9 / copy_gb}
        info |= {"tflop_per_s": flops and flops / seconds / 1e12}
        floor = max(num_bytes / copy_gb / 1e9, (flops or 0) / matmul_tflops[dtype] / 1e12)
        info |= {"floor_microseconds": 1e6 * floor, "of_floor": floor / seconds}
    benchmark.extra_info |= info | environment()
    if request.config.getoption("--rows") and benchmark.stats is not None:
        append(benchmark.extra_info, Path(request.config.getoption("--rows")))


def append(row: dict[str, Any], target: Path) -> None:
    """Append a row to a CSV, with a header if the file is new."""
    new = not target.exists()
    with target.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def check_small(op: str, variant: str, source: InputFactory) -> None:
    """Check a variant on two images, or a compiled variant at its own batch.

    Raises:
        AssertionError: the results are wrong.
    """
    if variant.startswith(("topk", "literal")):  # they break ties differently, and sum halves in half precision
        return
    batch = source.batch if variant == "compiled" else min(source.batch, CHECKED_IMAGES)
    small = InputFactory(source.shape, batch, source.dtype, source.device)
    inputs = CASES[op].inputs(small)
    check(op, variant, small, inputs, flat(build(op, variant, small)(*inputs)))


def check(op: str, variant: str, source: InputFactory, inputs: tuple[Tensor, ...], results: list[Tensor]) -> None:
    """Check results of a variant against fp64.

    Raises:
        AssertionError: the results are wrong.
    """
    case = CASES[op]
    if variant == "sdpa":
        case = case._replace(call=lambda source, _, *inputs: CASES[op].call(source, "reference", *inputs)[0])
    # Only our kernels have the kernels' error budget; every other variant has PyTorch's.
    verdict = check_against_fp64(case, source, inputs, results, "triton" if variant == "triton" else "reference")
    assert verdict.fault is None, verdict.fault


def runner(call: Call, inputs: list[tuple[Tensor, ...]]) -> tuple[Callable[[], object], int]:
    """Return the function to time, and the number of calls that it makes."""
    if not CUDA:
        turn = cycle(inputs)
        return lambda: call(*next(turn)), 1
    return capture_calls(call, inputs, SPAN, MAX_CALLS)
