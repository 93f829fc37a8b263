"""Votes of a support set, per query and class: `affinity`."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import reference
from clipkernels.arguments import (
    check_floating,
    check_int,
    check_numbers,
    check_same,
    check_tensors,
    shape_of,
    values_are_readable,
)
from clipkernels.backend import Backend
from clipkernels.custom_ops import affinity as _affinity
from clipkernels.messages import join_sizes


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
    """Affinity (t,K) of each query to each class's support: Σ wⱼ·exp(-β(1 - q·fⱼ)) over the class's rows j.

        (-beta * (1 - queries @ support.T)).exp() * weights @ one_hot(labels, classes)

    Args:
        queries: (t,E), L2-normalised in the source.
        support: (n,E), L2-normalised in the source.
        labels: (n,) int64, the class of each support row; a row whose label is outside 0..K-1 votes for no class.
        classes: K.
        beta: sharpness β.
        weights: (n,) weight of each support row, any float dtype; None is all ones.
        offsets: (K+1,) int64, the row at which each class begins and, last, the row at which the last class ends. They
            require labels in ascending order and must agree with them, which is checked on the CPU only, because a GPU
            would have to be waited for. With None the triton backend sorts the support
            at every call. See `reference.sort_by_class`.
        backend: "auto", "triton" or "reference".
    Returns:
        (t,K) fp32 (fp64 for fp64 inputs); 0 for a class without support rows.
    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes or devices do not match, or offsets disagree with the labels.
        RuntimeError: a gradient is required on the triton backend, which has no backward.
    Guarantees: the (t,n) affinities are never entirely in memory, unless autograd saves them; accumulation in fp32, on
        triton of affinities rounded to 16 bits if the inputs are in half precision; deterministic on the CPU and on
        triton; no host sync. Only the reference is differentiable.
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
    check_tensors(queries=queries, support=support, labels=labels)
    if queries.ndim != 2 or not queries.shape[1]:
        raise ValueError(f"queries must be (t,E) with E ≥ 1, got {shape_of(queries)}")
    check_floating(queries=queries)
    if support.ndim != 2 or support.shape[1] != queries.shape[1]:
        raise ValueError(f"support must be (n,E) with E = {queries.shape[1]}, got {shape_of(support)}")
    check_same(queries, support=support)
    check_int("classes", classes, 1, 2**31 - 1, "2³¹ - 1")
    check_numbers(beta=beta)
    rows = (len(support),)
    indices = [("labels", labels, rows)] + ([("offsets", offsets, (classes + 1,))] if offsets is not None else [])
    for name, tensor, shape in indices:
        check_tensors(**{name: tensor})
        if tuple(tensor.shape) != shape or tensor.dtype != torch.int64 or tensor.device != queries.device:
            actual = f"{shape_of(tensor)} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name} must be ({join_sizes(shape)}) torch.int64 on {queries.device}, got {actual}")
    if weights is not None:
        check_tensors(weights=weights)
        if tuple(weights.shape) != rows or weights.device != queries.device:
            actual = f"{shape_of(weights)} on {weights.device}"
            raise ValueError(f"weights must be (n) = ({len(support)}) on {queries.device}, got {actual}")
        check_floating(weights=weights)
    if offsets is not None and values_are_readable(labels, offsets):
        if (labels[1:] < labels[:-1]).any():
            raise ValueError("labels must ascend where offsets are given: sort the support, or omit the offsets")
        expected = torch.searchsorted(labels, torch.arange(classes + 1))
        if not torch.equal(offsets, expected):
            row = int((offsets != expected).nonzero()[0])
            message = f"offsets[{row}] must be {int(expected[row])}, the first row of its class"
            raise ValueError(f"{message}, got {int(offsets[row])}: see reference.sort_by_class")
