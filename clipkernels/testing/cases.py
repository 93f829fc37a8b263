"""Every operation with inputs to try it on, and whether what came out is right: for `check` and the benches.

Inputs are what a tower gives: queries and keys as views of one packed projection, random and never zeros. Where a
choice is made, it is between numbers that every precision and order of summation gets exactly, so that choices can be
compared exactly, ties included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkernels import ops, reference
from clipkernels.backend import Backend
from clipkernels.plan import Signal
from clipkernels.reference import Heads
from clipkernels.testing.budget import budget

# Units of eps(dtype)·‖f‖∞ that plain PyTorch may be off.
PLAIN = 16


class Shape(NamedTuple):
    """A tower: tokens, width, heads, prefix tokens, and a ToMe r that about halves the tokens over its depth."""

    tokens: int
    width: int
    heads: int
    prefix: int
    r: int


SHAPES = {
    "B-32": Shape(50, 768, 12, 1, 4),
    "B-16": Shape(197, 768, 12, 1, 13),
    "L-14": Shape(257, 1024, 16, 1, 7),
    "L-14-336": Shape(577, 1024, 16, 1, 16),
    "SO400M-14-384": Shape(729, 1152, 16, 0, 20),
}


class Source:
    """Random inputs of one dtype at one shape and batch.

    Args:
        shape: of the tower.
        batch: images.
        dtype: of tokens, queries, keys and weights.
        device: where they are made.
        seed: of the generator.
    """

    def __init__(self, shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.shape, self.batch, self.dtype, self.device = shape, batch, dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.patches = shape.tokens - shape.prefix
        self.keep = math.ceil(0.7 * self.patches)
        self.classes, self.support = (1000, 16_000) if shape.width >= 512 else (20, 150)

    @property
    def embedding(self) -> int:
        """The width of embeddings, as that of such a tower is or as wide as a small tower."""
        return {768: 512, 1024: 768}.get(self.shape.width, self.shape.width)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, device=self.device).to(self.dtype)

    def tokens(self, times: int = 1) -> Tensor:
        return self.normal(self.batch, self.shape.tokens, times * self.shape.width)

    def vector(self, times: int = 1) -> Tensor:
        return self.normal(times * self.shape.width)

    def sizes(self) -> Tensor:
        size = (self.batch, self.shape.tokens)
        return torch.randint(1, 5, size, generator=self.generator, device=self.device).float()

    def scores(self, *heads: int) -> Tensor:
        """Softmax rows in steps of 2⁻²⁰: their sums over heads are exact in fp32."""
        size = (self.batch, *heads, self.patches)
        return (torch.randn(size, generator=self.generator, device=self.device).softmax(-1) * 2**20).round() / 2**20

    def signs(self, *heads: int) -> Tensor:
        """Keys of ±1, equal in all heads: every mean and, at D = 64, every similarity is exact, and many are tied."""
        size = (self.batch, *(1 for _ in heads), self.shape.tokens, self.shape.width // self.shape.heads)
        signs = torch.randint(0, 2, size, generator=self.generator, device=self.device) * 2 - 1
        return signs.to(self.dtype).repeat(1, *heads, 1, 1) if heads else signs.to(self.dtype)

    def points(self) -> Tensor:
        """Tokens of small integers: every squared distance is exact, and many are tied."""
        size = (self.batch, self.shape.tokens, self.shape.width)
        return torch.randint(-2, 3, size, generator=self.generator, device=self.device).to(self.dtype)

    def units(self, *size: int) -> Tensor:
        """Embeddings of length one."""
        return normalize(self.normal(*size, self.embedding).float(), dim=-1).to(self.dtype)

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views q, k, v (B,H,N,D) of a packed projection (B,N,3·C)."""
        q, k, v = packed.unflatten(-1, (3, self.shape.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class Case(NamedTuple):
    """An operation: flat inputs, the call, the bytes that it need not read although they are passed, and how many of
    the inputs, the last ones, are of all images."""

    inputs: Callable[[Source], tuple[Tensor, ...]]
    call: Callable[..., Any]
    unread: Callable[[Source], int] = lambda source: 0
    shared: int = 0


def _attention(signal: Signal | None, sized: bool = False) -> Case:
    def call(source: Source, backend: Backend, packed: Tensor, size: Tensor | None = None) -> Any:
        q, k, v = source.split(packed)
        return ops.attention(q, k, v, size, signal, source.shape.prefix, backend=backend)

    return Case(lambda source: (source.tokens(3), *([source.sizes()] if sized else [])), call)


def _condense(by_rank: bool = False) -> Case:
    """At TCA's sharper published rate: scores per patch; or per head by rank, with their mean as weights and a norm."""

    def call(source: Source, backend: Backend, x: Tensor, scores: Tensor, *vectors: Tensor) -> Any:
        m = source.patches + 1 - math.ceil(0.9 * source.patches)
        keep, heads, prefix = source.patches + 1 - 3 * m, "rank" if by_rank else "mean", source.shape.prefix
        norm = (vectors[0], vectors[1], 1e-5) if by_rank else None
        weights = scores if by_rank else None
        return ops.condense_tokens(
            x, scores, keep, 2 * m, 2, weights, cast(Heads, heads), prefix, norm=norm, backend=backend
        )

    def inputs(source: Source) -> tuple[Tensor, ...]:
        if by_rank:
            return source.points(), source.scores(source.shape.heads), source.vector(), source.vector()
        return source.points(), source.scores()

    return Case(inputs, call)


def _supported(source: Source) -> tuple[Tensor, ...]:
    """Queries, a support sorted by class, its labels and where each class begins."""
    size = (source.support,)
    labels = torch.randint(source.classes, size, generator=source.generator, device=source.device).sort().values
    _, offsets = reference.sort_by_class(labels, source.classes)
    return source.units(source.batch), source.units(source.support), labels, offsets


def _affinity(
    source: Source, backend: Backend, queries: Tensor, support: Tensor, labels: Tensor, offsets: Tensor
) -> Tensor:
    votes = ops.affinity(queries, support, labels, source.classes, 5.5, offsets=offsets, backend=backend)
    return votes.to(queries.dtype)  # which it is judged in: halves are summed to 16 bits


def _predictor(source: Source) -> tuple[Tensor, ...]:
    """The weights of a predictor with 64 pooled channels and 32 and 256 hidden ones."""
    n, g, ht, hc = source.shape.tokens, 64, 32, 256
    token, channel = ((ht, n), (ht,), (n, ht), (n,)), ((hc, g), (hc,), (g, hc), (g,))
    sizes: tuple[tuple[int, ...], ...] = ((g,), (g,), *token, (g,), (g,), *channel, (g,), (1,))
    return tuple(source.normal(*size) * (size[-1] ** -0.5 if len(size) == 2 else 1) for size in sizes)


def _told(source: Source) -> tuple[Tensor, ...]:
    """Tokens, a teacher's, weights, two in five of them selected, and a projection."""
    size = (source.batch, source.shape.tokens)
    teacher = source.units(*size)
    weights, order = torch.rand(2, *size, generator=source.generator, device=source.device)
    projection = source.normal(source.embedding, source.shape.width) * source.shape.width**-0.5
    return source.tokens(), teacher, weights, order.argsort(1) < _targets(source), projection


def _targets(source: Source) -> int:
    return math.ceil(0.4 * source.shape.tokens)


def _untold(source: Source) -> int:
    """Bytes of the tokens that are not selected, and of the teacher's."""
    rows = source.batch * (source.shape.tokens - _targets(source))
    return rows * (source.shape.width + source.embedding) * source.dtype.itemsize


def _dropped(source: Source) -> int:
    """Bytes of the patches that are not kept."""
    return source.batch * (source.patches - source.keep) * source.shape.width * source.dtype.itemsize


def _match(source: Source) -> ops.Match:
    return ops.match_tokens(source.signs(), source.shape.r, source.shape.prefix, backend="reference")


CASES = {
    "attention": _attention(None),
    "attention_sized": _attention(None, sized=True),
    "attention_cls": _attention("cls"),
    "attention_cls_sized": _attention("cls", sized=True),
    "attention_received": _attention("received"),
    "attention_keys": _attention("keys"),
    "rank_tokens": Case(
        lambda source: (source.tokens(3),),
        lambda source, backend, packed: ops.rank_tokens(
            source.split(packed)[0], source.split(packed)[1], prefix=source.shape.prefix, backend=backend
        ),
        # The values, and all queries but one.
        lambda source: source.batch * (2 * source.shape.tokens - 1) * source.shape.width * source.dtype.itemsize,
    ),
    "predict_scores": Case(
        lambda source: (source.tokens(), *_predictor(source)),
        lambda source, backend, x, *weights: ops.predict_scores(
            x, ops.Mixer(*weights), source.shape.prefix, backend=backend
        ).to(x.dtype),  # as in `_affinity`
        shared=14,
    ),
    "prune_tokens": Case(
        lambda source: (source.tokens(), source.scores()),
        lambda source, backend, x, scores: ops.prune_tokens(
            x, scores, source.keep, prefix=source.shape.prefix, backend=backend
        ),
        _dropped,
    ),
    "prune_tokens_heads_fuse_norm": Case(
        lambda source: (source.tokens(), source.scores(source.shape.heads), source.vector(), source.vector()),
        lambda source, backend, x, scores, weight, bias: ops.prune_tokens(
            x, scores, source.keep, True, "mean", source.shape.prefix, (weight, bias, 1e-5), backend=backend
        ),
    ),
    "prune_tokens_rank": Case(
        lambda source: (source.tokens(), source.scores(source.shape.heads)),
        lambda source, backend, x, scores: ops.prune_tokens(
            x, scores, source.keep, False, "rank", source.shape.prefix, backend=backend
        ),
        _dropped,
    ),
    "condense_tokens": _condense(),
    "condense_tokens_rank_norm": _condense(by_rank=True),
    "match_tokens": Case(
        lambda source: (source.signs(source.shape.heads),),
        lambda source, backend, keys: ops.match_tokens(keys, source.shape.r, source.shape.prefix, backend=backend),
    ),
    "merge_tokens": Case(
        lambda source: (source.tokens(), source.sizes(), *_match(source)),
        lambda source, backend, x, size, *match: ops.merge_tokens(x, ops.Match(*match), size, backend=backend),
    ),
    "merge_tokens_norm": Case(
        lambda source: (source.tokens(), source.sizes(), source.vector(), source.vector(), *_match(source)),
        lambda source, backend, x, size, weight, bias, *match: ops.merge_tokens(
            x, ops.Match(*match), size, (weight, bias, 1e-5), backend=backend
        ),
    ),
    "cross_attention": Case(
        lambda source: (source.units(source.batch, source.patches), source.units(source.classes)),
        lambda source, backend, visual, text: ops.cross_attention(visual, text, backend=backend),
        shared=1,
    ),
    "calip_logits": Case(
        lambda source: (
            source.units(source.batch, source.patches),
            source.units(source.batch),
            source.units(source.classes),
        ),
        lambda source, backend, visual, pooled, text: ops.calip_logits(visual, pooled, text, backend=backend).to(
            visual.dtype  # as in `_affinity`
        ),
        shared=1,
    ),
    "affinity": Case(_supported, _affinity, shared=3),
    "targeted_l1": Case(
        _told,
        lambda source, backend, student, teacher, weights, mask, projection: ops.targeted_l1(
            student, teacher, projection, weights, mask, backend=backend
        ).to(student.dtype),  # as in `_affinity`
        _untold,
        shared=1,
    ),
    "bias_act_quick_gelu": Case(
        lambda source: (source.tokens(4), source.vector(4)),
        lambda source, backend, x, bias: ops.bias_act(x, bias, "quick_gelu", backend=backend),
    ),
    "bias_act_gelu": Case(
        lambda source: (source.tokens(4), source.vector(4)),
        lambda source, backend, x, bias: ops.bias_act(x, bias, "gelu", backend=backend),
    ),
    "bias_act_gelu_tanh": Case(
        lambda source: (source.tokens(4), source.vector(4)),
        lambda source, backend, x, bias: ops.bias_act(x, bias, "gelu_tanh", backend=backend),
    ),
    "add_norm": Case(
        lambda source: (source.tokens(), source.tokens(), *(source.vector() for _ in range(4))),
        lambda source, backend, x, y, bias, scale, weight, shift: ops.add_norm(
            x, y, bias, scale, (weight, shift, 1e-5), backend=backend
        ),
    ),
}


class Verdict(NamedTuple):
    """The worst of an operation's results: its error, the error it may have, the reference's own, and what is wrong."""

    error: float
    allowed: float
    eager: float
    wrong: str | None


def judged(op: str, shape: Shape) -> bool:
    """Whether `judge` can tell: matching is compared by similarities that are exact at a head width of 64 alone."""
    return op != "match_tokens" or shape.width == 64 * shape.heads


def judge(case: Case, source: Source, inputs: tuple[Tensor, ...], came: list[Tensor], backend: str) -> Verdict:
    """Compares results with fp64: choices exactly with the reference's, values within the error budget.

    The reference itself, which the budget is made from, may be off by `PLAIN` units of its dtype.

    Args:
        case: what was called.
        source: of the inputs.
        inputs: that it was called with.
        came: its results, from `flat`.
        backend: that it ran on.
    """
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    exact = flat(case.call(source, "reference", *wide))
    plain = flat(case.call(source, "reference", *inputs))
    worst = Verdict(0.0, 0.0, 0.0, None)
    for place, (result, right, eager) in enumerate(zip(came, exact, plain, strict=True)):
        if not result.is_floating_point():
            if not torch.equal(result, eager):
                return worst._replace(wrong=f"choice {place} differs from the reference's")
            continue
        if result.shape != right.shape:
            return worst._replace(wrong=f"result {place} is {tuple(result.shape)} instead of {tuple(right.shape)}")
        own = _error(eager, right)
        if backend == "reference":
            allowed = PLAIN * torch.finfo(source.dtype).eps * float(right.abs().max()) if right.numel() else 0.0
        else:
            allowed = budget(result, right, eager)
        error = _error(result, right)
        if not error <= allowed:
            return Verdict(error, allowed, own, f"result {place} is off by {error:.1e}, {allowed:.1e} allowed")
        if worst.allowed == 0 or error / allowed > worst.error / worst.allowed:
            worst = Verdict(error, allowed, own, None)
    return worst


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result if part is not None for tensor in flat(part)]


def _error(came: Tensor, exact: Tensor) -> float:
    return float((came.double() - exact).abs().max()) if exact.numel() else 0.0
