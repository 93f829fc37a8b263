"""What follows a product: bias and activation, residual sum and LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import checks, reference
from clipkernels.backend import Backend
from clipkernels.custom_ops import epilogue as _epilogue
from clipkernels.reference import Act, Added, Norm


def bias_act(x: Tensor, bias: Tensor | None, act: Act, *, backend: Backend = "auto") -> Tensor:
    """act(x + bias), in one pass.

        gelu(x + bias)  # or z * sigmoid(1.702 * z), or gelu(z, approximate="tanh")

    Args:
        x: (…,C), a product that lacks its bias yet.
        bias: (C,) or None.
        act: "quick_gelu", "gelu" or "gelu_tanh".
        backend: "auto", "triton" or "reference".
    Returns:
        like x.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an unknown activation.
    Guarantees: computed in fp32 on triton; deterministic; differentiable.
    Source: GELU, arXiv 1606.08415; quick_gelu is its sigmoid approximation, OpenAI CLIP's activation.
    """
    checks.check_bias_act(x, bias, act)
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
    """The residual sum x + scale·(y + bias), and the LayerNorm that follows, in one pass.

    Args:
        x: (…,C) residual stream.
        y: (…,C) branch, a product that lacks its bias and layer scale yet; autocast may make it narrower than x.
        bias: (C,) or None.
        scale: (C,) layer scale or None.
        norm: (weight (C,), bias (C,), eps): also return the LayerNorm of the sum.
        backend: "auto", "triton" or "reference".
    Returns:
        Added(tokens (…,C) in the wider dtype of x and y, normed like tokens or None).
    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    Guarantees: statistics in fp32, of the sum as it is stored; deterministic; differentiable.
    Source: the pre-norm transformer block; LayerScale, arXiv 2103.17239.
    """
    checks.check_add_norm(x, y, bias, scale, norm)
    chosen = _backend.choose(backend, x.device, torch.promote_types(x.dtype, y.dtype), "add_norm")
    return (reference.add_norm if chosen == "reference" else _epilogue.add_norm)(x, y, bias, scale, norm)
