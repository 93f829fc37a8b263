"""The operation `predict_scores` on the Triton backend."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels.custom_ops import can_skip_dispatcher, kernels, register
from clipkernels.reference import Mixer


def predict_scores(x: Tensor, mixer: Mixer, prefix: int) -> Tensor:
    *weights, eps = mixer
    call = _predict if can_skip_dispatcher(x, *weights) else torch.ops.clipkernels.predict_scores
    return call(x, weights, eps, prefix)


def _predict(x: Tensor, weights: list[Tensor], eps: float, prefix: int) -> Tensor:
    return kernels("predict").predict_scores(x, weights, eps, prefix)


def _fake(x: Tensor, weights: list[Tensor], eps: float, prefix: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] - prefix, dtype=torch.float32)


register("predict_scores(Tensor x, Tensor[] weights, float eps, int prefix) -> Tensor", _predict, _fake)
