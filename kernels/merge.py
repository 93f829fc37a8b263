"""Match and merge: each even token finds its most similar odd token, and the r most similar pairs merge.

    unit = mean over heads of k, normalised;  strength_a, nearest_a = max, argmax over b of unit_a · unit_b
    merged_b = x_b + Σ share_a·(x_a - x_b),  share_a = size_a / (size_b + Σ size_a)

Matching reads the keys once (B·N·C, or B·N·D for a metric) and stores 4·B·N·D bytes of unit vectors between its three
launches. The similarities, N²/4·D multiplications per image, stay in registers. Merging reads N·C and writes (N-r)·C in
one launch. Every row gathers its own sources, so there is no scatter and no atomic.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipkernels.kernels import layer_norm, ranking
from clipkernels.kernels.launch import Launch
from clipkernels.kernels.layer_norm import store_rows
from clipkernels.kernels.ranking import rank_of


@triton.jit(do_not_specialize=["N"])
def _unit_kernel(
    metric_ptr, unit_ptr,
    N,
    stride_mb, stride_mh, stride_mn,
    H: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the mean over heads, rounded to the dtype of the metric and normalised to length one."""
    batch, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_n, offs_d = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64), tl.arange(0, BLOCK_D)
    mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
    metric_ptr += batch * stride_mb + offs_n[:, None] * stride_mn + offs_d[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for head in tl.static_range(H):  # unrolled: all loads in flight
        total += tl.load(metric_ptr + tl.cast(head, tl.int64) * stride_mh, mask=mask, other=0.0).to(tl.float32)
    # Rounded like the reference, or similarities that tie there would not tie here.
    mean = tl.div_rn(total, H * 1.0).to(metric_ptr.dtype.element_ty).to(tl.float32)
    length = tl.maximum(tl.sqrt_rn(tl.sum(mean * mean, 1)), 1e-12)
    unit = tl.div_rn(mean, tl.broadcast_to(length[:, None], [BLOCK_N, BLOCK_D]))
    tl.store(unit_ptr + (batch * N + offs_n)[:, None] * D + offs_d[None, :], unit, mask=mask)


@triton.jit(do_not_specialize=["N", "A", "even", "odd"])
def _nearest_kernel(
    unit_ptr, strength_ptr, nearest_ptr,
    N, A, even, odd,
    D: tl.constexpr, TILES: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store, for each of A even tokens from `even` on, its most similar odd token from `odd` on and the similarity."""
    batch, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    unit_ptr += batch * N * D
    offs_a = tile * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < A
    a_ptr = unit_ptr + (2 * (even + offs_a) * D)[:, None]
    best = tl.full([BLOCK_A], float("-inf"), tl.float32)
    nearest = tl.zeros([BLOCK_A], tl.int32)
    for other in range(TILES):
        offs_b = other * BLOCK_B + tl.arange(0, BLOCK_B)
        mask_b = offs_b < N // 2 - odd
        b_ptr = unit_ptr + ((2 * (odd + offs_b) + 1) * D)[None, :]
        s = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
        for start in range(0, D, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            a = tl.load(a_ptr + offs_d[None, :], mask=mask_a[:, None] & (offs_d < D)[None, :], other=0.0)
            b = tl.load(b_ptr + offs_d[:, None], mask=(offs_d < D)[:, None] & mask_b[None, :], other=0.0)
            s = tl.dot(a, b, s, input_precision="ieee")
        s = tl.where((s == s) & mask_b[None, :], s, float("-inf"))
        most = tl.max(s, 1)
        first = tl.min(tl.where(s == most[:, None], offs_b[None, :], N), 1)  # the lower index of equal ones
        better = most > best
        best = tl.where(better, most, best)
        nearest = tl.where(better, first, nearest)
    tl.store(strength_ptr + batch * A + offs_a, best, mask=mask_a)
    tl.store(nearest_ptr + batch * A + offs_a, nearest, mask=mask_a)


@triton.jit(do_not_specialize=["A", "r", "even", "odd"])
def _strongest_kernel(
    strength_ptr, nearest_ptr, kept_ptr, source_ptr, target_ptr,
    A, r, even, odd,
    BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Store the r strongest pairs of an image and the remaining even tokens, both in ascending order."""
    batch = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_P)
    kept_ptr += batch * (even + A - r)
    source = (rank_of(strength_ptr + batch * A, offs, A, BLOCK_P, BLOCK_J) < r) & (offs < A)
    before = tl.cumsum(source.to(tl.int32), 0)
    nearest = tl.load(nearest_ptr + batch * A + offs, mask=source, other=0)
    tl.store(source_ptr + batch * r + before - 1, (even + offs).to(tl.int64), mask=source)
    tl.store(target_ptr + batch * r + before - 1, (odd + nearest).to(tl.int64), mask=source)
    tl.store(kept_ptr + even + offs - before, (even + offs).to(tl.int64), mask=(offs < A) & (source == 0))
    tl.store(kept_ptr + offs, offs.to(tl.int64), mask=offs < even)


@triton.jit(do_not_specialize=["N", "r"])
def _merge_kernel(
    x_ptr, kept_ptr, source_ptr, target_ptr, size_ptr, tokens_ptr, merged_ptr, normed_ptr, weight_ptr, bias_ptr,
    N, r, eps,
    stride_xb, stride_xn,
    C: tl.constexpr, SIZED: tl.constexpr, NORM: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    batch, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kept, rows = (N + 1) // 2 - r, N - r
    x_ptr += batch * stride_xb
    size_ptr += batch * N
    source_ptr += batch * r
    target_ptr += batch * r
    row, offs_c, offs_s = tile * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    here, target = row < rows, row - kept  # target [BLOCK_R], negative in rows of kept tokens
    even = tl.load(kept_ptr + batch * kept + row, mask=row < kept, other=0)
    own = tl.where(row < kept, 2 * even, 2 * target + 1)
    mask = here[:, None] & (offs_c < C)[None, :]
    stored = tl.load(x_ptr + own[:, None] * stride_xn + offs_c[None, :], mask=mask, other=0.0)
    x = stored.to(tl.float32)
    offs_t = tl.load(target_ptr + offs_s, mask=offs_s < r, other=-1)
    offs_a = 2 * tl.load(source_ptr + offs_s, mask=offs_s < r, other=0)
    joins = (offs_t[None, :] == target[:, None]) & (offs_s < r)[None, :] & here[:, None]  # [BLOCK_R, BLOCK_S]
    if SIZED:
        size = tl.load(size_ptr + own, mask=here, other=1.0).to(tl.float32)
        gain = tl.load(size_ptr + offs_a, mask=offs_s < r, other=0.0).to(tl.float32)
    else:
        size = tl.full([BLOCK_R], 1.0, tl.float32)
        gain = tl.full([BLOCK_S], 1.0, tl.float32)
    total = size + tl.sum(tl.where(joins, gain[None, :], 0.0), 1)
    tl.store(merged_ptr + batch * rows + row, total, mask=here)
    mine = tl.sum(joins.to(tl.int32), 0) > 0
    acc = x
    pair = tl.min(tl.where(mine, offs_s, BLOCK_S), 0)
    while pair < BLOCK_S:  # over the pairs whose targets are in this tile, in order
        chosen = offs_s == pair
        a = tl.sum(tl.where(chosen, offs_a, 0), 0)
        share = tl.sum(tl.where(joins & chosen[None, :], gain[None, :], 0.0), 1) / total  # [BLOCK_R]
        other = tl.load(x_ptr + a * stride_xn + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
        pull = share[:, None] * (other[None, :] - x)
        acc += tl.where(share[:, None] > 0, pull, 0.0)
        pair = tl.min(tl.where(mine & (offs_s > pair), offs_s, BLOCK_S), 0)
    tokens_ptr += batch * rows * C
    normed_ptr += batch * rows * C
    store_rows(acc, row, rows, tokens_ptr, normed_ptr, weight_ptr, bias_ptr, eps, C, NORM, BLOCK_C)


def match_config(width: int) -> dict[str, dict[str, int]]:
    """Return block sizes and warps of the first two launches, for a metric of width D."""
    block_d = max(16, triton.next_power_of_2(width))
    # Normalising needs whole rows; the products read them in pieces.
    unit = {"BLOCK_N": max(1, (1024 if block_d <= 64 else 512) // block_d), "BLOCK_D": block_d, "num_warps": 4}
    return {"unit": unit, "nearest": {"BLOCK_A": 32, "BLOCK_B": 32, "BLOCK_D": min(64, block_d), "num_warps": 4}}


def merge_config(r: int, width: int) -> dict[str, int]:
    """Return block sizes and warps of the merge, for r pairs of tokens of width C."""
    return {"BLOCK_S": max(16, triton.next_power_of_2(r)), **layer_norm.blocks(8, width, 4096), "num_warps": 4}


def match_tokens(metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels: kept (B,A-r), source (B,r), target (B,r) int64, for a metric (B,N,D) or (B,H,N,D)."""
    per_head = metric if metric.ndim == 4 else metric[:, None]
    batch, _, tokens, width = per_head.shape
    even = (prefix + 1) // 2
    a = (tokens + 1) // 2 - even
    kept, source, target = (
        torch.empty(batch, n, dtype=torch.int64, device=metric.device) for n in (even + a - r, r, r)
    )
    if r == 0:
        kept.copy_(torch.arange(kept.shape[1], device=metric.device).expand_as(kept))
    if r == 0 or batch == 0:
        return kept, source, target
    per_head = per_head if per_head.stride(3) == 1 else per_head.contiguous()
    unit = torch.empty(batch, tokens, width, dtype=torch.float32, device=metric.device)
    strength = torch.empty(batch, a, dtype=torch.float32, device=metric.device)
    nearest = torch.empty(batch, a, dtype=torch.int32, device=metric.device)
    launches = _match_launches(per_head.shape, per_head.stride(), r, prefix)
    launches[0](per_head, unit)
    launches[1](unit, strength, nearest)
    launches[2](strength, nearest, kept, source, target)
    return kept, source, target


@lru_cache(maxsize=1024)
def _match_launches(
    shape: tuple[int, ...], stride: tuple[int, ...], r: int, prefix: int
) -> tuple[Launch, Launch, Launch]:
    batch, heads, tokens, width = shape
    # The prefix takes no part, neither as a source (even positions) nor as a target (odd ones).
    even, odd = (prefix + 1) // 2, prefix // 2
    a, b = (tokens + 1) // 2 - even, tokens // 2 - odd
    blocks = match_config(width)
    tiles = {name: triton.cdiv(n, blocks["nearest"][f"BLOCK_{name}"]) for name, n in (("A", a), ("B", b))}
    unit_grid = (batch, triton.cdiv(tokens, blocks["unit"]["BLOCK_N"]))
    return (
        Launch(_unit_kernel, unit_grid, tokens, *stride[:3], H=heads, D=width, **blocks["unit"]),
        Launch(
            _nearest_kernel, (batch, tiles["A"]), tokens, a, even, odd, D=width, TILES=tiles["B"], **blocks["nearest"]
        ),
        Launch(_strongest_kernel, (batch,), a, r, even, odd, **ranking.blocks(a)),
    )


def merge_tokens(
    x: Tensor,
    kept: Tensor,
    source: Tensor,
    target: Tensor,
    size: Tensor | None,
    norm: tuple[Tensor, Tensor, float] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the kernel: tokens (B,N-r,C), size (B,N-r) fp32, normed like tokens or None."""
    batch, tokens, width = x.shape
    r = source.shape[1]
    out = x.new_empty(batch, tokens - r, width)
    merged = torch.empty(batch, tokens - r, dtype=torch.float32, device=x.device)
    normed = torch.empty_like(out) if norm is not None else None
    if out.numel() == 0:
        return out, merged, normed
    x = x if x.stride(2) == 1 else x.contiguous()
    weight, bias, eps = layer_norm.arguments(norm, x)
    launch = _merge_launch(x.shape, x.stride(), r, size is not None, norm is not None, eps)
    launch(
        x, kept.contiguous(), source.contiguous(), target.contiguous(),
        merged if size is None else size.contiguous(), out, merged, out if normed is None else normed, weight, bias,
    )  # fmt: skip
    return out, merged, normed


@lru_cache(maxsize=1024)
def _merge_launch(
    shape: tuple[int, ...], stride: tuple[int, ...], r: int, sized: bool, normed: bool, eps: float
) -> Launch:
    (batch, tokens, width), blocks = shape, merge_config(r, shape[2])
    return Launch(
        _merge_kernel, (batch, triton.cdiv(tokens - r, blocks["BLOCK_R"])), tokens, r, eps, *stride[:2],
        C=width, SIZED=sized, NORM=normed, **blocks,
    )  # fmt: skip
