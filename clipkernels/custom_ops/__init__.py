"""Triton launchers as opaque torch operators, which support torch.compile, export, fake tensors and gradients.

Each operator has a schema, an implementation (the launcher), a fake that returns the real strides, and a backward; an
operator without a gradient has a backward that raises. Each kernel file has one module here, of the same stem.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from clipkernels.backend import interpreting
from clipkernels.reference import Norm

# `Library.define` costs half the call overhead of `torch.library.custom_op`.
_LIBRARY = torch.library.Library("clipkernels", "DEF")
_KEYS = ("CUDA", "CPU") if interpreting() else ("CUDA",)
_PLAIN = (Tensor, torch.nn.Parameter)


def can_skip_dispatcher(*tensors: Tensor | None) -> bool:
    """Return true if a launcher may be called directly: plain tensors, no gradient, no tracer, no dispatch mode."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None:
        return False
    needs_grad = torch.is_grad_enabled()
    for tensor in tensors:  # a loop, because every launch passes here and a generator takes three times as long
        if tensor is not None and (type(tensor) not in _PLAIN or (needs_grad and tensor.requires_grad)):
            return False
    return True


@cache
def kernels(stem: str) -> Any:
    """The module of kernels/ of a stem, imported by its first launch: triton is optional."""
    return import_module(f"clipkernels.kernels.{stem}")


def register(
    schema: str,
    launch: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
) -> None:
    """Define the operator `clipkernels::<schema>`; without a `backward` its gradient raises RuntimeError."""
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


def call_with_norm(
    name: str, launch: Callable[..., Any], arguments: tuple[Any, ...], norm: Norm | None, *tensors: Tensor | None
) -> Any:
    """Run an operator whose last result is the LayerNorm of its tokens, None without a norm.

    Args:
        name: name of the operator, whose schema takes `arguments`, weight, bias and eps.
        launch: the launcher, which takes `arguments` and `norm`.
        arguments: tensors, numbers and strings.
        norm: (weight, bias, eps) or None.
        tensors: the tensors among `arguments`; None is ignored.
    Returns:
        The tuple of the launcher's results.
    """
    weight, bias, eps = norm if norm is not None else (None, None, 0.0)
    # The caller lists the tensors, because finding them among the arguments would cost half a microsecond.
    if can_skip_dispatcher(*tensors, weight, bias):
        return launch(*arguments, norm)
    *results, normed = getattr(torch.ops.clipkernels, name)(*arguments, weight, bias, eps)
    return (*results, normed if norm is not None else None)


def flatten_norm(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Return the implementation for a schema that ends in weight, bias and eps; `launch` takes a norm tuple instead.

    The last result, the LayerNorm, is an empty tensor without a norm, because a schema has no optional results.
    """

    def implementation(*arguments: Any) -> Any:
        *others, weight, bias, eps = arguments
        *results, normed = launch(*others, None if weight is None or bias is None else (weight, bias, eps))
        return (*results, others[0].new_empty(0) if normed is None else normed)

    return implementation


def norm_backward(
    grad: Tensor, grad_normed: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of stored rows x (…,C) in fp32, and of weight and bias of their LayerNorm in their dtypes.

    Args:
        grad: gradient of the rows as such, in fp32.
        grad_normed: gradient of their LayerNorm, or None.
        x: the rows; unused without a norm.
        weight, bias, eps: the norm; weight and bias are None without one.
    """
    if weight is None or bias is None or grad_normed is None:
        return grad, None, None
    wide, shape = x.float(), x.shape[-1:]
    _, mean, rstd = torch.native_layer_norm(wide, shape, weight.float(), bias.float(), eps)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed.float(), wide, shape, mean, rstd, weight.float(), bias.float(), [True, True, True]
    )
    return grad + grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
