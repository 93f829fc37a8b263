"""Every operation at the shapes of CLIP towers: the reference, the same compiled, the kernels, and what others use.

    pytest bench/ops.py -k "prune and B-16 and float32" --benchmark-json=ops.json
    pytest bench/ops.py --benchmark-autosave --benchmark-compare
    OMP_NUM_THREADS=1 pytest bench/ops.py --benchmark-timer=time.process_time    # on a shared machine
    pytest bench/ops.py --deadline 200     # what has not begun after 200 s is skipped

A case is first checked against the fp64 reference, on two images, and fails without a time if it is wrong. Inputs are
several sets used in turn, more than a cache holds but at the smallest batches; on CUDA one run is a CUDA graph of up to
`MOST` calls, every set at least once. `extra_info` and `--rows` hold shape, dtype and environment, the bytes that must
move (each input and output once), the operations of matrix products, and what follows: microseconds per call (median,
20 % and 80 %), GB/s and TFLOP/s, and the share of the floor: the longer of the times that a copy of those bytes and a
large product of so many operations take on this device in the same session.

Variants: `reference`; on CUDA also `compiled` (torch.compile of the reference, which is then the form that exports,
without scatters and stable sorts) and `triton`, and for attention `auto`, SDPA with a score kernel. Beside them `sdpa`,
attention without any signal, `topk`, pruning as users write it, and `literal`, a head's formula as it is published,
with everything whole in memory; on CUDA also `topk_compiled` and `literal_compiled`.
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
from bench.runners import CUDA, DEVICE, copy_rate, matmul_rate, replayed
from clipkernels.measure.environment import environment
from clipkernels.testing.cases import CASES
from clipkernels.testing.fp64 import check_against_fp64, flat, is_checkable
from clipkernels.testing.inputs import SHAPES, InputFactory

BATCHES = (1, 8, 64, 256) if CUDA else (1, 8)
DTYPES = (torch.bfloat16, torch.float32, *([torch.float16] if CUDA else []))
TOWERS = ("B-32", "B-16", "L-14", "L-14-336", *(["SO400M-14-384"] if CUDA else []))
# What the sets of inputs hold together at least, beyond any cache, and how many there are at most.
BYTES, SETS = (1 << 28, 32) if CUDA else (1 << 24, 4)
# Calls in a CUDA graph, so that starting it and waiting for it do not count: at most, as many as fit in these seconds.
MOST, SPAN = 200, 5e-3
# Images that a result is checked on.
CHECKED = 2
Call = Callable[..., Any]


def variants(op: str) -> list[str]:
    """What an operation is timed as."""
    fused = ["triton", "compiled"] if CUDA else []
    if op.startswith("attention"):
        return ["reference", *fused, *(["auto"] if CUDA else []), "sdpa"]
    if op == "targeted_l1" and CUDA:  # whose reference waits for the host to count the selected tokens
        return ["triton", "literal", "literal_compiled"]
    if op in LITERAL:
        return ["reference", *fused, "literal", *(["literal_compiled"] if CUDA else [])]
    pruning = op in ("prune_tokens", "prune_tokens_heads_fuse_norm")
    return ["reference", *fused, *(["topk", *(["topk_compiled"] if CUDA else [])] if pruning else [])]


def build(op: str, variant: str, source: InputFactory) -> Call:
    """The call of a variant, of the case's inputs."""
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
    """Tip-Adapter's two products."""
    return literal_heads.affinity(queries, support, hot, 5.5)


LITERAL: dict[str, Call] = {
    "calip_logits": lambda *inputs: literal_heads.calip_logits(*inputs, 0.5, 1.12, 0.02),
    "affinity": literal_affinity,
    "targeted_l1": lambda h, g, weights, mask, p: literal_distill.targeted_l1(h, g, p, weights, mask),
}


def several(op: str, source: InputFactory) -> list[tuple[Tensor, ...]]:
    """Sets of inputs, more than a cache holds but at the smallest batches."""
    first = CASES[op].inputs(source)
    sets = math.ceil(BYTES / sum(tensor.nbytes for tensor in first))
    return [first, *(CASES[op].inputs(source) for _ in range(max(2, min(SETS, sets)) - 1))]


def literal_inputs(op: str, source: InputFactory, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a published formula takes in place of a case's inputs."""
    if op != "affinity":
        return inputs
    queries, support, labels, _ = inputs
    return queries, support, one_hot(labels, source.classes).to(queries.dtype)


def topk(source: InputFactory, x: Tensor, scores: Tensor, *norm: Tensor) -> tuple[Tensor, ...]:
    """Pruning with topk, gather and cat; per-head scores are averaged, the rest fused, the result normed."""
    prefix, patches = x[:, : source.shape.prefix], x[:, source.shape.prefix :]
    mean = scores.mean(1) if scores.ndim == 3 else scores
    index = mean.topk(source.keep).indices
    kept = patches.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    if not norm:
        return torch.cat([prefix, kept], 1), index
    fused = mean.scatter(1, index, 0.0)[:, None].to(x.dtype) @ patches
    tokens = torch.cat([prefix, kept, fused], 1)
    return tokens, index, layer_norm(tokens, x.shape[-1:], *norm)


def products(op: str, source: InputFactory) -> int | None:
    """Operations of the matrix products that an operation asks for; None where there are none."""
    shape, batch = source.shape, source.batch
    n, looks = shape.tokens, batch * source.patches * source.classes * source.embedding
    pooled, tokens, channels = 64, 32, 256  # as `cases` has them
    found = {
        "rank_tokens": 2 * batch * n * shape.width,
        "predict_scores": 4 * batch * n * pooled * (tokens + channels),
        "match_tokens": 2 * batch * (n // 2) * (n - n // 2) * (shape.width // shape.heads),
        "cross_attention": 6 * looks,
        "calip_logits": 4 * looks,
        "affinity": 2 * batch * source.support * source.embedding,
        "targeted_l1": 2 * batch * math.ceil(0.4 * n) * shape.width * source.embedding,
    }
    return 4 * batch * n**2 * shape.width if op.startswith("attention") else found.get(op)


@pytest.fixture(scope="session")
def multiplied(request: pytest.FixtureRequest) -> dict[torch.dtype, float]:
    """TFLOP/s of a large product of random matrices, by dtype that is timed; before any graph is captured."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    chosen = {given.get("dtype") for given in params}
    return {dtype: matmul_rate(dtype, DEVICE) for dtype in DTYPES if dtype in chosen}


@pytest.fixture(scope="session")
def copied() -> float:
    """GB/s of a large copy; before any graph is captured."""
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
    copied: float,
    multiplied: dict[torch.dtype, float],
    op: str,
    variant: str,
    shape: str,
    batch: int,
    dtype: torch.dtype,
) -> None:
    """Time of one call of one operation."""
    case = CASES[op]
    source = InputFactory(SHAPES[shape], batch, dtype, DEVICE)
    inputs = several(op, source)
    call = build(op, variant, source)
    own = [literal_inputs(op, source, some) for some in inputs] if "literal" in variant else inputs
    with torch.inference_mode():
        check_small(op, variant, source)
        came = flat(call(*own[0]))
        assert came[0].isfinite().all()
        run, calls = runner(call, own)
        benchmark.group = f"{op} {shape} b{batch} {dtype}"
        benchmark(run)
    moved = sum(tensor.nbytes for tensor in (*inputs[0], *came)) - (case.unread(source) if case.unread else 0)
    flops = products(op, source)
    info = {"op": op, "variant": variant, **source.shape._asdict(), "tower": shape, "batch": batch}
    info |= {"dtype": str(dtype).removeprefix("torch."), "bytes": moved, "copy_gb_per_s": copied, "flops": flops}
    info |= {"matmul_tflop_per_s": multiplied[dtype]}
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median / calls
        times = [1e6 * value / calls for value in benchmark.stats.stats.data]
        fifths = statistics.quantiles(times, n=5) if len(times) > 1 else times * 4
        info |= {"microseconds": 1e6 * seconds, "p20": fifths[0], "p80": fifths[3], "rounds": len(times)}
        info |= {"gb_per_s": moved / seconds / 1e9, "of_copy": moved / seconds / 1e9 / copied}
        info |= {"tflop_per_s": flops and flops / seconds / 1e12}
        floor = max(moved / copied / 1e9, (flops or 0) / multiplied[dtype] / 1e12)
        info |= {"floor_microseconds": 1e6 * floor, "of_floor": floor / seconds}
    benchmark.extra_info |= info | environment()
    if request.config.getoption("--rows") and benchmark.stats is not None:
        append(benchmark.extra_info, Path(request.config.getoption("--rows")))


def append(row: dict[str, Any], target: Path) -> None:
    """Adds a row to a CSV, with a header if it is the first."""
    new = not target.exists()
    with target.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def check_small(op: str, variant: str, source: InputFactory) -> None:
    """Fails unless a variant is right at two images; a compiled one is checked at the batch it is compiled for."""
    if variant.startswith(("topk", "literal")):  # which break ties otherwise, and sum halves in halves
        return
    batch = source.batch if variant == "compiled" else min(source.batch, CHECKED)
    small = InputFactory(source.shape, batch, source.dtype, source.device)
    inputs = CASES[op].inputs(small)
    check(op, variant, small, inputs, flat(build(op, variant, small)(*inputs)))


def check(op: str, variant: str, source: InputFactory, inputs: tuple[Tensor, ...], came: list[Tensor]) -> None:
    """Fails unless the results are right."""
    case = CASES[op]
    if variant == "sdpa":
        case = case._replace(call=lambda source, _, *inputs: CASES[op].call(source, "reference", *inputs)[0])
    # Whatever is not one of our kernels is judged as PyTorch is.
    verdict = check_against_fp64(case, source, inputs, came, "triton" if variant == "triton" else "reference")
    assert verdict.wrong is None, verdict.wrong


def runner(call: Call, inputs: list[tuple[Tensor, ...]]) -> tuple[Callable[[], object], int]:
    """The run that is timed, and the number of calls that it makes."""
    if not CUDA:
        turn = cycle(inputs)
        return lambda: call(*next(turn)), 1
    return replayed(call, inputs, SPAN, MOST)
