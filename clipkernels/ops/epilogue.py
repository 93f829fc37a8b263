"""Epilogues of a matrix product: `bias_act`, `add_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import reference
from clipkernels.arguments import check_choice, check_floating, check_norm, check_tensors, check_vectors, shape_of
from clipkernels.backend import Backend
from clipkernels.custom_ops import epilogue as _epilogue
from clipkernels.reference import Act, Added, Norm


def bias_act(x: Tensor, bias: Tensor | None, act: Act, *, backend: Backend = "auto") -> Tensor:
    """act(x + bias), in one pass.

        gelu(x + bias)  # or z * sigmoid(1.702 * z), or gelu(z, approximate="tanh")

    Args:
        x: (…,C), a matrix product without its bias.
        bias: (C,) or None.
        act: "quick_gelu", "gelu" or "gelu_tanh".
        backend: "auto", "triton" or "reference".
    Returns:
        (…,C) in the dtype and on the device of x.
    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes or devices do not match, or the activation is unknown.
    Guarantees: computed in fp32 on triton; deterministic; differentiable.
    Source: GELU, arXiv 1606.08415; quick_gelu is its sigmoid approximation, OpenAI CLIP's activation.
    """
    _check_bias_act(x, bias, act)
    chosen = _backend.choose(backend, x.device, x.dtype, "bias_act")
    return (reference.bias_act if chosen == "reference" else _epilogue.bias_act)(x, bias, act)


def add_norm(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    norm: Norm | None = None,
    *,
    backend: Backend = "auto",
) -> Added:
    """The residual sum x + scale·(y + bias) and the LayerNorm that follows it, in one pass.

    Args:
        x: (…,C) residual stream.
        y: (…,C) branch, a matrix product without its bias and layer scale; its dtype may differ from that of x, as
            under autocast.
        bias: (C,) or None.
        scale: (C,) layer scale or None.
        norm: (weight (C,), bias (C,), eps): also return the LayerNorm of the sum.
        backend: "auto", "triton" or "reference".
    Returns:
        Added(tokens (…,C) in the wider dtype of x and y, normed like tokens or None).
    Raises:
        TypeError: an argument is no tensor, or norm no tuple.
        ValueError: shapes, dtypes or devices do not match.
    Guarantees: LayerNorm statistics in fp32, of the sum as rounded to its dtype; deterministic; differentiable.
    Source: the pre-norm transformer block; LayerScale, arXiv 2103.17239.
    """
    _check_add_norm(x, y, bias, scale, norm)
    dtype = x.dtype if x.dtype == y.dtype else torch.promote_types(x.dtype, y.dtype)
    chosen = _backend.choose(backend, x.device, dtype, "add_norm", width=x.shape[-1])
    return (reference.add_norm if chosen == "reference" else _epilogue.add_norm)(x, y, bias, scale, norm)


def _check_bias_act(x: Tensor, bias: Tensor | None, act: str) -> None:
    check_tensors(x=x)
    if x.ndim == 0:
        raise ValueError(f"x must be (…,C), got {shape_of(x)}")
    check_floating(x=x)
    check_choice("act", act, "quick_gelu", "gelu", "gelu_tanh")
    check_vectors(x, bias=bias)


def _check_add_norm(x: Tensor, y: Tensor, bias: Tensor | None, scale: Tensor | None, norm: Norm | None) -> None:
    check_tensors(x=x, y=y)
    if x.ndim == 0:
        raise ValueError(f"x must be (…,C), got {shape_of(x)}")
    if y.shape != x.shape:
        raise ValueError(f"y must be {shape_of(x)} like x, got {shape_of(y)}")
    check_floating(x=x, y=y)
    if y.device != x.device:
        raise ValueError(f"y must be on {x.device} like x, got {y.device}")
    check_vectors(x, bias=bias, scale=scale)
    check_norm(norm, x)
