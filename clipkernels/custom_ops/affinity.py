"""The operation `affinity` on the Triton backend."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels.custom_ops import can_skip_dispatcher, kernels, register


def affinity(queries: Tensor, support: Tensor, offsets: Tensor, beta: float, weights: Tensor | None) -> Tensor:
    """Affinity (t,K) to a support sorted by class; class c has the rows from offsets[c] to offsets[c+1]."""
    call = _launch if can_skip_dispatcher(queries, support, weights) else torch.ops.clipkernels.affinity
    return call(queries, support, offsets, beta, weights)


def _launch(queries: Tensor, support: Tensor, offsets: Tensor, beta: float, weights: Tensor | None) -> Tensor:
    return kernels("affinity").affinity(queries, support, offsets, beta, weights)


def _fake(queries: Tensor, support: Tensor, offsets: Tensor, beta: float, weights: Tensor | None) -> Tensor:
    return queries.new_empty(queries.shape[0], offsets.shape[0] - 1, dtype=torch.float32)


register(
    "affinity(Tensor queries, Tensor support, Tensor offsets, float beta, Tensor? weights) -> Tensor", _launch, _fake
)
