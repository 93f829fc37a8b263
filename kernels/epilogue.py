"""Exact epilogues of a matrix product, in one pass instead of three.

    bias_act: act(x + bias);  add_norm: out = x + scale·(y + bias), normed = LayerNorm(out)

`bias_act` reads and writes its tensor once. `add_norm` reads x and y and writes out and its norm, 4·B·N·C. A separate
sum and LayerNorm move 5·B·N·C, and 9·B·N·C with a bias and a LayerScale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipkernels.kernels import layer_norm
from clipkernels.kernels.launch import Launch, makes_launches
from clipkernels.kernels.layer_norm import store_rows


@triton.jit
def _swish(x, slope, HALF: tl.constexpr):
    """Return x / (1 + 2^-slope), which is x·sigmoid(y) for slope = y log2 e; to a few units of fp32 if not HALF."""
    denominator = 1.0 + tl.exp2(-slope)
    if HALF:  # an approximate inverse square root is one instruction, and a division eight
        inverse = tl.rsqrt(denominator)
        return x * inverse * inverse
    return x / denominator


@triton.jit
def _bias_act_kernel(
    x_ptr, bias_ptr, out_ptr,
    rows, C,
    ACT: tl.constexpr, BIAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_r < rows)[:, None] & (offs_c < C)[None, :]
    offs = offs_r[:, None] * C + offs_c[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]
    half = out_ptr.dtype.element_ty != tl.float32
    if ACT == "quick_gelu":  # 1.702 log2 e
        x = _swish(x, 2.4554669595930156 * x, half)
    elif ACT == "gelu":
        x *= 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:  # 0.5 (1 + tanh u) = sigmoid(2 u), u = √(2/π) (x + 0.044715 x³); 2 √(2/π) log2 e
        x = _swish(x, 2.302208198144325 * (x + 0.044715 * x * x * x), half)
    tl.store(out_ptr + offs, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_norm_kernel(
    x_ptr, y_ptr, bias_ptr, scale_ptr, out_ptr, normed_ptr, weight_ptr, shift_ptr,
    rows, eps,
    C: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    mask = (offs_r < rows)[:, None] & (offs_c < C)[None, :]
    offs = offs_r[:, None] * C + offs_c[None, :]
    y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]
    if SCALE:
        y *= tl.load(scale_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]
    y += tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    store_rows(y, offs_r, rows, out_ptr, normed_ptr, weight_ptr, shift_ptr, eps, C, NORM, BLOCK_C)


def config(op: str, width: int) -> dict[str, int]:
    """Return block sizes and warps of either kernel, for rows of width C."""
    if op == "bias_act":
        return {"BLOCK_R": 4, "BLOCK_C": min(1024, triton.next_power_of_2(width)), "num_warps": 4}
    return {**layer_norm.blocks(4, width, 4096), "num_warps": 4}


def bias_act(x: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """Launch the kernel: like x (…,C), contiguous."""
    x = x.contiguous()
    out = torch.empty_like(x)
    elements = x.numel()
    if elements:
        launch = _bias_act_launch(elements, x.shape[-1], act, bias is not None)
        launch(x, x if bias is None else bias.contiguous(), out)
    return out


@makes_launches
def _bias_act_launch(elements: int, width: int, act: str, biased: bool) -> Launch:
    rows, blocks = elements // width, config("bias_act", width)
    grid = (triton.cdiv(rows, blocks["BLOCK_R"]), triton.cdiv(width, blocks["BLOCK_C"]))
    return Launch(_bias_act_kernel, grid, rows, width, ACT=act, BIAS=biased, **blocks)


def add_norm(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    norm: tuple[Tensor, Tensor, float] | None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel: out, and normed or None, (…,C) contiguous, in the wider dtype of x and y."""
    x, y = x.contiguous(), y.contiguous()
    dtype = x.dtype if x.dtype == y.dtype else torch.promote_types(x.dtype, y.dtype)
    out = torch.empty_like(x, dtype=dtype)
    normed = None if norm is None else torch.empty_like(out)
    elements = x.numel()
    if elements:
        weight, shift, eps = layer_norm.arguments(norm, x)
        launch = _add_norm_launch(elements, x.shape[-1], bias is not None, scale is not None, norm is not None, eps)
        bias = x if bias is None else bias.contiguous()
        scale = x if scale is None else scale.contiguous()
        launch(x, y, bias, scale, out, out if normed is None else normed, weight, shift)
    return out, normed


@makes_launches
def _add_norm_launch(elements: int, width: int, biased: bool, scaled: bool, normed: bool, eps: float) -> Launch:
    rows, blocks = elements // width, config("add_norm", width)
    grid = (triton.cdiv(rows, blocks["BLOCK_R"]),)
    return Launch(_add_norm_kernel, grid, rows, eps, C=width, BIAS=biased, SCALE=scaled, NORM=normed, **blocks)
