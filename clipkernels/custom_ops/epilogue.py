"""The operations `bias_act` and `add_norm` on the Triton backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipkernels.custom_ops import call_with_norm, can_skip_dispatcher, flatten_norm, kernels, norm_backward, register
from clipkernels.reference import Added, Norm


def bias_act(x: Tensor, bias: Tensor | None, act: str) -> Tensor:
    call = _launch_bias_act if can_skip_dispatcher(x, bias) else torch.ops.clipkernels.bias_act
    return call(x, bias, act)


def add_norm(x: Tensor, y: Tensor, bias: Tensor | None, scale: Tensor | None, norm: Norm | None) -> Added:
    tensors = (x, y, bias, scale)
    return Added(*call_with_norm("add_norm", _launch_add_norm, tensors, norm, *tensors))


def _launch_bias_act(x: Tensor, bias: Tensor | None, act: str) -> Tensor:
    return kernels("epilogue").bias_act(x, bias, act)


def _bias_act_fake(x: Tensor, bias: Tensor | None, act: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _bias_act_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.act = inputs
    ctx.save_for_backward(x, bias)


def _bias_act_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, bias = ctx.saved_tensors
    wide = x.float() if bias is None else x.float() + bias.float()
    if ctx.act == "quick_gelu":
        gate = torch.sigmoid(1.702 * wide)
        grad_wide = grad.float() * gate * (1 + 1.702 * wide * (1 - gate))
    else:
        approximate = "tanh" if ctx.act == "gelu_tanh" else "none"
        grad_wide = torch.ops.aten.gelu_backward(grad.float(), wide, approximate=approximate)
    return grad_wide.to(x.dtype), None if bias is None else _sum_rows(grad_wide).to(bias.dtype), None


def _launch_add_norm(*arguments: Any) -> Any:
    return kernels("epilogue").add_norm(*arguments)


def _add_norm_fake(
    x: Tensor, y: Tensor, bias: Tensor | None, scale: Tensor | None, weight: Tensor | None, *_: object
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, y.dtype)
    tokens = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return tokens, x.new_empty(0) if weight is None else torch.empty_like(tokens)


def _add_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, bias, scale, weight, shift, ctx.eps = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(y, bias, scale, output[0] if weight is not None else None, weight, shift)


def _add_norm_backward(ctx: Any, grad: Tensor | None, grad_normed: Tensor | None) -> tuple[Any, ...]:
    y, bias, scale, tokens, weight, shift = ctx.saved_tensors
    total = torch.zeros_like(y, dtype=torch.float32) if grad is None else grad.float()
    grad_bias = grad_scale = None
    total, grad_weight, grad_shift = norm_backward(total, grad_normed, tokens, weight, shift, ctx.eps)
    branch = total if scale is None else total * scale.float()
    if scale is not None:
        wide = y.float() if bias is None else y.float() + bias.float()
        grad_scale = _sum_rows(total * wide).to(scale.dtype)
    if bias is not None:
        grad_bias = _sum_rows(branch).to(bias.dtype)
    return total.to(ctx.dtype), branch.to(y.dtype), grad_bias, grad_scale, grad_weight, grad_shift, None


def _sum_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).sum(0)


register(
    "bias_act(Tensor x, Tensor? bias, str act) -> Tensor",
    _launch_bias_act,
    _bias_act_fake,
    _bias_act_backward,
    _bias_act_setup,
)
register(
    "add_norm(Tensor x, Tensor y, Tensor? bias, Tensor? scale, Tensor? weight, Tensor? shift, float eps) "
    "-> (Tensor tokens, Tensor normed)",
    flatten_norm(_launch_add_norm),
    _add_norm_fake,
    _add_norm_backward,
    _add_norm_setup,
)
