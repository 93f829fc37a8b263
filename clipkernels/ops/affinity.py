"""Votes of a support set: `affinity`."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import reference
from clipkernels.arguments import check_floating, check_numbers, check_same, join_sizes, shape_of
from clipkernels.backend import Backend
from clipkernels.custom_ops import affinity as _affinity


def affinity(
    queries: Tensor,
    support: Tensor,
    labels: Tensor,
    classes: int,
    beta: float,
    weights: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """How near each query is to a class's support: Σ wⱼ·exp(-β(1 - q·fⱼ)) over the class's rows, (t,K).

        (-beta * (1 - queries @ support.T)).exp() * weights @ one_hot(labels, classes)

    Args:
        queries: (t,E), L2-normalised in the source.
        support: (n,E), likewise.
        labels: (n,) int64 the class of each row of the support; what is not in 0..K-1 counts for none.
        classes: K.
        beta: sharpness β.
        weights: (n,) of the rows, any float dtype; None is all ones.
        offsets: (K+1,) int64 where each class begins, and where the last one ends, of a support whose labels ascend
            and say the same; None has it sorted by the triton backend, at every call. See `reference.sort_by_class`.
        backend: "auto", "triton" or "reference".
    Returns:
        (t,K) fp32 (fp64 for fp64 inputs); 0 for a class without support.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        RuntimeError: a gradient is wanted of the triton backend, which has none.
    Guarantees: the (t,n) affinities are never whole in memory, unless autograd keeps them; fp32 accumulation, of halves
        to 16 bits; deterministic on the CPU and on triton; no host sync. Differentiable on the reference alone.
    Source: Tip-Adapter, arXiv 2111.03930, section 3.2.
    """
    _check_affinity(queries, support, labels, classes, beta, weights, offsets)
    chosen = _backend.choose(backend, queries.device, queries.dtype, "affinity")
    if chosen == "reference":
        return reference.affinity(queries, support, labels, classes, beta, weights)
    if offsets is None:
        order, offsets = reference.sort_by_class(labels, classes)
        support, weights = support[order], None if weights is None else weights[order]
    return _affinity.affinity(queries, support, offsets, beta, weights)


def _check_affinity(
    queries: Tensor,
    support: Tensor,
    labels: Tensor,
    classes: int,
    beta: float,
    weights: Tensor | None,
    offsets: Tensor | None,
) -> None:
    if queries.ndim != 2 or not queries.shape[1]:
        raise ValueError(f"queries must be (t,E) with E ≥ 1, got {shape_of(queries)}")
    check_floating(queries=queries)
    if support.ndim != 2 or support.shape[1] != queries.shape[1]:
        raise ValueError(f"support must be (n,E) with E = {queries.shape[1]}, got {shape_of(support)}")
    check_same(queries, support=support)
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
        raise ValueError(f"classes must be a positive int, got {classes!r}")
    check_numbers(beta=beta)
    rows = (len(support),)
    for name, tensor, shape in (("labels", labels, rows), ("offsets", offsets, (classes + 1,))):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != torch.int64 or tensor.device != queries.device:
            came = f"{shape_of(tensor)} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name} must be ({join_sizes(shape)}) torch.int64 on {queries.device}, got {came}")
    if weights is not None:
        if tuple(weights.shape) != rows or weights.device != queries.device:
            came = f"{shape_of(weights)} on {weights.device}"
            raise ValueError(f"weights must be (n) = ({len(support)}) on {queries.device}, got {came}")
        check_floating(weights=weights)
