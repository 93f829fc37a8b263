"""A case of every operation: its inputs, and a call that takes them as flat tensors. For `check` and bench/."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipkernels import ops, reference
from clipkernels.backend import Backend
from clipkernels.plan import Signal
from clipkernels.reference import Act
from clipkernels.testing.inputs import InputFactory

Inputs = tuple[Tensor, ...]


class Case(NamedTuple):
    """One operation with one set of options.

    inputs: creates the flat inputs, from a factory.
    call: runs the operation, on a factory, a backend and the flat inputs.
    unread_bytes: number of input bytes that the operation need not read, from a factory; None is 0.
    num_shared: number of trailing inputs that all images share.
    """

    inputs: Callable[[InputFactory], Inputs]
    call: Callable[..., Any]
    unread_bytes: Callable[[InputFactory], int] | None = None
    num_shared: int = 0


def _packed(factory: InputFactory) -> Inputs:
    return (factory.tokens(3),)


def _packed_and_sizes(factory: InputFactory) -> Inputs:
    return factory.tokens(3), factory.sizes()


def _attention(
    signal: Signal | None, factory: InputFactory, backend: Backend, packed: Tensor, size: Tensor | None = None
) -> Any:
    q, k, v = factory.split(packed)
    return ops.attention(q, k, v, size, signal, factory.shape.prefix, backend=backend)


def _rank(factory: InputFactory, backend: Backend, packed: Tensor) -> Tensor:
    q, k, _ = factory.split(packed)
    return ops.rank_tokens(q, k, prefix=factory.shape.prefix, backend=backend)


def _bytes_beside_keys_and_cls(factory: InputFactory) -> int:
    """Return the bytes of the values and of all queries but the first."""
    return factory.batch * (2 * factory.shape.tokens - 1) * factory.shape.width * factory.dtype.itemsize


def _tokens_and_mixer(factory: InputFactory) -> Inputs:
    """Return tokens, and the weights of a predictor with 64 pooled channels and 32 and 256 hidden units."""
    n, g, ht, hc = factory.shape.tokens, 64, 32, 256
    token, channel = ((ht, n), (ht,), (n, ht), (n,)), ((hc, g), (hc,), (g, hc), (g,))
    sizes: tuple[tuple[int, ...], ...] = ((g,), (g,), *token, (g,), (g,), *channel, (g,), (1,))
    weights = (factory.normal(*size) * (size[-1] ** -0.5 if len(size) == 2 else 1) for size in sizes)
    return factory.tokens(), *weights


def _predict(factory: InputFactory, backend: Backend, x: Tensor, *weights: Tensor) -> Tensor:
    mixer = ops.Mixer(*weights)  # type: ignore[arg-type]  # the last field, eps, has a default
    scores = ops.predict_scores(x, mixer, factory.shape.prefix, backend=backend)
    return scores.to(x.dtype)  # compared in this precision, because products of halves have rounded operands


def _tokens_and_scores(factory: InputFactory) -> Inputs:
    return factory.tokens(), factory.scores()


def _tokens_and_head_scores(factory: InputFactory) -> Inputs:
    return factory.tokens(), factory.scores(factory.shape.heads)


def _tokens_head_scores_and_norm(factory: InputFactory) -> Inputs:
    return *_tokens_and_head_scores(factory), factory.vector(), factory.vector()


def _prune(factory: InputFactory, backend: Backend, x: Tensor, scores: Tensor) -> ops.Pruned:
    return ops.prune_tokens(x, scores, factory.keep, prefix=factory.shape.prefix, backend=backend)


def _prune_by_rank(factory: InputFactory, backend: Backend, x: Tensor, scores: Tensor) -> ops.Pruned:
    return ops.prune_tokens(x, scores, factory.keep, False, "rank", factory.shape.prefix, backend=backend)


def _prune_fuse_norm(
    factory: InputFactory, backend: Backend, x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor
) -> ops.Pruned:
    norm, prefix = (weight, bias, 1e-5), factory.shape.prefix
    return ops.prune_tokens(x, scores, factory.keep, True, "mean", prefix, norm, backend=backend)


def _dropped_bytes(factory: InputFactory) -> int:
    """Return the bytes of the dropped patches."""
    return factory.batch * (factory.patches - factory.keep) * factory.shape.width * factory.dtype.itemsize


def _points_and_scores(factory: InputFactory) -> Inputs:
    return factory.points(), factory.scores()


def _points_head_scores_and_norm(factory: InputFactory) -> Inputs:
    return factory.points(), factory.scores(factory.shape.heads), factory.vector(), factory.vector()


def _patches_per_center(factory: InputFactory) -> int:
    """Return the mean number of patches that join each of two centres at TCA's stronger published rate."""
    return factory.patches + 1 - math.ceil(0.9 * factory.patches)


def _condense(factory: InputFactory, backend: Backend, x: Tensor, scores: Tensor) -> ops.Condensed:
    m = _patches_per_center(factory)
    keep, prefix = factory.patches + 1 - 3 * m, factory.shape.prefix
    return ops.condense_tokens(x, scores, keep, 2 * m, 2, prefix=prefix, backend=backend)


def _condense_by_rank(
    factory: InputFactory, backend: Backend, x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor
) -> ops.Condensed:
    m = _patches_per_center(factory)
    keep, prefix, norm = factory.patches + 1 - 3 * m, factory.shape.prefix, (weight, bias, 1e-5)
    return ops.condense_tokens(x, scores, keep, 2 * m, 2, scores, "rank", prefix, norm=norm, backend=backend)


def _keys(factory: InputFactory) -> Inputs:
    return (factory.signs(factory.shape.heads),)


def _match(factory: InputFactory, backend: Backend, keys: Tensor) -> ops.Match:
    return ops.match_tokens(keys, factory.shape.r, factory.shape.prefix, backend=backend)


def _edges(factory: InputFactory) -> ops.Match:
    return ops.match_tokens(factory.signs(), factory.shape.r, factory.shape.prefix, backend="reference")


def _tokens_sizes_and_edges(factory: InputFactory) -> Inputs:
    return factory.tokens(), factory.sizes(), *_edges(factory)


def _tokens_sizes_norm_and_edges(factory: InputFactory) -> Inputs:
    return factory.tokens(), factory.sizes(), factory.vector(), factory.vector(), *_edges(factory)


def _merge(factory: InputFactory, backend: Backend, x: Tensor, size: Tensor, *match: Tensor) -> ops.Merged:
    return ops.merge_tokens(x, ops.Match(*match), size, backend=backend)


def _merge_norm(
    factory: InputFactory, backend: Backend, x: Tensor, size: Tensor, weight: Tensor, bias: Tensor, *match: Tensor
) -> ops.Merged:
    return ops.merge_tokens(x, ops.Match(*match), size, (weight, bias, 1e-5), backend=backend)


def _patches_and_classes(factory: InputFactory) -> Inputs:
    return factory.units(factory.batch, factory.patches), factory.units(factory.classes)


def _cross_attention(factory: InputFactory, backend: Backend, visual: Tensor, text: Tensor) -> ops.CrossAttended:
    return ops.cross_attention(visual, text, backend=backend)


def _patches_pooled_and_classes(factory: InputFactory) -> Inputs:
    patches, pooled = factory.units(factory.batch, factory.patches), factory.units(factory.batch)
    return patches, pooled, factory.units(factory.classes)


def _calip(factory: InputFactory, backend: Backend, visual: Tensor, pooled: Tensor, text: Tensor) -> Tensor:
    return ops.calip_logits(visual, pooled, text, backend=backend).to(visual.dtype)  # as in `_predict`


def _queries_and_support(factory: InputFactory) -> Inputs:
    """Return queries, a support sorted by class, its labels, and the row at which each class begins."""
    size = (factory.support,)
    labels = torch.randint(factory.classes, size, generator=factory.generator, device=factory.device).sort().values
    _, offsets = reference.sort_by_class(labels, factory.classes)
    return factory.units(factory.batch), factory.units(factory.support), labels, offsets


def _affinity(
    factory: InputFactory, backend: Backend, queries: Tensor, support: Tensor, labels: Tensor, offsets: Tensor
) -> Tensor:
    votes = ops.affinity(queries, support, labels, factory.classes, 5.5, offsets=offsets, backend=backend)
    return votes.to(queries.dtype)  # as in `_predict`


def _distill_inputs(factory: InputFactory) -> Inputs:
    """Return tokens, a teacher's tokens, weights, a mask that selects two tokens in five, and a projection."""
    size = (factory.batch, factory.shape.tokens)
    teacher = factory.units(*size)
    weights, order = torch.rand(2, *size, generator=factory.generator, device=factory.device)
    projection = factory.normal(factory.embedding, factory.shape.width) * factory.shape.width**-0.5
    return factory.tokens(), teacher, weights, order.argsort(1) < _selected_tokens(factory), projection


def _selected_tokens(factory: InputFactory) -> int:
    return math.ceil(0.4 * factory.shape.tokens)


def _unselected_bytes(factory: InputFactory) -> int:
    """Return the bytes of the student's and the teacher's tokens that are not selected."""
    rows = factory.batch * (factory.shape.tokens - _selected_tokens(factory))
    return rows * (factory.shape.width + factory.embedding) * factory.dtype.itemsize


def _targeted_l1(
    factory: InputFactory,
    backend: Backend,
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    mask: Tensor,
    projection: Tensor,
) -> Tensor:
    distance = ops.targeted_l1(student, teacher, projection, weights, mask, backend=backend)
    return distance.to(student.dtype)  # as in `_predict`


def _hidden_and_bias(factory: InputFactory) -> Inputs:
    return factory.tokens(4), factory.vector(4)


def _bias_act(act: Act, factory: InputFactory, backend: Backend, x: Tensor, bias: Tensor) -> Tensor:
    return ops.bias_act(x, bias, act, backend=backend)


def _stream_branch_and_vectors(factory: InputFactory) -> Inputs:
    return factory.tokens(), factory.tokens(), *(factory.vector() for _ in range(4))


def _add_norm(
    factory: InputFactory,
    backend: Backend,
    x: Tensor,
    y: Tensor,
    bias: Tensor,
    scale: Tensor,
    weight: Tensor,
    shift: Tensor,
) -> Any:
    return ops.add_norm(x, y, bias, scale, (weight, shift, 1e-5), backend=backend)


CASES = {
    "attention": Case(_packed, partial(_attention, None)),
    "attention_sized": Case(_packed_and_sizes, partial(_attention, None)),
    "attention_cls": Case(_packed, partial(_attention, "cls")),
    "attention_cls_sized": Case(_packed_and_sizes, partial(_attention, "cls")),
    "attention_received": Case(_packed, partial(_attention, "received")),
    "attention_keys": Case(_packed, partial(_attention, "keys")),
    "rank_tokens": Case(_packed, _rank, _bytes_beside_keys_and_cls),
    "predict_scores": Case(_tokens_and_mixer, _predict, num_shared=14),
    "prune_tokens": Case(_tokens_and_scores, _prune, _dropped_bytes),
    "prune_tokens_heads_fuse_norm": Case(_tokens_head_scores_and_norm, _prune_fuse_norm),
    "prune_tokens_rank": Case(_tokens_and_head_scores, _prune_by_rank, _dropped_bytes),
    "condense_tokens": Case(_points_and_scores, _condense),
    "condense_tokens_rank_norm": Case(_points_head_scores_and_norm, _condense_by_rank),
    "match_tokens": Case(_keys, _match),
    "merge_tokens": Case(_tokens_sizes_and_edges, _merge),
    "merge_tokens_norm": Case(_tokens_sizes_norm_and_edges, _merge_norm),
    "cross_attention": Case(_patches_and_classes, _cross_attention, num_shared=1),
    "calip_logits": Case(_patches_pooled_and_classes, _calip, num_shared=1),
    "affinity": Case(_queries_and_support, _affinity, num_shared=3),
    "targeted_l1": Case(_distill_inputs, _targeted_l1, _unselected_bytes, num_shared=1),
    "bias_act_quick_gelu": Case(_hidden_and_bias, partial(_bias_act, "quick_gelu")),
    "bias_act_gelu": Case(_hidden_and_bias, partial(_bias_act, "gelu")),
    "bias_act_gelu_tanh": Case(_hidden_and_bias, partial(_bias_act, "gelu_tanh")),
    "add_norm": Case(_stream_branch_and_vectors, _add_norm),
}
