"""Prune: top-k, compaction, a fused token and a LayerNorm, by a threshold instead of a sort.

    chosen_i = score_i among the keep best;  row_i = prefix + #{chosen j < i};  fused = Σ score_i·x_i over the others

Reads M·C of x once (M = N with a fused token, prefix + keep without) and writes M'·C. Two launches: the first chooses
and sums the fused token, the second gathers and normalises. Scores that are ranked per head are ranked in a launch
before them. No atomics. A row's result depends on its image alone.

The sum is split by channels over programs of the first launch, each of which chooses again, because choosing takes less
time than waiting for another program. The LayerNorm of the fused token needs its whole row, so it is computed with the
rows of the second launch, from the row as stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipkernels.kernels import layer_norm, ranking
from clipkernels.kernels.launch import Launch, makes_launches
from clipkernels.kernels.layer_norm import store_rows
from clipkernels.kernels.ranking import choose_strongest, keys_of, load_scores, sum_heads

# Programs of a launch beyond which the sums of an image stay in one program, because they fill the device.
PROGRAMS = 256


@triton.jit
def load_reduced(
    ptr, batch, offs, P,
    H: tl.constexpr, RANKS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Load an image's scores, or with H > 0 their mean over H heads; -inf for NaN."""
    if H:
        scores = sum_heads(ptr + batch * H * P, offs, P, H * 1.0, H, RANKS, BLOCK_P, BLOCK_H)
    else:
        scores = load_scores(ptr + batch * P, offs, P)
    return tl.where(scores == scores, scores, float("-inf"))


@triton.jit
def store_fused(
    x_ptr, patch_ptr, weight_ptr, fused_ptr, weights, listed, place, count, split, splits, stride_xn,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store Σ weight·x over `count` listed patches, in every `splits`-th piece of BLOCK_K channels from `split` on.

    A patch stands at its `place` in the list, which this program alone writes and reads. -inf counts as 0. A patch of
    weight 0 adds nothing, even if it is NaN.
    """
    tl.store(patch_ptr + place, tl.arange(0, BLOCK_P), mask=listed)
    tl.store(weight_ptr + place, tl.where(weights > float("-inf"), weights, 0.0), mask=listed)
    tl.debug_barrier()  # the list that a thread reads next was stored by others
    for piece in range(split, (C + BLOCK_K - 1) // BLOCK_K, splits):
        offs_c = piece * BLOCK_K + tl.arange(0, BLOCK_K)
        total = tl.zeros([BLOCK_F, BLOCK_K], dtype=tl.float32)
        for start in range(0, count, BLOCK_F):
            offs = start + tl.arange(0, BLOCK_F)
            patch = tl.load(patch_ptr + offs, mask=offs < count, other=0).to(tl.int64)
            weight = tl.load(weight_ptr + offs, mask=offs < count, other=0.0)
            mask = (offs < count)[:, None] & (offs_c < C)[None, :]
            x = tl.load(x_ptr + patch[:, None] * stride_xn + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
            total += tl.where((weight != 0.0)[:, None], weight[:, None] * x, 0.0)
        fused = tl.sum(total, 0).to(fused_ptr.dtype.element_ty)
        tl.store(fused_ptr + offs_c, fused, mask=offs_c < C)


@triton.jit(do_not_specialize=["P", "keep", "prefix"])
def _choose_kernel(
    x_ptr, scores_ptr, index_ptr, patch_ptr, weight_ptr, tokens_ptr,
    P, keep, prefix,
    stride_xb, stride_xn,
    C: tl.constexpr, H: tl.constexpr, RANKS: tl.constexpr, FUSE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store the kept patches of an image in ascending order and, with FUSE, the sum of the others as its last row."""
    batch, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs = tl.arange(0, BLOCK_P)
    scores = load_reduced(scores_ptr, batch, offs, P, H, RANKS, BLOCK_P, BLOCK_H)
    chosen, before = choose_strongest(keys_of(scores, offs, P), keep)
    if split == 0:
        tl.store(index_ptr + batch * keep + before, offs.to(tl.int64), mask=chosen)
    if FUSE:
        count, splits = P - keep, tl.num_programs(1)
        list_at = (batch * splits + split) * count
        dropped = (offs < P) & (chosen == 0)
        store_fused(
            x_ptr + batch * stride_xb + prefix * stride_xn, patch_ptr + list_at, weight_ptr + list_at,
            tokens_ptr + (batch * (prefix + keep + 1) + prefix + keep) * C,
            scores, dropped, offs - before, count, split, splits, stride_xn, C, BLOCK_P, BLOCK_F, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["keep", "prefix"])
def _gather_kernel(
    x_ptr, index_ptr, tokens_ptr, normed_ptr, weight_ptr, bias_ptr,
    keep, prefix, eps,
    stride_xb, stride_xn,
    C: tl.constexpr, FUSE: tl.constexpr, NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the prefix and the kept patches; with FUSE and NORM also the LayerNorm of the fused token."""
    batch, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = prefix + keep + FUSE
    tokens_ptr += batch * rows * C
    normed_ptr += batch * rows * C
    offs_c = tl.arange(0, BLOCK_C)
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    kept = (row >= prefix) & (row < prefix + keep)
    patch = tl.load(index_ptr + batch * keep + row - prefix, mask=kept, other=0)
    source = tl.where(row < prefix, row.to(tl.int64), prefix + patch)
    row_ptr = x_ptr + batch * stride_xb + source * stride_xn
    if FUSE and NORM:
        row_ptr = tl.where(row == prefix + keep, tokens_ptr + row.to(tl.int64) * C, row_ptr)
    else:
        rows = prefix + keep
    mask = (row < rows)[:, None] & (offs_c < C)[None, :]
    x = tl.load(row_ptr[:, None] + offs_c[None, :], mask=mask, other=0.0)
    store_rows(x, row, rows, tokens_ptr, normed_ptr, weight_ptr, bias_ptr, eps, C, NORM, BLOCK_C)


def choose_config(patches: int, fuse: bool) -> dict[str, int]:
    """Return block sizes and warps of the first launch, for P patches."""
    blocks = ranking.blocks(patches)
    # A warp alone has too few registers for rows in flight.
    return {
        **blocks,
        "BLOCK_F": 64,
        "BLOCK_K": 128,
        "num_warps": max(4, blocks["num_warps"]) if fuse else blocks["num_warps"],
    }


def gather_config(width: int) -> dict[str, int]:
    """Return block sizes and warps of the gather, for tokens of width C."""
    return {**layer_norm.blocks(16, width, 8192), "num_warps": 4}


def splits_of(batch: int, width: int) -> int:
    """Return the number of programs that share the fused token of each of B images, for tokens of width C."""
    return max(1, min(triton.cdiv(width, 128), PROGRAMS // batch))


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
    by_rank = scores.ndim == 3 and heads == "rank"
    splits = splits_of(batch, width) if fuse else 1
    dropped = torch.empty(batch, splits, patches - keep, dtype=torch.int32, device=x.device) if fuse else index
    weights = torch.empty(batch, splits, patches - keep, dtype=torch.float32, device=x.device) if fuse else scores
    weight, bias, eps = layer_norm.arguments(norm, x)
    choose, gather = _launches(
        x.shape, x.stride(), scores.shape[1] if scores.ndim == 3 else 0, by_rank, keep, fuse, prefix,
        norm is not None, eps,
    )  # fmt: skip
    if choose is not None:
        choose(x, ranking.rank_scores(scores) if by_rank else scores, index, dropped, weights, out)
    if gather is not None:
        gather(x, index, out, out if normed is None else normed, weight, bias)
    return out, index, normed


@makes_launches
def _launches(
    shape: tuple[int, ...], stride: tuple[int, ...], heads: int, by_rank: bool, keep: int, fuse: bool, prefix: int,
    normed: bool, eps: float,
) -> tuple[Launch | None, Launch | None]:  # fmt: skip
    """Return the launches that choose and gather, None for one that has nothing to store."""
    batch, tokens, width = shape
    patches, splits = tokens - prefix, splits_of(batch, width) if fuse else 1
    gathered, blocks = prefix + keep + (fuse and normed), gather_config(width)
    choose = Launch(
        _choose_kernel, (batch, splits), patches, keep, prefix, *stride[:2],
        C=width, H=heads, RANKS=by_rank, FUSE=int(fuse), **choose_config(patches, fuse),
    )  # fmt: skip
    gather = Launch(
        _gather_kernel, (batch, triton.cdiv(gathered, blocks["BLOCK_R"])), keep, prefix, eps, *stride[:2],
        C=width, FUSE=int(fuse), NORM=normed, **blocks,
    )  # fmt: skip
    return choose if patches or fuse else None, gather if gathered else None
