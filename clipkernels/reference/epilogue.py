"""Epilogues of a matrix product: bias, activation, residual sum, LayerNorm."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from clipkernels.reference.precision import upcast

Norm = tuple[Tensor, Tensor, float]
Act = Literal["quick_gelu", "gelu", "gelu_tanh"]


class Added(NamedTuple):
    """tokens (…,C), normed like tokens or None."""

    tokens: Tensor
    normed: Tensor | None = None


def bias_act(x: Tensor, bias: Tensor | None, act: Act) -> Tensor:
    z = x if bias is None else x + bias
    if act == "quick_gelu":
        return (z * torch.sigmoid(1.702 * z)).to(x.dtype)
    return gelu(z, approximate="tanh" if act == "gelu_tanh" else "none").to(x.dtype)


def add_norm(x: Tensor, y: Tensor, bias: Tensor | None, scale: Tensor | None, norm: Norm | None) -> Added:
    z = y if bias is None else y + bias
    tokens = x + (z if scale is None else z * scale)
    tokens = tokens.to(torch.promote_types(x.dtype, y.dtype))  # bias and scale may be wider
    return Added(tokens, norm_rows(tokens, norm))


def norm_rows(x: Tensor, norm: Norm | None) -> Tensor | None:
    """Return the LayerNorm of rows x (…,C) with fp32 statistics, in the dtype of x, or None without a norm."""
    if norm is None:
        return None
    weight, bias, eps = norm
    return layer_norm(upcast(x), x.shape[-1:], weight.to(upcast(x)), bias.to(upcast(x)), eps).to(x.dtype)
