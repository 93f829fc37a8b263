"""The Triton launchers as opaque torch operators: for torch.compile and export, for fake tensors, for gradients.

Each operator has a schema, an implementation (the launcher), a fake with the real strides, and a backward, or one that
says that there is none. One module per kernel file, of the same stem.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from clipkernels.backend import interpreting

# `Library.define` costs half the call overhead of `torch.library.custom_op`.
_LIBRARY = torch.library.Library("clipkernels", "DEF")
_KEYS = ("CUDA", "CPU") if interpreting() else ("CUDA",)


def can_skip_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether eager may call a launcher directly: real tensors, no gradient, nobody watching."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    if torch.jit.is_tracing():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return False
    return all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in given)


def register(
    schema: str,
    launch: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
) -> None:
    """Defines the operator `clipkernels::<schema>`; without a backward, asking for a gradient raises."""
    name = schema.partition("(")[0]

    def refuse(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"clipkernels::{name} has no backward: detach its inputs, or use the reference")

    _LIBRARY.define(schema)
    for key in _KEYS:
        _LIBRARY.impl(name, launch, key)
    torch.library.register_fake(f"clipkernels::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(
        f"clipkernels::{name}", refuse if backward is None else backward, setup_context=setup, lib=_LIBRARY
    )


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a LayerNorm of stored rows x (…,C): fp32 for x, their own dtype for weight and bias."""
    wide, shape = x.float(), x.shape[-1:]
    _, mean, rstd = torch.native_layer_norm(wide, shape, weight.float(), bias.float(), eps)
    through, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad.float(), wide, shape, mean, rstd, weight.float(), bias.float(), [True, True, True]
    )
    return through, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
