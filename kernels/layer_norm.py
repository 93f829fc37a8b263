"""Storing rows and, optionally, their LayerNorm: the end of every kernel that writes tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def store_rows(
    x, offs_r, rows, tokens_ptr, normed_ptr, weight_ptr, bias_ptr, eps,
    C: tl.constexpr, NORM: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store x [BLOCK_R, BLOCK_C] at rows `offs_r` < `rows` of width C; the LayerNorm is of the values as stored."""
    offs_c = tl.arange(0, BLOCK_C)
    mask = (offs_r < rows)[:, None] & (offs_c < C)[None, :]
    offs = offs_r.to(tl.int64)[:, None] * C + offs_c[None, :]
    x = x.to(tokens_ptr.dtype.element_ty)
    tl.store(tokens_ptr + offs, x, mask=mask)
    if NORM:
        wide = x.to(tl.float32)
        mean = tl.sum(tl.where(mask, wide, 0.0), 1) / C
        centred = tl.where(mask, wide - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
        weight = tl.load(weight_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
        normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
        tl.store(normed_ptr + offs, normed.to(normed_ptr.dtype.element_ty), mask=mask)


def arguments(norm: tuple[Tensor, Tensor, float] | None, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return weight, bias and eps for a launch; without a norm x replaces both, because a launch needs pointers."""
    return (x, x, 0.0) if norm is None else (norm[0].contiguous(), norm[1].contiguous(), norm[2])


def blocks(rows: int, width: int, elements: int) -> dict[str, int]:
    """Return tile sizes for rows of width C; a tile of several rows has at most `elements` elements."""
    block_c = triton.next_power_of_2(width)
    return {"BLOCK_R": max(1, min(rows, elements // block_c)), "BLOCK_C": block_c}
