"""Attention with a signal that ranks tokens: non-causal, up to a thousand tokens, from the packed projection.

    p_ij ∝ size_j · exp(q_i·k_j / D**0.5);  out = p v;  cls_h = p_h0;  received = mean over heads and queries of p

A key of size 0 takes no part, not even in the maximum of the softmax. If all have size 0, every result is 0.

Reads Q, K, V once (3·B·N·C) and writes B·N·C. The CLS row adds B·H·P fp32, and one program per head, which reads K from
cache. `received` needs the final row sums first: unless all keys are one tile, each program goes over its keys again
(QK^T a second time, K from cache). It stores its column sums, and a second launch adds them in a fixed order. Takes
4·B·N²·C operations, 6·B·N²·C with `received`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipkernels.kernels.launch import Launch, makes_launches
from clipkernels.kernels.rank import LOG2E, LOWEST, cls_row, in_units, reduce_scores


@triton.jit
def _logits(
    q, k_ptr, size_ptr, offs_n, offs_d, N, scale, stride_kn,
    D: tl.constexpr, SIZED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return logits [BLOCK_M, BLOCK_N] in units of log2, and sizes [BLOCK_N]; -inf beyond N and for keys of size 0."""
    mask = (offs_d < D)[:, None] & (offs_n < N)[None, :]
    k = tl.load(k_ptr + offs_n.to(tl.int64)[None, :] * stride_kn + offs_d[:, None], mask=mask, other=0.0)
    if WIDE:
        k = k.to(tl.float32)
    s = tl.dot(q, k, input_precision="ieee") * scale
    there, size = offs_n < N, 1.0
    if SIZED:
        size = tl.load(size_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        there = size > 0.0
    return tl.where(there[None, :], s, float("-inf")), size


@triton.jit
def _attend(
    q, k_ptr, v_ptr, size_ptr, N, scale, stride_kn, stride_vn,
    D: tl.constexpr, SIZED: tl.constexpr, OUT: tl.constexpr, WIDE: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return Σ exp(s - max) v [BLOCK_M, BLOCK_D], the sums and maxima [BLOCK_M], and exp(s - max) of the last tile."""
    offs_d = tl.arange(0, BLOCK_D)
    most = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(TILES):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        s, size = _logits(q, k_ptr, size_ptr, offs_n, offs_d, N, scale, stride_kn, D, SIZED, WIDE)
        higher = tl.maximum(most, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        if SIZED:  # exp(s + log size) = size·exp(s)
            p *= size[None, :]
        shrink = tl.exp2(most - higher)
        total = total * shrink + tl.sum(p, 1)
        most = higher
        if OUT:
            mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
            v = tl.load(v_ptr + offs_n.to(tl.int64)[:, None] * stride_vn + offs_d[None, :], mask=mask, other=0.0)
            if WIDE:
                v = v.to(tl.float32)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    if SIZED:  # without a key the sums are 0, and so are all results
        total = tl.where(total == 0.0, 1.0, total)
    return acc, total, most, p


@triton.jit(do_not_specialize=["M", "N", "tiles"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, size_ptr, out_ptr, signal_ptr,
    H, M, N, tiles, prefix, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    D: tl.constexpr, SIZED: tl.constexpr, SIGNAL: tl.constexpr, OUT: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # One grid axis: the others are limited to 65,535 programs. Programs of a head are neighbours and share its keys in
    # cache.
    tile, row = tl.program_id(0) % tiles, tl.program_id(0).to(tl.int64) // tiles
    head, batch = row % H, row // H
    offs_m, offs_d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    here = (offs_m < M)[:, None] & (offs_d < D)[None, :]
    q_ptr += (batch * stride_qb + head * stride_qh) * UNIT
    k_ptr += (batch * stride_kb + head * stride_kh) * UNIT
    v_ptr += (batch * stride_vb + head * stride_vh) * UNIT
    stride_qm, stride_kn = tl.cast(stride_qm, tl.int64) * UNIT, tl.cast(stride_kn, tl.int64) * UNIT
    stride_vn = tl.cast(stride_vn, tl.int64) * UNIT
    size_ptr += batch * N
    P = N - prefix
    if tile * BLOCK_M < M:
        q = tl.load(q_ptr + offs_m.to(tl.int64)[:, None] * stride_qm + offs_d[None, :], mask=here, other=0.0)
        if WIDE:
            q = q.to(tl.float32)
        acc, total, most, p = _attend(
            q, k_ptr, v_ptr, size_ptr, N, scale, stride_kn, stride_vn,
            D, SIZED, OUT, WIDE, TILES, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if OUT:
            to = ((batch * M + offs_m)[:, None] * H + head) * D + offs_d[None, :]
            tl.store(out_ptr + to, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=here)
        if SIGNAL == "received":
            row_ptr = signal_ptr + ((batch * H + head) * tiles + tile) * P
            for again in range(TILES):
                offs_n = again * BLOCK_N + tl.arange(0, BLOCK_N)
                if TILES > 1:
                    s, size = _logits(q, k_ptr, size_ptr, offs_n, offs_d, N, scale, stride_kn, D, SIZED, WIDE)
                    p = tl.exp2(s - most[:, None])
                    if SIZED:
                        p *= size[None, :]
                share = tl.where((offs_m < M)[:, None], p / total[:, None], 0.0)
                tl.store(row_ptr + offs_n - prefix, tl.sum(share, 0), mask=(offs_n >= prefix) & (offs_n < N))
    elif SIGNAL == "cls":  # the extra program of a head: only query 0, while the keys are in cache
        row_ptr = signal_ptr + (batch * H + head) * P
        cls_row(q_ptr, k_ptr, size_ptr, row_ptr, N, prefix, scale, stride_kn, D, SIZED, TILES, BLOCK_N, BLOCK_D)


def config(keys: int, width: int, dtype: torch.dtype, signal: str | None) -> dict[str, int]:
    """Return block sizes, warps and stages for N keys and heads of width D."""
    block_d = max(16, triton.next_power_of_2(width))
    # As many queries per program as fit without spills, because each program reads all keys and values of its head.
    if dtype == torch.float32:  # without tensor cores, so that the selections match the reference
        block_m, block_n, warps = (32, 32, 8) if block_d <= 64 and signal != "received" else (16, 16, 4)
    else:
        block_n = 64 if block_d <= 64 else 32
        block_m, warps = (64, 4) if keys <= 64 or signal == "received" else (128, 8)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": 2}


def attention(
    q: Tensor, k: Tensor, v: Tensor | None, size: Tensor | None, signal: str | None, prefix: int
) -> tuple[Tensor, Tensor]:
    """Launch the kernels: out (B,H,M,D), stored as (B,M,H,D), and the signal, (B,H,P) or (B,P) fp32.

    Without v `out` is empty, and without a signal the signal is. The interpreter multiplies in fp32, because it has no
    bf16 arithmetic.
    """
    batch, heads, rows, width = q.shape
    out = q.new_empty((batch, rows, heads, width) if v is not None else (0, 0, 0, 0)).transpose(1, 2)
    q, k, value = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, k if v is None else v))
    launch, shape = _attention_launch(
        q.shape, k.shape[2], q.stride(), k.stride(), value.stride(), q.dtype, size is not None, signal, v is not None,
        prefix,
    )  # fmt: skip
    scores = torch.empty(shape, dtype=torch.float32, device=q.device)
    if batch and heads:
        launch(q, k, value, q if size is None else size.contiguous(), out, scores)
    if signal == "received":
        return out, reduce_scores(scores, rank=False, divisor=heads * rows)
    return out, scores


@makes_launches
def _attention_launch(
    shape: tuple[int, ...], tokens: int, stride_q: tuple[int, ...], stride_k: tuple[int, ...],
    stride_v: tuple[int, ...], dtype: torch.dtype, sized: bool, signal: str | None, valued: bool, prefix: int,
) -> tuple[Launch, tuple[int, ...]]:  # fmt: skip
    """Return the launch, and the shape of its signal."""
    (batch, heads, rows, width), patches = shape, tokens - prefix
    blocks = config(tokens, width, dtype, signal)
    tiles = triton.cdiv(rows, blocks["BLOCK_M"])
    programs = tiles + (signal == "cls")
    unit, (in_q, in_k, in_v) = in_units(stride_q, stride_k, stride_v)
    launch = Launch(
        _attention_kernel, (programs * heads * batch,), heads, rows, tokens, programs, prefix, LOG2E * width**-0.5,
        *in_q, *in_k, *in_v,
        D=width, SIZED=sized, SIGNAL=signal, OUT=valued, WIDE=not isinstance(_attention_kernel, triton.JITFunction),
        UNIT=unit, TILES=triton.cdiv(tokens, blocks["BLOCK_N"]), **blocks,
    )  # fmt: skip
    shapes = {None: (0,), "cls": (batch, heads, patches), "received": (batch, heads * tiles, patches)}
    return launch, shapes[signal]
