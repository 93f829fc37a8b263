"""Rank: only the CLS row of each head's attention, and its mean or the mean of its ranks over heads.

    cls_hj = softmax_j(q_h0 · k_hj / D**0.5 + log size_j);  score_j = mean_h cls_hj, or mean_h #{i : cls_hi beaten by j}

Reads K once (B·N·C) and writes B·H·P scores in one launch. The mean over heads reads those and writes B·P in another.
A mean of ranks sorts every row in a launch between them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipkernels.kernels import ranking
from clipkernels.kernels.launch import Launch, makes_launches
from clipkernels.kernels.ranking import sum_heads

LOG2E = 1.4426950408889634
# The lowest fp32. A maximum begins here, because -inf - -inf is NaN where no key has a size.
LOWEST = tl.constexpr(-1e38)


@triton.jit(do_not_specialize=["N"])
def _cls_kernel(
    q_ptr, k_ptr, size_ptr, out_ptr,
    H, N, prefix, scale,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_kn,
    D: tl.constexpr, SIZED: tl.constexpr, UNIT: tl.constexpr,
    TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the softmax of one query over N keys, without the prefix columns; logits are in units of log2."""
    head, batch = tl.program_id(0) % H, tl.program_id(0).to(tl.int64) // H
    q_ptr += (batch * stride_qb + head.to(tl.int64) * stride_qh) * UNIT
    k_ptr += (batch * stride_kb + head.to(tl.int64) * stride_kh) * UNIT
    stride_kn = tl.cast(stride_kn, tl.int64) * UNIT
    size_ptr += batch * N
    row_ptr = out_ptr + (batch * H + head) * (N - prefix) - prefix
    offs_d = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32) * scale
    most, total = tl.cast(LOWEST, tl.float32), 0.0
    for tile in range(TILES):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        mask = mask_n[:, None] & (offs_d < D)[None, :]
        k = tl.load(k_ptr + offs_n.to(tl.int64)[:, None] * stride_kn + offs_d[None, :], mask=mask, other=0.0)
        logit = tl.sum(k.to(tl.float32) * q[None, :], 1)  # [BLOCK_N]
        visible = mask_n
        if SIZED:
            size = tl.load(size_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            visible = size > 0.0
        logit = tl.where(visible, logit, float("-inf"))
        tl.store(row_ptr + offs_n, logit, mask=(offs_n >= prefix) & mask_n)
        higher = tl.maximum(most, tl.max(logit, 0))
        p = tl.exp2(logit - higher)
        if SIZED:  # exp(s + log size) = size·exp(s)
            p *= size
        total = total * tl.exp2(most - higher) + tl.sum(p, 0)
        most = higher
    if SIZED:  # without a key the sum is 0, and so are all results
        total = tl.where(total == 0.0, 1.0, total)
    share = 1.0 / total
    tl.debug_barrier()  # the logits that a thread reads next were stored by others
    for tile in range(TILES):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (offs_n >= prefix) & (offs_n < N)
        p = tl.exp2(tl.load(row_ptr + offs_n, mask=mask, other=float("-inf")) - most)
        if SIZED:
            p *= tl.load(size_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
        tl.store(row_ptr + offs_n, p * share, mask=mask)


@triton.jit(do_not_specialize=["P"])
def _heads_kernel(
    scores_ptr, out_ptr,
    P, divisor,
    H: tl.constexpr, RANKS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_P)
    reduced = sum_heads(scores_ptr + batch * H * P, offs, P, divisor, H, RANKS, BLOCK_P, BLOCK_H)
    tl.store(out_ptr + batch * P + offs, reduced, mask=offs < P)


def config(width: int) -> dict[str, int]:
    """Return block sizes and warps of the CLS row, for heads of width D."""
    return {"BLOCK_N": 64, "BLOCK_D": max(16, triton.next_power_of_2(width)), "num_warps": 4}


def sum_config(patches: int) -> dict[str, int]:
    """Return block sizes and warps of the sum over heads, for P patches."""
    blocks = ranking.blocks(patches)
    return {**blocks, "num_warps": 8 if blocks["BLOCK_P"] >= 256 else 4}


def in_units(*strides: tuple[int, ...]) -> tuple[int, list[list[int]]]:
    """Return a unit and strides of (B,H,N,D) tensors in that unit, without the last stride.

    The unit is 8 elements if all strides are multiples of 8, else 1.
    """
    # Triton detects strides that are multiples of 16 only, which heads of width 72 do not have. Because the kernel
    # multiplies strides by a constant unit, the compiler knows that each head begins where 16 bytes load at once.
    unit = 8 if all(stride % 8 == 0 for four in strides for stride in four[:3]) else 1
    return unit, [[stride // unit for stride in four[:3]] for four in strides]


def cls_scores(q: Tensor, k: Tensor, size: Tensor | None, prefix: int) -> Tensor:
    """Launch the kernel: the CLS row of every head's attention, (B,H,P) fp32."""
    batch, heads, tokens, _ = k.shape
    out = torch.empty(batch, heads, tokens - prefix, dtype=torch.float32, device=k.device)
    if out.numel():
        q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
        launch = _cls_launch(k.shape, q.stride(), k.stride(), size is not None, prefix)
        launch(q, k, out if size is None else size.contiguous(), out)
    return out


@makes_launches
def _cls_launch(
    shape: tuple[int, ...], stride_q: tuple[int, ...], stride_k: tuple[int, ...], sized: bool, prefix: int
) -> Launch:
    (batch, heads, tokens, width), blocks = shape, config(shape[3])
    unit, (in_q, in_k) = in_units(stride_q, stride_k)
    return Launch(
        _cls_kernel, (heads * batch,), heads, tokens, prefix, LOG2E * width**-0.5, *in_q[:2], *in_k,
        D=width, SIZED=sized, UNIT=unit, TILES=triton.cdiv(tokens, blocks["BLOCK_N"]), **blocks,
    )  # fmt: skip


def reduce_scores(scores: Tensor, rank: bool, divisor: int) -> Tensor:
    """Launch the kernels: rows (B,R,P) fp32, or their ranks, summed over R and divided by `divisor`, (B,P) fp32."""
    batch, _, patches = scores.shape
    out = torch.empty(batch, patches, dtype=torch.float32, device=scores.device)
    if out.numel():
        _heads_launch(scores.shape, rank, divisor)(ranking.rank_scores(scores) if rank else scores, out)
    return out


@makes_launches
def _heads_launch(shape: tuple[int, ...], rank: bool, divisor: int) -> Launch:
    batch, rows, patches = shape
    return Launch(
        _heads_kernel, (batch,), patches, float(divisor), H=rows, RANKS=rank, **sum_config(patches)
    )  # fmt: skip
