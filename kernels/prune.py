"""Prune: top-k, compaction, a fused token and a LayerNorm, by counting instead of sorting.

    kept_i = place_i < keep;  row_i = prefix + #{kept j < i};  fused = Σ score_i·x_i over the patches not kept

Reads M·C of x once (M = N with a fused token, prefix + keep without) and writes M'·C. Two launches: the first reads the
scores and selects, with one program per image, the second gathers. No sort, no atomics. A row's result depends on its
image alone.
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
from clipkernels.kernels.ranking import load_scores, rank_of, reduce_heads


@triton.jit(do_not_specialize=["P", "keep"])
def _choose_kernel(
    scores_ptr, reduced_ptr, index_ptr, gone_ptr, weight_ptr,
    P, keep,
    H: tl.constexpr, RANK: tl.constexpr, FUSE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Store the kept patches of an image and, with FUSE, the dropped ones and their weights, in ascending order."""
    batch = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_P)
    if H:
        reduced = reduce_heads(scores_ptr + batch * H * P, offs, P, H * 1.0, H, RANK, BLOCK_P, BLOCK_J)
        row_ptr = reduced_ptr + batch * P
        tl.store(row_ptr + offs, reduced, mask=offs < P)
        tl.debug_barrier()  # barrier: the scores read next were stored by other threads
    else:
        row_ptr = scores_ptr + batch * P
    kept = (rank_of(row_ptr, offs, P, BLOCK_P, BLOCK_J) < keep) & (offs < P)
    before = tl.cumsum(kept.to(tl.int32), 0)
    tl.store(index_ptr + batch * keep + before - 1, offs.to(tl.int64), mask=kept)
    if FUSE:
        score = load_scores(row_ptr, offs, P)
        gone = (offs < P) & (kept == 0)
        to = batch * (P - keep) + offs - before
        tl.store(gone_ptr + to, offs, mask=gone)
        tl.store(weight_ptr + to, tl.where(score > float("-inf"), score, 0.0), mask=gone)


@triton.jit(do_not_specialize=["P", "keep"])
def _gather_kernel(
    x_ptr, index_ptr, gone_ptr, fuse_ptr, tokens_ptr, normed_ptr, weight_ptr, bias_ptr,
    P, keep, prefix, eps,
    stride_xb, stride_xn,
    C: tl.constexpr, FUSE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    batch, tile = tl.program_id(0).to(tl.int64), tl.program_id(1) - FUSE
    x_ptr += batch * stride_xb
    rows = prefix + keep + FUSE
    tokens_ptr += batch * rows * C
    normed_ptr += batch * rows * C
    offs_c = tl.arange(0, BLOCK_C)
    if tile >= 0:
        row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        kept = (row >= prefix) & (row < prefix + keep)
        patch = tl.load(index_ptr + batch * keep + row - prefix, mask=kept, other=0)
        source = tl.where(row < prefix, row.to(tl.int64), prefix + patch)
        mask = (row < prefix + keep)[:, None] & (offs_c < C)[None, :]
        x = tl.load(x_ptr + source[:, None] * stride_xn + offs_c[None, :], mask=mask, other=0.0)
        store_rows(x, row, prefix + keep, tokens_ptr, normed_ptr, weight_ptr, bias_ptr, eps, C, NORM, BLOCK_C)
    elif FUSE:  # the first program of an image, because it takes longest
        acc = tl.zeros([BLOCK_C], dtype=tl.float32)
        for start in range(0, BLOCK_P, BLOCK_R):
            if start < P - keep:
                offs = start + tl.arange(0, BLOCK_R)
                here = offs < P - keep
                patch = tl.load(gone_ptr + batch * (P - keep) + offs, mask=here, other=0).to(tl.int64)
                weight = tl.load(fuse_ptr + batch * (P - keep) + offs, mask=here, other=0.0)
                piece_ptr = x_ptr + (prefix + patch)[:, None] * stride_xn + offs_c[None, :]
                piece = tl.load(piece_ptr, mask=here[:, None] & (offs_c < C)[None, :], other=0.0).to(tl.float32)
                acc += tl.sum(weight[:, None] * piece, 0)
        fused = prefix + keep + tl.arange(0, 1)
        store_rows(acc[None, :], fused, rows, tokens_ptr, normed_ptr, weight_ptr, bias_ptr, eps, C, NORM, BLOCK_C)


def config(patches: int, width: int) -> dict[str, int]:
    """Return block sizes and warps of the gather, for P patches of width C."""
    tile = layer_norm.blocks(16, width, 8192)
    return {"BLOCK_P": ranking.blocks(patches)["BLOCK_P"], **tile, "num_warps": 4}


def prune_tokens(
    x: Tensor, scores: Tensor, keep: int, fuse: bool, heads: str, prefix: int, norm: tuple[Tensor, Tensor, float] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the kernels: tokens (B,prefix+keep[+1],C), index (B,keep) int64, normed like tokens or None."""
    batch, tokens, width = x.shape
    patches, rows = tokens - prefix, prefix + keep + fuse
    out = x.new_empty(batch, rows, width)
    index = torch.empty(batch, keep, dtype=torch.int64, device=x.device)
    normed = torch.empty_like(out) if norm is not None else None
    if batch == 0 or rows == 0:
        return out, index, normed
    x = x if x.stride(2) == 1 else x.contiguous()
    scores = scores.contiguous()
    per_head = scores.ndim == 3
    reduced = torch.empty(batch, patches, dtype=torch.float32, device=x.device) if per_head else scores
    gone = torch.empty(batch, patches - keep, dtype=torch.int32, device=x.device) if fuse else index
    weights = torch.empty(batch, patches - keep, dtype=torch.float32, device=x.device) if fuse else scores
    weight, bias, eps = layer_norm.arguments(norm, x)
    choose, gather = _prune_launches(
        x.shape, x.stride(), scores.shape[1] if per_head else 0, heads == "rank", keep, fuse, prefix, norm is not None,
        eps,
    )  # fmt: skip
    if patches:
        choose(scores, reduced, index, gone, weights)
    gather(x, index, gone, weights, out, out if normed is None else normed, weight, bias)
    return out, index, normed


@lru_cache(maxsize=1024)
def _prune_launches(
    shape: tuple[int, ...], stride: tuple[int, ...], heads: int, rank: bool, keep: int, fuse: bool, prefix: int,
    normed: bool, eps: float,
) -> tuple[Launch, Launch]:  # fmt: skip
    batch, tokens, width = shape
    patches = tokens - prefix
    choose = Launch(
        _choose_kernel, (batch,), patches, keep, H=heads, RANK=rank, FUSE=int(fuse), **ranking.blocks(patches)
    )  # fmt: skip
    blocks = config(patches, width)
    gather = Launch(
        _gather_kernel, (batch, triton.cdiv(prefix + keep, blocks["BLOCK_R"]) + fuse),
        patches, keep, prefix, eps, *stride[:2], C=width, FUSE=int(fuse), NORM=normed, **blocks,
    )  # fmt: skip
    return choose, gather
