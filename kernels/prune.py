"""Prune: rank, top-k, compaction, the fused token and the LayerNorm that follows, by counting instead of sorting.

    place_i = #{j : s_j > s_i or (s_j = s_i and j < i)};  kept_i = place_i < keep;  row_i = prefix + #{kept j < i}

Reads M·C of x once (M = N with a fused token, prefix + keep without) and P scores per program; writes M'·C and
`keep` indices. One launch, two when the scores come per head. Every program finds its rows by itself, so there is no
sort, no atomic and no index read back; a row's result depends on its image alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _score(ptr, offs, size):
    """Scores as fp32, NaN and what lies beyond `size` as -inf."""
    s = tl.load(ptr + offs, mask=offs < size, other=float("-inf")).to(tl.float32)
    return tl.where(s == s, s, float("-inf"))


@triton.jit
def _place(ptr, offs, size, BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr):
    """How many scores beat each of those at `offs`; of two equal ones the lower index wins."""
    own = _score(ptr, offs, size)
    place = tl.zeros_like(offs)
    for start in range(0, BLOCK_P, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        other = _score(ptr, offs_j, size)
        earlier = offs_j[None, :] < offs[:, None]  # [BLOCK_P, BLOCK_J]
        beats = (other[None, :] > own[:, None]) | ((other[None, :] == own[:, None]) & earlier)
        place += tl.sum((beats & (offs_j < size)[None, :]).to(tl.int32), 1)
    return place


@triton.jit
def _heads_kernel(
    scores_ptr, out_ptr,
    P,
    H: tl.constexpr, RANK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Scores (B,P) of per-head scores (B,H,P): their mean, or the mean of each head's ranks."""
    batch = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_P)
    total = tl.zeros([BLOCK_P], dtype=tl.int32 if RANK else tl.float32)
    for head in range(H):
        row_ptr = scores_ptr + (batch * H + head) * P
        if RANK:
            total += P - 1 - _place(row_ptr, offs, P, BLOCK_P, BLOCK_J)
        else:
            total += tl.load(row_ptr + offs, mask=offs < P, other=0.0).to(tl.float32)
    tl.store(out_ptr + batch * P + offs, total.to(tl.float32) / H, mask=offs < P)


@triton.jit
def _finish(
    x, row, rows, offs_c, tokens_ptr, normed_ptr, weight_ptr, bias_ptr, eps,
    C: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Store rows x [BLOCK_R, BLOCK_C] and, where asked, their LayerNorm from the values as stored."""
    mask = (row < rows)[:, None] & (offs_c < C)[None, :]
    offs = row[:, None] * C + offs_c[None, :]
    x = x.to(tokens_ptr.dtype.element_ty)
    tl.store(tokens_ptr + offs, x, mask=mask)
    if NORM:
        wide = x.to(tl.float32)
        mean = tl.sum(wide, 1) / C
        centred = tl.where(mask, wide - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
        weight = tl.load(weight_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
        normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
        tl.store(normed_ptr + offs, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _prune_kernel(
    x_ptr, scores_ptr, tokens_ptr, index_ptr, normed_ptr, weight_ptr, bias_ptr,
    P, keep, prefix, eps,
    stride_xb, stride_xn,
    C: tl.constexpr, FUSE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    batch, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x_ptr += batch * stride_xb
    scores_ptr += batch * P
    rows = prefix + keep + FUSE
    tokens_ptr += batch * rows * C
    normed_ptr += batch * rows * C
    offs_p, offs_c = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    place = _place(scores_ptr, offs_p, P, BLOCK_P, BLOCK_J)
    kept = (place < keep) & (offs_p < P)
    to = tl.cumsum(kept.to(tl.int32), 0) - 1
    if tile == 0:
        tl.store(index_ptr + batch * keep + to, offs_p.to(tl.int64), mask=kept)
    if tile < tl.cdiv(prefix + keep, BLOCK_R):
        row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        mine = kept[None, :] & (to[None, :] == row[:, None] - prefix)  # [BLOCK_R, BLOCK_P]
        source = tl.where(row < prefix, row, prefix + tl.sum(tl.where(mine, offs_p[None, :], 0), 1)).to(tl.int64)
        mask = (row < prefix + keep)[:, None] & (offs_c < C)[None, :]
        x = tl.load(x_ptr + source[:, None] * stride_xn + offs_c[None, :], mask=mask, other=0.0)
        _finish(x, row, prefix + keep, offs_c, tokens_ptr, normed_ptr, weight_ptr, bias_ptr, eps, C, NORM)
    elif FUSE:
        score = _score(scores_ptr, offs_p, P)
        gone = (place >= keep) & (offs_p < P)
        weight = tl.where(gone & (score > float("-inf")), score, 0.0)
        acc = tl.zeros([BLOCK_C], dtype=tl.float32)
        for start in range(0, BLOCK_P, BLOCK_R):
            chunk = start + tl.arange(0, BLOCK_R)
            here = chunk[:, None] == offs_p[None, :]  # [BLOCK_R, BLOCK_P]
            w = tl.sum(tl.where(here, weight[None, :], 0.0), 1)
            load = tl.sum((here & gone[None, :]).to(tl.int32), 1) > 0
            offs = (prefix + chunk).to(tl.int64)[:, None] * stride_xn + offs_c[None, :]
            piece = tl.load(x_ptr + offs, mask=load[:, None] & (offs_c < C)[None, :], other=0.0).to(tl.float32)
            acc += tl.sum(w[:, None] * piece, 0)
        fused = prefix + keep + tl.arange(0, 1)
        _finish(acc[None, :], fused, rows, offs_c, tokens_ptr, normed_ptr, weight_ptr, bias_ptr, eps, C, NORM)


def config(patches: int, width: int) -> dict[str, int]:
    """Block sizes and warps for P patches of width C."""
    block_p, block_c = max(16, triton.next_power_of_2(patches)), triton.next_power_of_2(width)
    # Elements of a tile of rows: as many as sm_90 holds without spilling.
    tile = 8192 if block_p < 1024 else 2048
    block_r = max(1, min(64, tile // block_c, 32768 // block_p))
    return {
        "BLOCK_P": block_p,
        "BLOCK_J": 16 if block_p < 256 else 8,
        "BLOCK_R": block_r,
        "BLOCK_C": block_c,
        "num_warps": 4 if block_p < 256 else 8,
    }


def prune_tokens(
    x: Tensor, scores: Tensor, keep: int, fuse: bool, heads: str, prefix: int, norm: tuple[Tensor, Tensor, float] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launches the kernel: tokens (B,prefix+keep[+1],C), index (B,keep) int64, normed like tokens or None."""
    batch, tokens, width = x.shape
    patches, rows = tokens - prefix, prefix + keep + fuse
    out = x.new_empty(batch, rows, width)
    index = torch.empty(batch, keep, dtype=torch.int64, device=x.device)
    normed = torch.empty_like(out) if norm is not None else None
    if batch == 0 or rows == 0:
        return out, index, normed
    x = x if x.stride(2) == 1 else x.contiguous()
    blocks = config(patches, width)
    with torch.cuda.device_of(x):
        if scores.ndim == 3:
            per_head = scores.contiguous()
            scores = torch.empty(batch, patches, dtype=torch.float32, device=x.device)
            _heads_kernel[(batch,)](
                per_head, scores, patches,
                H=per_head.shape[1], RANK=heads == "rank", BLOCK_P=blocks["BLOCK_P"], BLOCK_J=blocks["BLOCK_J"],
                num_warps=blocks["num_warps"], enable_fp_fusion=True,
            )  # fmt: skip
        weight, bias, eps = (norm[0].contiguous(), norm[1].contiguous(), norm[2]) if norm is not None else (x, x, 0.0)
        tiles = triton.cdiv(prefix + keep, blocks["BLOCK_R"])
        _prune_kernel[(batch, tiles + fuse)](
            x, scores.contiguous(), out, index, out if normed is None else normed, weight, bias,
            patches, keep, prefix, eps,
            x.stride(0), x.stride(1),
            C=width, FUSE=fuse, NORM=norm is not None, enable_fp_fusion=True, **blocks,
        )  # fmt: skip
    return out, index, normed
