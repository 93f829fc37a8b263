"""Every operation on random inputs, beside its reading in numpy: `python tests/fuzz.py --cases 300`.

Inputs have odd sizes and strides, gaps of NaN between their elements, ties, and NaN, ±inf and -0 among scores. Choices
must be those of the reading, kept rows equal bit for bit, and other values within 16·eps of the largest term that is
summed. Numbers that decide a choice are exact in every precision, so that there is one right answer. Gradients are
compared with those of the reference in fp64. Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists():
        os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import torch
from torch import Tensor

from clipkernels import ops
from clipkernels.testing import exact_interpreter_dot
from tests import readings
from tests.readings import plain

DTYPES = (torch.float32, torch.float16)
EPS = 16
"""Units of eps that an error may have."""
SPECIAL = (float("nan"), float("inf"), float("-inf"), -0.0, 0.0)
BATCHED: dict[str, tuple[int, ...]] = {
    **{"attention": (0, 1, 2, 3), "rank_tokens": (0, 1, 4), "prune_tokens": (0, 1), "condense_tokens": (0, 1, 5)},
    **{"match_tokens": (0,), "merge_tokens": (0, 1, 2), "predict_scores": (0,), "cross_attention": (0,)},
    **{"affinity": (0,), "targeted_l1": (0, 1, 3, 4)},
}
"""The arguments of an operation that have a value per image."""
WIDTHS = (8, 16, 20, 24, 64, 72, 80, 88, 96, 104, 112)


class Case(NamedTuple):
    """Arguments of an operation, the results of its reading, and the largest term of each result.

    expected: arrays by result; None where the operation returns None.
    magnitudes: the largest term that is summed for each result.
    copies: the number of leading rows of the first result that are copies.
    leaves: the places of the arguments that the operation has a gradient in; empty without a backward.
    """

    op: str
    arguments: tuple[Any, ...]
    expected: tuple[Any, ...]
    magnitudes: tuple[float, ...]
    copies: int = 0
    leaves: tuple[int, ...] = ()

    def empty(self) -> Case:
        """Return the case without images: every axis of the batch has the size 0."""
        batched = BATCHED[self.op]
        arguments = tuple(cut(part) if place in batched else part for place, part in enumerate(self.arguments))
        return self._replace(arguments=arguments, expected=tuple(cut(array) for array in self.expected), leaves=())


def cut(value: Any) -> Any:
    """Return an argument or a result without its images."""
    if isinstance(value, tuple):
        return type(value)(*(part[:0] for part in value))
    return None if value is None else value[:0]


class Draw:
    """Random sizes, numbers and layouts of one case.

    Args:
        seed: of all numbers.
        device: of the tensors.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.random, self.device = np.random.default_rng(seed), device
        self.dtype = DTYPES[int(self.random.integers(len(DTYPES)))]

    def int(self, low: int, high: int) -> int:
        """Return an int from `low` to `high`, either end more often than a number between them."""
        return int(self.random.choice([low, high, *self.random.integers(low, high + 1, 4)]))

    def flip(self, share: float = 0.5) -> bool:
        """Return true with a probability."""
        return bool(self.random.random() < share)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal random numbers in an odd layout."""
        return self.placed(torch.from_numpy(self.random.standard_normal(shape)).to(dtype or self.dtype))

    def grid(self, *shape: int, high: int = 3) -> Tensor:
        """Return integers from -high to high, whose products and sums are exact."""
        return self.placed(torch.from_numpy(self.random.integers(-high, high + 1, shape)).to(self.dtype))

    def scores(self, *shape: int) -> Tensor:
        """Return scores with ties: multiples of 1/64, some of them special."""
        values = self.random.integers(0, self.int(1, 64) + 1, shape) / 64
        if self.flip(0.3):
            mask = self.random.random(shape) < 0.1
            values = np.where(mask, self.random.choice(SPECIAL, shape), values)
        return self.placed(torch.from_numpy(values).to(self.dtype if self.flip() else torch.float32))

    def sizes(self, *shape: int) -> Tensor | None:
        """Return sizes from 0 to 4, or None."""
        if self.flip(0.4):
            return None
        return self.placed(torch.from_numpy(self.random.integers(0 if self.flip() else 1, 5, shape)).float())

    def norm(self, width: int) -> tuple[Tensor, Tensor, float] | None:
        """Return the arguments of a LayerNorm, or None."""
        return None if self.flip(0.4) else (self.normal(width), self.normal(width), 1e-5)

    def placed(self, tensor: Tensor) -> Tensor:
        """Return a tensor with the same values in an odd layout, and NaN in the memory between its elements."""
        layout = self.random.integers(5) if tensor.ndim and tensor.is_floating_point() else 0
        tensor = tensor.to(self.device)
        if layout == 1:  # the last axis is strided
            wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"))
            wide[..., 1::2] = tensor
            return wide[..., 1::2]
        if layout == 2 and tensor.ndim > 1:  # rows with a gap, from an unaligned start
            wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"))
            wide[..., 1:-2] = tensor
            return wide[..., 1:-2]
        if layout == 3 and tensor.ndim > 1:  # two axes in the other order
            return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        if layout == 4 and tensor.ndim > 2:  # images apart
            wide = tensor.new_full((2 * len(tensor), *tensor.shape[1:]), float("nan"))
            wide[::2] = tensor
            return wide[::2]
        return tensor


def largest(*arrays: Any) -> float:
    """Return the largest finite absolute value of arrays, at least 1e-3."""
    values = [np.abs(array[np.isfinite(array)]).max(initial=0.0) for array in map(plain, arrays) if array is not None]
    return max([1e-3, *values])


def norm_magnitude(rows: Any, norm: Any) -> float:
    """Return the magnitude of the LayerNorm of rows: their size over their deviation, times the weight."""
    if norm is None:
        return 0.0
    deviation = np.sqrt(np.nanmin(rows.var(-1), initial=np.inf) + norm[2])
    return float(largest(norm[0]) * (1 + largest(rows) / deviation) + largest(norm[1]))


def attention(draw: Draw) -> Case:
    batch, heads, tokens, width = draw.int(1, 3), draw.int(1, 4), draw.int(1, 70), int(draw.random.choice(WIDTHS))
    signal = [None, "cls", "received", "keys"][draw.int(0, 3)]
    rows = tokens if signal == "received" or draw.flip() else draw.int(1, tokens)
    q, k, v = draw.normal(batch, heads, rows, width), draw.normal(batch, heads, tokens, width), None
    v = draw.normal(batch, heads, tokens, width)
    size, prefix = draw.sizes(batch, tokens), draw.int(0, min(3, tokens))
    arguments = (q, k, v, size, signal, prefix)
    out, scores = readings.attention(*plain(arguments))
    leaves = () if draw.dtype != torch.float32 or signal == "keys" else (0, 1, 2)
    return Case("attention", arguments, (out, scores), (largest(v), largest(k) if signal == "keys" else 1), 0, leaves)


def rank_tokens(draw: Draw) -> Case:
    batch, heads, tokens, width = draw.int(1, 3), draw.int(1, 4), draw.int(1, 70), int(draw.random.choice(WIDTHS))
    query, kind = (("all", "mean"), ("cls", "mean"), ("cls", "rank"))[draw.int(0, 2)]
    rows = tokens if query == "all" else draw.int(1, tokens)
    q, k = draw.grid(batch, heads, rows, width, high=1), draw.grid(batch, heads, tokens, width, high=1)
    size, prefix = draw.sizes(batch, tokens), draw.int(0, min(3, tokens))
    if kind == "rank":  # no ties, because numpy's exp2 in the interpreter depends on the place of a number
        q, k, size = (q * 0).index_fill(3, torch.tensor(0, device=q.device), 1), k.contiguous(), None
        places = draw.random.permuted(np.tile(np.arange(tokens), (batch, heads, 1)), axis=2) / 16
        k[..., 0] = torch.from_numpy(places).to(k)
    arguments = (q, k, kind, query, size, prefix)
    leaves = (0, 1) if draw.dtype == torch.float32 and kind == "mean" else ()
    return Case("rank_tokens", arguments, (readings.rank_tokens(*plain(arguments)),), (float(tokens),), 0, leaves)


def prune_tokens(draw: Draw) -> Case:
    batch, prefix, patches, width = draw.int(1, 3), draw.int(0, 3), draw.int(0, 80), draw.int(1, 72)
    x, scores = draw.normal(batch, prefix + patches, width), draw.scores(batch, patches)
    if patches and draw.flip():
        scores = draw.scores(batch, draw.int(1, 4), patches)
    keep, fuse, norm = draw.int(0, patches), draw.flip(), draw.norm(width)
    arguments = (x, scores, keep, fuse, "rank" if draw.flip() else "mean", prefix, norm)
    tokens, index, normed = readings.prune_tokens(*plain(arguments))
    total = largest(x) * max(1.0, largest(scores) * patches * (patches if arguments[4] == "rank" else 1))
    leaves = (0,) if draw.dtype == torch.float32 and np.isfinite(plain(scores)).all() else ()
    magnitudes = (total, 0.0, norm_magnitude(tokens, plain(norm)))
    return Case("prune_tokens", arguments, (tokens, index, normed), magnitudes, prefix + keep, leaves)


def condense_tokens(draw: Draw) -> Case:
    batch, prefix, patches, width = draw.int(1, 3), draw.int(0, 2), draw.int(1, 60), draw.int(1, 40)
    x, scores = draw.grid(batch, prefix + patches, width), draw.scores(batch, patches)
    if draw.flip():
        scores = draw.scores(batch, draw.int(1, 4), patches)
    keep = draw.int(0, patches - 1)
    merge = draw.int(1, patches - keep)
    centers, first = draw.int(1, merge), draw.int(0, merge - 1)
    weights = None if draw.flip() else draw.scores(batch, patches)
    heads, norm = "rank" if draw.flip() else "mean", draw.norm(width)
    arguments = (x, scores, keep, merge, centers, weights, heads, prefix, first, norm)
    tokens, source, index, normed = readings.condense_tokens(*plain(arguments))
    total = largest(x) * max(1.0, largest(scores, weights) * patches * patches)
    finite = np.isfinite(plain(scores)).all() and (weights is None or np.isfinite(plain(weights)).all())
    magnitudes = (total, 0.0, 0.0, norm_magnitude(tokens, plain(norm)))
    leaves = (0,) if draw.dtype == torch.float32 and finite else ()
    return Case("condense_tokens", arguments, (tokens, source, index, normed), magnitudes, prefix + keep, leaves)


def signs(draw: Draw, batch: int, tokens: int, heads: int) -> Tensor:
    """Return a metric of ±1, whose similarities are exact: (B,N,D), or keys (B,H,N,D) with equal heads."""
    rows = draw.random.choice([-1.0, 1.0], (batch, tokens, int(draw.random.choice([4, 16, 64]))))
    rows[draw.random.random(rows.shape[:2]) < 0.05] = 0.0
    if draw.flip(0.2):
        rows[draw.random.random(rows.shape[:2]) < 0.05] = np.nan
    metric = torch.from_numpy(rows).to(draw.dtype)
    return draw.placed(metric if not heads else metric[:, None].repeat(1, heads, 1, 1))


def match_tokens(draw: Draw) -> Case:
    batch, tokens = draw.int(1, 3), draw.int(2, 70)
    prefix = draw.int(0, 2)
    arguments = (signs(draw, batch, tokens, draw.int(0, 3)), draw.int(0, (tokens - prefix) // 2), prefix)
    return Case("match_tokens", arguments, readings.match_tokens(*plain(arguments)), (0.0, 0.0, 0.0))


def merge_tokens(draw: Draw) -> Case:
    batch, tokens, width, prefix = draw.int(1, 3), draw.int(2, 60), draw.int(1, 72), draw.int(0, 2)
    metric, r = signs(draw, batch, tokens, 0), draw.int(0, (tokens - prefix) // 2)
    if draw.flip(0.3):  # one target for every source
        metric = torch.ones_like(metric)
    match = ops.match_tokens(metric, r, prefix, backend="reference")
    x, size, norm = draw.normal(batch, tokens, width), draw.sizes(batch, tokens), draw.norm(width)
    arguments = (x, match, size, norm)
    merged, sizes, normed = readings.merge_tokens(*plain(arguments))
    copies = match.kept.shape[1]
    magnitudes = (4 * largest(x), 1.0, 4 * norm_magnitude(merged, plain(norm)))
    leaves = (0,) if draw.dtype == torch.float32 else ()
    return Case("merge_tokens", arguments, (merged, sizes, normed), magnitudes, copies, leaves)


def predict_scores(draw: Draw) -> Case:
    pooled, hidden = (int(draw.random.choice([16, 32, 64])) for _ in range(2))
    batch, tokens, width = draw.int(1, 3), draw.int(1, 70), draw.int(pooled, 200)
    channel = int(draw.random.choice([128, 256]))
    shapes = {"norm1_weight": (pooled,), "norm1_bias": (pooled,), "token_in_weight": (hidden, tokens)}
    shapes |= {"token_in_bias": (hidden,), "token_out_weight": (tokens, hidden), "token_out_bias": (tokens,)}
    shapes |= {"norm2_weight": (pooled,), "norm2_bias": (pooled,), "channel_in_weight": (channel, pooled)}
    shapes |= {"channel_in_bias": (channel,), "channel_out_weight": (pooled, channel), "channel_out_bias": (pooled,)}
    shapes |= {"score_weight": (pooled,), "score_bias": (1,)}
    scale = {2: 0.2, 1: 0.5}
    weights = {name: draw.placed(draw.normal(*shape) * scale[len(shape)]) for name, shape in shapes.items()}
    x, mixer, prefix = draw.normal(batch, tokens, width), ops.Mixer(**weights), draw.int(0, min(2, tokens))
    arrays = {name: plain(weight) for name, weight in mixer._asdict().items()}
    expected = readings.predict_scores(plain(x), arrays, prefix)
    # With half-precision weights the kernel rounds the operands of products.
    steps = torch.finfo(draw.dtype).eps / torch.finfo(torch.float32).eps if draw.dtype != torch.float32 else 8
    return Case("predict_scores", (x, mixer, prefix), (expected,), (steps * largest(expected),))


def bias_act(draw: Draw) -> Case:
    shape = [draw.int(0, 9) for _ in range(draw.int(0, 2))]
    width = draw.int(1, 200)
    x = draw.normal(*shape, width) * 4
    arguments = (x, None if draw.flip(0.3) else draw.normal(width), ("quick_gelu", "gelu", "gelu_tanh")[draw.int(0, 2)])
    leaves = (0,) if draw.dtype == torch.float32 else ()
    return Case("bias_act", arguments, (readings.bias_act(*plain(arguments)),), (largest(x, arguments[1]),), 0, leaves)


def add_norm(draw: Draw) -> Case:
    shape, width = [draw.int(0, 9) for _ in range(draw.int(0, 2))], draw.int(1, 200)
    x = draw.normal(*shape, width)
    y = draw.normal(*shape, width, dtype=torch.float32 if draw.flip(0.2) else None)
    bias, scale = (None if draw.flip() else draw.normal(width) for _ in range(2))
    norm = draw.norm(width)
    arguments = (x, y, bias, scale, norm)
    total, normed = readings.add_norm(*plain(arguments))
    leaves = (0, 1) if draw.dtype == torch.float32 else ()
    terms = largest(x) + 2 * largest(y, bias) * (1 if scale is None else largest(scale))
    return Case("add_norm", arguments, (total, normed), (terms, norm_magnitude(total, plain(norm))), 0, leaves)


def cross_attention(draw: Draw) -> Case:
    batch, patches, classes, width = draw.int(1, 3), draw.int(1, 60), draw.int(1, 60), draw.int(1, 72)
    visual, text = draw.normal(batch, patches, width), draw.normal(classes, width)
    arguments = (visual, text, float(draw.random.choice([0.5, 1.0, 2.0, 16.0])))
    expected = readings.cross_attention(*plain(arguments))
    logits = largest(visual) * largest(text) * width / arguments[2]
    sizes = (largest(text) * (1 + logits / 16), largest(visual) * (1 + logits / 16))
    return Case("cross_attention", arguments, expected, sizes)


def calip_logits(draw: Draw) -> Case:
    batch, patches, classes, width = draw.int(1, 3), draw.int(1, 60), draw.int(1, 60), draw.int(1, 72)
    visual, pooled, text = (draw.normal(*shape, width) for shape in ((batch, patches), (batch,), (classes,)))
    arguments = (visual, pooled, text, float(draw.random.choice([0.5, 1.0, 16.0])), 1.12, 0.02, draw.flip())
    terms = largest(visual, pooled, text) ** 2 * width
    expected = readings.calip_logits(*plain(arguments))
    return Case("calip_logits", arguments, (expected,), (300 * terms * (1 + terms / arguments[3] / 16),))


def affinity(draw: Draw) -> Case:
    queries, rows, classes, width = draw.int(0, 40), draw.int(0, 90), draw.int(1, 20), draw.int(1, 72)
    q, support = (torch.nn.functional.normalize(draw.normal(n, width).float()).to(draw.dtype) for n in (queries, rows))
    labels = torch.from_numpy(draw.random.integers(-1, classes + 1, rows)).to(draw.device)
    beta, weights = float(draw.random.choice([0.0, 1.0, 5.5])), None if draw.flip() else draw.normal(rows)
    arguments = (draw.placed(q), draw.placed(support), labels, classes, beta, weights)
    expected = readings.affinity(*plain(arguments))
    # The affinities of half-precision inputs are rounded to 16 bits.
    steps = torch.finfo(draw.dtype).eps / torch.finfo(torch.float32).eps
    total = max(1, rows) * (1.0 if weights is None else largest(weights)) * (1 + beta)
    return Case("affinity", arguments, (expected,), (total * steps,))


def targeted_l1(draw: Draw) -> Case:
    batch, tokens, width, embedding = draw.int(1, 3), draw.int(0, 30), draw.int(1, 72), draw.int(1, 72)
    student, teacher = draw.normal(batch, tokens, width), draw.normal(batch, tokens, embedding)
    mask = torch.from_numpy(draw.random.random((batch, tokens)) < 0.5).to(draw.device)
    if draw.flip(0.2):
        student = student.masked_fill(~mask[..., None], torch.nan)
    arguments = (student, teacher, draw.normal(embedding, width), draw.normal(batch, tokens), mask)
    expected = readings.targeted_l1(*plain(arguments))
    terms = largest(arguments[3]) * tokens * (largest(student) * largest(arguments[2]) * width + largest(teacher))
    # The kernel multiplies half-precision inputs exactly, and sums in fp32.
    return Case("targeted_l1", arguments, (expected,), (terms,), 0, (0, 2) if draw.dtype == torch.float32 else ())


GENERATORS: dict[str, Callable[[Draw], Case]] = {
    generator.__name__: generator
    for generator in (
        *(attention, rank_tokens, prune_tokens, condense_tokens, match_tokens, merge_tokens, predict_scores),
        *(bias_act, add_norm, cross_attention, calip_logits, affinity, targeted_l1),
    )
}


def fault(case: Case, backend: str) -> str | None:
    """Return what is wrong with the results of a case on a backend, or None."""
    results = getattr(ops, case.op)(*case.arguments, backend=backend)
    results = results if isinstance(results, tuple) else (results,)
    for number, (result, expected, magnitude) in enumerate(zip(results, case.expected, case.magnitudes, strict=True)):
        if result is None or expected is None:
            if result is not None or expected is not None:
                return f"result {number} is {result}, expected {expected}"
            continue
        actual = plain(result)
        if actual.shape != expected.shape:
            return f"result {number} has the shape {actual.shape}, expected {expected.shape}"
        if not result.is_floating_point():
            if not np.array_equal(actual, expected):
                return f"choice {number} differs in {(actual != expected).sum()} places"
            continue
        copies = slice(None), slice(case.copies)
        if number == 0 and case.copies and not np.array_equal(actual[copies], expected[copies], equal_nan=True):
            return "copied rows differ"
        finite = np.isfinite(expected)
        if not np.array_equal(actual[~finite], expected[~finite], equal_nan=True):
            return f"result {number} differs where it is not finite"
        error = np.abs(actual - np.where(finite, expected, 0))[finite].max(initial=0.0)
        allowed = EPS * torch.finfo(result.dtype).eps * max(magnitude, largest(expected))
        if not error <= allowed:
            return f"result {number} is off by {error:.3g}, more than {allowed:.3g}"
    return None


def gradient_fault(case: Case, backend: str) -> str | None:
    """Return what is wrong with the gradients of a case in fp32 on a backend, beside those of the reference in fp64."""

    def gradients(dtype: torch.dtype, backend: str) -> list[Tensor]:
        def convert(value: Any) -> Any:
            if isinstance(value, tuple):
                parts = [convert(part) for part in value]
                return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        arguments = [convert(argument) for argument in case.arguments]
        leaves = [arguments[place].detach().requires_grad_() for place in case.leaves]
        for place, leaf in zip(case.leaves, leaves, strict=True):
            arguments[place] = leaf
        results = getattr(ops, case.op)(*arguments, backend=backend)
        results = results if isinstance(results, tuple) else (results,)
        random = torch.Generator().manual_seed(0)
        total = torch.zeros((), dtype=dtype, device=leaves[0].device)
        for result in results:
            if result is not None and result.is_floating_point() and result.requires_grad:
                cotangent = torch.randn(result.shape, generator=random, dtype=torch.float64).to(result)
                total = total + (result.nan_to_num(0, 0, 0) * cotangent).sum().to(dtype)
        return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))

    exact, actual = gradients(torch.float64, "reference"), gradients(torch.float32, backend)
    for place, wanted, grad in zip(case.leaves, exact, actual, strict=True):
        scale = max(1.0, *case.magnitudes) * max(1.0, largest(wanted))
        error = (grad.double() - wanted).abs().max().item() if grad.numel() else 0.0
        if not error <= 64 * EPS * torch.finfo(torch.float32).eps * scale:
            return f"gradient of argument {place} is off by {error:.3g}, of {largest(wanted):.3g}"
    return None


def fuzz(op: str, cases: Sequence[int], device: torch.device) -> list[str]:
    """Return the faults of an operation, for cases by their seeds: both backends, and gradients of every third case."""
    faults = []
    for seed in cases:
        draw = Draw(seed, device)
        case = GENERATORS[op](draw)
        if op in BATCHED and draw.flip(0.05):
            case = case.empty()
        for backend in ("reference", "triton"):
            with exact_interpreter_dot():
                found = fault(case, backend)
                if found is None and case.leaves and seed % 3 == 0:
                    found = gradient_fault(case, backend)
            if found is not None:
                faults.append(f"{op}, seed {seed}, {backend}: {found}")
    return faults


def main() -> int:
    """Run the cases of every operation; the exit status is 1 if any is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=30, help="cases per operation")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case")
    parser.add_argument("--ops", nargs="+", choices=list(GENERATORS), default=list(GENERATORS), help="operations")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    failed = False
    for op in options.ops:
        start = time.perf_counter()
        faults = fuzz(op, range(options.seed, options.seed + options.cases), device)
        print(f"{op}: {options.cases} cases, {len(faults)} wrong, {time.perf_counter() - start:.0f} s", flush=True)
        for line in faults[:5]:
            print(f"  {line}", flush=True)
        failed = failed or bool(faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
