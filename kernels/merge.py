"""Match and merge: each even token finds its most similar odd token, and the r most similar pairs merge.

    unit = mean over heads of k, normalised;  strength_a, nearest_a = max, argmax over b of unit_a · unit_b
    merged_b = x_b + Σ share_a·(x_a - x_b),  share_a = size_a / (size_b + Σ size_a)

Matching takes two launches. In the first, parts² programs compare each part of an image's even tokens with each part of
its odd ones. A program normalises the tokens of its two parts itself, into scratch that it alone reads, so the keys
(B·N·C, or B·N·D for a metric) are read `parts` times, which is once where the batch fills the device. The
similarities, N²/4·D multiplications per image, stay in registers. The second launch takes the best of the parts and
chooses the pairs.

Merging reads N·C and writes (N-r)·C in one launch. Every row gathers its own sources, several at a time, so there is no
scatter and no atomic.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipkernels.kernels import layer_norm, ranking
from clipkernels.kernels.launch import Launch, makes_launches
from clipkernels.kernels.layer_norm import store_rows
from clipkernels.kernels.ranking import choose_strongest, keys_of

# Programs of a launch beyond which an image is not divided, because they fill the device.
PROGRAMS = 256


@triton.jit
def _store_units(
    metric_ptr, unit_ptr, first, count, stride_mh, stride_mn,
    H: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Store `count` tokens, every other one from `first` on: their mean over heads, normalised to length one.

    The mean is rounded to the dtype of the metric like the reference's, or similarities that tie there would not here.
    """
    offs_d = tl.arange(0, BLOCK_W)
    for start in range(0, count, BLOCK_N):
        offs_n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = (offs_n < count)[:, None] & (offs_d < D)[None, :]
        rows_ptr = metric_ptr + (first + 2 * offs_n)[:, None] * stride_mn + offs_d[None, :]
        total = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
        for head in tl.static_range(H):  # unrolled: all loads in flight
            total += tl.load(rows_ptr + tl.cast(head, tl.int64) * stride_mh, mask=mask, other=0.0).to(tl.float32)
        mean = tl.div_rn(total, H * 1.0).to(metric_ptr.dtype.element_ty).to(tl.float32)
        length = tl.maximum(tl.sqrt_rn(tl.sum(mean * mean, 1)), 1e-12)
        unit = tl.div_rn(mean, tl.broadcast_to(length[:, None], [BLOCK_N, BLOCK_W]))
        tl.store(unit_ptr + offs_n[:, None] * D + offs_d[None, :], unit, mask=mask)


@triton.jit(do_not_specialize=["A", "B", "even", "odd", "parts", "rows_a", "rows_b"])
def _nearest_kernel(
    metric_ptr, unit_ptr, strength_ptr, nearest_ptr,
    A, B, even, odd, parts, rows_a, rows_b,
    stride_mb, stride_mh, stride_mn,
    H: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store, for `rows_a` of the A even tokens, the most similar of `rows_b` of the B odd tokens and the similarity."""
    batch, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first_a, first_b = part // parts * rows_a, part % parts * rows_b
    count_a, count_b = tl.minimum(rows_a, A - first_a), tl.minimum(rows_b, B - first_b)
    metric_ptr += batch * stride_mb
    unit_a_ptr = unit_ptr + (batch * parts * parts + part) * (rows_a + rows_b) * D
    unit_b_ptr = unit_a_ptr + rows_a * D
    _store_units(
        metric_ptr, unit_a_ptr, 2 * (even + first_a), count_a, stride_mh, stride_mn, H, D, BLOCK_N, BLOCK_W
    )  # fmt: skip
    _store_units(
        metric_ptr, unit_b_ptr, 2 * (odd + first_b) + 1, count_b, stride_mh, stride_mn, H, D, BLOCK_N, BLOCK_W
    )  # fmt: skip
    tl.debug_barrier()  # the units that a thread reads next were stored by others
    result = (batch * parts + part % parts) * A + first_a
    for start_a in range(0, count_a, BLOCK_A):
        offs_a = start_a + tl.arange(0, BLOCK_A)
        best = tl.full([BLOCK_A], float("-inf"), tl.float32)
        nearest = tl.zeros([BLOCK_A], tl.int32)
        for start_b in range(0, count_b, BLOCK_B):
            offs_b = start_b + tl.arange(0, BLOCK_B)
            s = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
            for start in range(0, D, BLOCK_D):
                offs_d = start + tl.arange(0, BLOCK_D)
                mask_a, mask_b = (offs_a < count_a)[:, None], (offs_b < count_b)[None, :]
                a_ptr = unit_a_ptr + (offs_a * D)[:, None] + offs_d[None, :]
                b_ptr = unit_b_ptr + (offs_b * D)[None, :] + offs_d[:, None]
                a = tl.load(a_ptr, mask=mask_a & (offs_d < D)[None, :], other=0.0)
                b = tl.load(b_ptr, mask=mask_b & (offs_d < D)[:, None], other=0.0)
                s = tl.dot(a, b, s, input_precision="ieee")
            s = tl.where((s == s) & (offs_b < count_b)[None, :], s, float("-inf"))
            most = tl.max(s, 1)
            first = tl.min(tl.where(s == most[:, None], offs_b[None, :], count_b), 1)  # the lower index of equal ones
            better = most > best
            best = tl.where(better, most, best)
            nearest = tl.where(better, first_b + first, nearest)
        tl.store(strength_ptr + result + offs_a, best, mask=offs_a < count_a)
        tl.store(nearest_ptr + result + offs_a, nearest, mask=offs_a < count_a)


@triton.jit(do_not_specialize=["A", "r", "even", "odd", "parts"])
def _strongest_kernel(
    strength_ptr, nearest_ptr, kept_ptr, source_ptr, target_ptr,
    A, r, even, odd, parts,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Store the r strongest pairs of an image and the remaining even tokens, both in ascending order."""
    batch = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_P)
    strength = tl.full([BLOCK_P], float("-inf"), tl.float32)
    nearest = tl.zeros([BLOCK_P], tl.int32)
    for part in range(parts):
        part_offs = (batch * parts + part) * A + offs
        most = tl.load(strength_ptr + part_offs, mask=offs < A, other=float("-inf"))
        better = most > strength  # the earlier of equal parts holds the lower index
        strength = tl.where(better, most, strength)
        nearest = tl.where(better, tl.load(nearest_ptr + part_offs, mask=offs < A, other=0), nearest)
    chosen, before = choose_strongest(keys_of(strength, offs, A), r)
    kept_ptr += batch * (even + A - r)
    tl.store(source_ptr + batch * r + before, (even + offs).to(tl.int64), mask=chosen)
    tl.store(target_ptr + batch * r + before, (odd + nearest).to(tl.int64), mask=chosen)
    tl.store(kept_ptr + even + offs - before, (even + offs).to(tl.int64), mask=(offs < A) & (chosen == 0))
    tl.store(kept_ptr + offs, offs.to(tl.int64), mask=offs < even)


@triton.jit(do_not_specialize=["N", "r"])
def _merge_kernel(
    x_ptr, kept_ptr, source_ptr, target_ptr, size_ptr, tokens_ptr, merged_ptr, normed_ptr, weight_ptr, bias_ptr,
    N, r, eps,
    stride_xb, stride_xn,
    C: tl.constexpr, SIZED: tl.constexpr, NORM: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store a tile of rows: the kept tokens, then the targets, each merged with its sources."""
    batch, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kept, rows = (N + 1) // 2 - r, N - r
    x_ptr += batch * stride_xb
    size_ptr += batch * N
    source_ptr += batch * r
    target_ptr += batch * r
    tokens_ptr += batch * rows * C
    normed_ptr += batch * rows * C
    row, offs_c, offs_s = tile * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    even = tl.load(kept_ptr + batch * kept + row, mask=row < kept, other=0)
    token = tl.where(row < kept, 2 * even, 2 * (row - kept) + 1)
    x = tl.load(
        x_ptr + token[:, None] * stride_xn + offs_c[None, :],
        mask=(row < rows)[:, None] & (offs_c < C)[None, :], other=0.0,
    )  # fmt: skip
    target_row = kept + tl.load(target_ptr + offs_s, mask=offs_s < r, other=0).to(tl.int32)
    source = 2 * tl.load(source_ptr + offs_s, mask=offs_s < r, other=0).to(tl.int32)
    joins = (target_row[None, :] == row[:, None]) & (offs_s < r)[None, :] & (row < rows)[:, None]  # [BLOCK_R, BLOCK_S]
    if SIZED:
        size = tl.load(size_ptr + token, mask=row < rows, other=1.0).to(tl.float32)
        gain = tl.load(size_ptr + source, mask=offs_s < r, other=0.0).to(tl.float32)
    else:
        size = tl.full([BLOCK_R], 1.0, tl.float32)
        gain = tl.full([BLOCK_S], 1.0, tl.float32)
    total = size + tl.sum(tl.where(joins, gain[None, :], 0.0), 1)
    tl.store(merged_ptr + batch * rows + row, total, mask=row < rows)
    count = tl.sum(joins.to(tl.int32), 1)
    copied = tl.where(count == 0, row, rows)  # the rows with sources follow one by one, as most tiles have none
    store_rows(x, copied, rows, tokens_ptr, normed_ptr, weight_ptr, bias_ptr, eps, C, NORM, BLOCK_C)
    merging = tl.min(tl.where(count > 0, row, rows), 0)
    while merging < rows:
        is_source = (target_row == merging) & (offs_s < r)
        place = tl.cumsum(is_source.to(tl.int32), 0) - 1
        sources = tl.sum(tl.where(row == merging, count, 0), 0)
        mass = tl.sum(tl.where(row == merging, total, 0.0), 0)
        target = 2 * (merging - kept).to(tl.int64) + 1
        target_x = tl.load(x_ptr + target * stride_xn + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
        if SIZED:  # a target of size 0 may hold anything, NaN included
            is_absent = tl.sum(tl.where(row == merging, size, 0.0), 0) == 0.0
            target_x = tl.where(is_absent & (mass > 0.0), 0.0, target_x)
        acc = target_x
        for start in range(0, sources, BLOCK_G):
            offs_g = start + tl.arange(0, BLOCK_G)
            pair = is_source[None, :] & (place[None, :] == offs_g[:, None])  # [BLOCK_G, BLOCK_S]
            token_g = tl.sum(tl.where(pair, source[None, :], 0), 1)
            share = tl.sum(tl.where(pair, gain[None, :], 0.0), 1) / mass
            mask = (offs_g < sources)[:, None] & (offs_c < C)[None, :]
            other = tl.load(
                x_ptr + token_g.to(tl.int64)[:, None] * stride_xn + offs_c[None, :], mask=mask, other=0.0
            ).to(tl.float32)
            pull = share[:, None] * (other - target_x[None, :])
            acc += tl.sum(tl.where((share > 0)[:, None], pull, 0.0), 0)
        offs_1 = merging + tl.arange(0, 1)
        store_rows(acc[None, :], offs_1, rows, tokens_ptr, normed_ptr, weight_ptr, bias_ptr, eps, C, NORM, BLOCK_C)
        merging = tl.min(tl.where((count > 0) & (row > merging), row, rows), 0)


def match_config(heads: int, width: int) -> dict[str, int]:
    """Return block sizes and warps of the first launch, for H heads of width D."""
    block_w = max(16, triton.next_power_of_2(width))
    # Normalising needs whole rows, with those of all heads in flight; the products read them in pieces.
    block_n = max(1, min(32, 4096 // block_w, 16384 // (block_w * triton.next_power_of_2(heads))))
    products = {"BLOCK_A": 32, "BLOCK_B": 32, "BLOCK_D": min(64, block_w)}
    return {"BLOCK_N": block_n, "BLOCK_W": block_w, **products, "num_warps": 4}


def merge_config(r: int, width: int) -> dict[str, int]:
    """Return block sizes and warps of the merge, for r pairs of tokens of width C."""
    tile, block_s = layer_norm.blocks(8, width, 4096), max(16, triton.next_power_of_2(r))
    warps = 8 if max(tile["BLOCK_C"], block_s) > 2048 else 4
    # Sources in flight, fewer where rows are wide or pairs many, because triton 3.6 and 3.9 would spill.
    block_g = max(1, min(8 if block_s <= 64 else 4, 8192 // tile["BLOCK_C"], max(2, 4096 // block_s)))
    return {"BLOCK_S": block_s, "BLOCK_G": block_g, **tile, "num_warps": warps}


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
    parts, rows, nearest_launch, strongest_launch = _match_launches(per_head.shape, per_head.stride(), r, prefix)
    unit = torch.empty(batch, parts * parts, rows, width, dtype=torch.float32, device=metric.device)
    strength = torch.empty(batch, parts, a, dtype=torch.float32, device=metric.device)
    nearest = torch.empty(batch, parts, a, dtype=torch.int32, device=metric.device)
    nearest_launch(per_head, unit, strength, nearest)
    strongest_launch(strength, nearest, kept, source, target)
    return kept, source, target


@makes_launches
def _match_launches(
    shape: tuple[int, ...], stride: tuple[int, ...], r: int, prefix: int
) -> tuple[int, int, Launch, Launch]:
    """Return the parts of an image along A and along B, the rows that a program normalises, and the two launches."""
    batch, heads, tokens, width = shape
    # The prefix takes no part, neither as a source (even positions) nor as a target (odd ones).
    even, odd = (prefix + 1) // 2, prefix // 2
    a, b = (tokens + 1) // 2 - even, tokens // 2 - odd
    blocks, selection = match_config(heads, width), ranking.blocks(a)
    tiles_a, tiles_b = triton.cdiv(a, blocks["BLOCK_A"]), triton.cdiv(b, blocks["BLOCK_B"])
    parts = max(1, min(tiles_a, tiles_b, math.isqrt(PROGRAMS // batch)))
    rows_a, rows_b = triton.cdiv(tiles_a, parts) * blocks["BLOCK_A"], triton.cdiv(tiles_b, parts) * blocks["BLOCK_B"]
    nearest = Launch(
        _nearest_kernel, (batch, parts * parts), a, b, even, odd, parts, rows_a, rows_b, *stride[:3],
        H=heads, D=width, **blocks,
    )  # fmt: skip
    strongest = Launch(
        _strongest_kernel, (batch,), a, r, even, odd, parts,
        BLOCK_P=selection["BLOCK_P"], num_warps=selection["num_warps"],
    )  # fmt: skip
    return parts, rows_a + rows_b, nearest, strongest


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


@makes_launches
def _merge_launch(
    shape: tuple[int, ...], stride: tuple[int, ...], r: int, sized: bool, normed: bool, eps: float
) -> Launch:
    (batch, tokens, width), blocks = shape, merge_config(r, shape[2])
    return Launch(
        _merge_kernel, (batch, triton.cdiv(tokens - r, blocks["BLOCK_R"])), tokens, r, eps, *stride[:2],
        C=width, SIZED=sized, NORM=normed, **blocks,
    )  # fmt: skip
