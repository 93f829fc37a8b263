"""Condense: keep the best patches, cluster the next best by K-centre greedy, fuse the rest, apply a LayerNorm.

    kept_i = place_i < keep;  centre_{j+1} = argmax_i min_{k≤j} ‖x_i - c_k‖ over the `merge` next places
    row_j = Σ w_i·x_i / Σ w_i over those nearest to c_j, w = 1/‖x_i - c_j‖ or 1;  fused = Σ weight_i·x_i over the rest

Reads M·C of x once, the merging rows K + 1 more times (they stay in cache: 52·1024 half-precision elements for L/14),
and writes M'·C. Two launches. In the first, one program per image sorts the scores and clusters, while others choose
the rest by a threshold and sum the fused token, split by channels. The second gathers, sums the clusters and normalises
all rows, the fused one as stored. Scores that are ranked per head are ranked in a launch before them. No atomics, no
host sync. A row's result depends only on its image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipkernels.kernels import layer_norm, prune, ranking
from clipkernels.kernels.launch import Launch, makes_launches
from clipkernels.kernels.layer_norm import store_rows
from clipkernels.kernels.prune import load_reduced, store_fused
from clipkernels.kernels.ranking import choose_strongest, keys_of, sort_strongest_first


@triton.jit(do_not_specialize=["P", "keep", "merge", "prefix", "first"])
def _cluster_kernel(
    x_ptr, scores_ptr, weights_ptr, order_ptr, source_ptr, index_ptr, share_ptr, patch_ptr, weight_ptr, tokens_ptr,
    P, keep, merge, prefix, first,
    stride_xb, stride_xn,
    C: tl.constexpr, K: tl.constexpr, H: tl.constexpr, RANKS: tl.constexpr, WEIGHTS: tl.constexpr, WH: tl.constexpr,
    BLOCK_P: tl.constexpr, LOG_P: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store the order of an image's patches, the row of each, the share of the merging ones, and the fused token."""
    batch, split = tl.program_id(0).to(tl.int64), tl.program_id(1) - 1
    x_ptr += batch * stride_xb + prefix * stride_xn
    offs = tl.arange(0, BLOCK_P)
    scores = load_reduced(scores_ptr, batch, offs, P, H, RANKS, BLOCK_P, BLOCK_H)
    keys = keys_of(scores, offs, P)
    if split < 0:
        order_ptr += batch * P
        source_ptr += batch * P
        index_ptr += batch * (keep + K)
        order = sort_strongest_first(keys, offs, BLOCK_P, LOG_P)
        tl.store(order_ptr + offs, order, mask=offs < P)
        tl.store(index_ptr + offs, order.to(tl.int64), mask=offs < keep)
        row = tl.where(offs < keep, prefix + offs, prefix + keep + K)
        tl.store(source_ptr + order, row.to(tl.int64), mask=(offs < P) & ((offs < keep) | (offs >= keep + merge)))
        tl.debug_barrier()  # the order that a thread reads next was stored by others
        cluster(
            x_ptr, order_ptr + keep, source_ptr, index_ptr + keep, share_ptr + batch * merge,
            merge, first, prefix + keep, stride_xn, C, K, BLOCK_M, BLOCK_C,
        )  # fmt: skip
    else:
        rest, before = choose_strongest(keys, keep + merge)
        rest = (offs < P) & (rest == 0)
        if WEIGHTS:
            scores = load_reduced(weights_ptr, batch, offs, P, WH, False, BLOCK_P, BLOCK_H)
        count, splits = P - keep - merge, tl.num_programs(1) - 1
        list_at = (batch * splits + split) * count
        store_fused(
            x_ptr, patch_ptr + list_at, weight_ptr + list_at,
            tokens_ptr + ((batch + 1) * (prefix + keep + K + 1) - 1) * C,
            scores, rest, offs - before, count, split, splits, stride_xn, C, BLOCK_P, BLOCK_F, BLOCK_K,
        )  # fmt: skip


@triton.jit
def cluster(
    x_ptr, merging_ptr, source_ptr, center_ptr, share_ptr, merge, first, first_row, stride_xn,
    C: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the patch of each centre, and of every merging patch its centre's row and its share of it."""
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < merge
    patch = tl.load(merging_ptr + offs_m, mask=mask_m, other=0)
    rows_ptr = x_ptr + patch.to(tl.int64) * stride_xn
    distance = tl.full([BLOCK_M], float("inf"), dtype=tl.float32)  # to the nearest centre so far
    joined = tl.zeros([BLOCK_M], dtype=tl.int32)
    place = first
    for number in range(K):
        center = tl.load(merging_ptr + place)
        tl.store(center_ptr + number, center.to(tl.int64))
        center_row_ptr = x_ptr + center.to(tl.int64) * stride_xn
        squares = tl.zeros([BLOCK_M], dtype=tl.float32)
        for start in range(0, C, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C)
            mask = mask_m[:, None] & (offs_c < C)[None, :]
            x = tl.load(rows_ptr[:, None] + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
            c = tl.load(center_row_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
            difference = tl.where(mask, x - c[None, :], 0.0)
            squares += tl.sum(difference * difference, 1)
        center_distance = tl.sqrt_rn(squares)
        closer = center_distance < distance  # the earlier of equally near centres stays; NaN is never closer
        joined = tl.where(closer, number, joined)
        distance = tl.where(closer, center_distance, distance)
        place = tl.argmax(tl.where(mask_m, distance, -1.0), 0).to(tl.int32)
    inverse = tl.div_rn(1.0, tl.where(distance == 0.0, 1.0, distance))
    mass = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    for number in range(K):
        member = (joined == number) & mask_m
        mass = tl.where(member, tl.sum(tl.where(member, inverse, 0.0), 0), mass)
    mass = tl.where(mass > 0.0, mass, 1.0)  # 0 if the centre is not finite
    tl.store(share_ptr + offs_m, tl.div_rn(inverse, mass), mask=mask_m)
    tl.store(source_ptr + patch, (first_row + joined).to(tl.int64), mask=mask_m)


@triton.jit(do_not_specialize=["P", "keep", "merge", "prefix"])
def _condense_kernel(
    x_ptr, order_ptr, source_ptr, index_ptr, share_ptr, tokens_ptr, normed_ptr, weight_ptr, bias_ptr,
    P, keep, merge, prefix, eps,
    stride_xb, stride_xn,
    C: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the prefix, the kept patches and the centres' tokens; with NORM also the LayerNorm of all rows."""
    batch, tile = tl.program_id(0).to(tl.int64), tl.program_id(1) - K
    x_ptr += batch * stride_xb
    order_ptr += batch * P
    rows = prefix + keep + K + 1
    tokens_ptr += batch * rows * C
    normed_ptr += batch * rows * C
    offs_c = tl.arange(0, BLOCK_C)
    if tile >= 0:
        offs_r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        kept = (offs_r >= prefix) & (offs_r < prefix + keep)
        patch = tl.load(order_ptr + offs_r - prefix, mask=kept, other=0)
        row_ptr = x_ptr + tl.where(offs_r < prefix, offs_r, prefix + patch).to(tl.int64) * stride_xn
        row = tl.where(offs_r < prefix + keep, offs_r, rows)
        if NORM:  # after the kept rows the fused token, which the first launch has stored
            fused = offs_r == prefix + keep
            row = tl.where(fused, rows - 1, row)
            row_ptr = tl.where(fused, tokens_ptr + (rows - 1) * C, row_ptr)
        mask = (row < rows)[:, None] & (offs_c < C)[None, :]
        x = tl.load(row_ptr[:, None] + offs_c[None, :], mask=mask, other=0.0)
        store_rows(x, row, rows, tokens_ptr, normed_ptr, weight_ptr, bias_ptr, eps, C, NORM, BLOCK_C)
    else:  # the sums are the first programs, because they take longest
        center = tile + K
        center_row = prefix + keep + center
        acc = tl.zeros([BLOCK_C], dtype=tl.float32)
        members = 0
        for start in range(0, merge, BLOCK_R):
            offs = start + tl.arange(0, BLOCK_R)
            patch = tl.load(order_ptr + keep + offs, mask=offs < merge, other=0).to(tl.int64)
            joined = tl.load(source_ptr + batch * P + patch, mask=offs < merge, other=-1) == center_row
            share = tl.load(share_ptr + batch * merge + offs, mask=joined, other=0.0)
            joined = share > 0.0  # a patch that is not finite has no share, but 0·NaN would spoil the sum
            piece_ptr = x_ptr + (prefix + patch)[:, None] * stride_xn + offs_c[None, :]
            piece = tl.load(piece_ptr, mask=joined[:, None] & (offs_c < C)[None, :], other=0.0).to(tl.float32)
            acc += tl.sum(share[:, None] * piece, 0)
            members += tl.sum(joined.to(tl.int32), 0)
        if members == 0:  # a centre without patches coincides with another, or is not finite: it yields its own token
            patch = tl.load(index_ptr + batch * (keep + K) + keep + center)
            acc = tl.load(x_ptr + (prefix + patch) * stride_xn + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
        offs_1 = center_row + tl.arange(0, 1)
        store_rows(acc[None, :], offs_1, rows, tokens_ptr, normed_ptr, weight_ptr, bias_ptr, eps, C, NORM, BLOCK_C)


def cluster_config(patches: int, merge: int, width: int) -> dict[str, int]:
    """Return block sizes and warps of the first launch, for P patches of width C, `merge` of which are clustered."""
    block_m = max(16, triton.next_power_of_2(merge))
    # With more than 64 merging rows the compiler spills if there are more warps or wider tiles.
    block_c = max(16, min(triton.next_power_of_2(width), 4096 // block_m)) if block_m <= 64 else 16
    blocks = {**prune.choose_config(patches, fuse=True), **ranking.config(patches)}
    warps = 8 if blocks["BLOCK_P"] > 1024 or (blocks["BLOCK_P"] >= 256 and block_m <= 64) else 4
    return {**blocks, "BLOCK_M": block_m, "BLOCK_C": block_c, "num_warps": warps}


def condense_tokens(
    x: Tensor,
    scores: Tensor,
    keep: int,
    merge: int,
    centers: int,
    weights: Tensor | None,
    heads: str,
    prefix: int,
    first: int,
    norm: tuple[Tensor, Tensor, float] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Launch the kernels.

    Returns tokens (B,prefix+keep+centers+1,C), source (B,P) int64, index (B,keep+centers) int64, and normed like tokens
    or None.
    """
    batch, tokens, width = x.shape
    patches = tokens - prefix
    out = x.new_empty(batch, prefix + keep + centers + 1, width)
    source = torch.empty(batch, patches, dtype=torch.int64, device=x.device)
    index = torch.empty(batch, keep + centers, dtype=torch.int64, device=x.device)
    normed = torch.empty_like(out) if norm is not None else None
    if batch == 0:
        return out, source, index, normed
    x = x if x.stride(2) == 1 else x.contiguous()
    scores = scores.contiguous()
    weights = weights if weights is None else weights.contiguous()
    by_rank = scores.ndim == 3 and heads == "rank"
    order = torch.empty(batch, patches, dtype=torch.int32, device=x.device)
    share = torch.empty(batch, merge, dtype=torch.float32, device=x.device)
    splits = prune.splits_of(batch, width)
    dropped = torch.empty(batch, splits, patches - keep - merge, dtype=torch.int32, device=x.device)
    dropped_weights = torch.empty(batch, splits, patches - keep - merge, dtype=torch.float32, device=x.device)
    weight, bias, eps = layer_norm.arguments(norm, x)
    cluster, condense = _launches(
        x.shape, x.stride(), keep, merge, centers, scores.shape[1] if scores.ndim == 3 else 0, by_rank,
        weights is not None, weights.shape[1] if weights is not None and weights.ndim == 3 else 0, prefix, first,
        norm is not None, eps,
    )  # fmt: skip
    cluster(
        x, ranking.rank_scores(scores) if by_rank else scores, scores if weights is None else weights,
        order, source, index, share, dropped, dropped_weights, out,
    )  # fmt: skip
    condense(x, order, source, index, share, out, out if normed is None else normed, weight, bias)
    return out, source, index, normed


@makes_launches
def _launches(
    shape: tuple[int, ...], stride: tuple[int, ...], keep: int, merge: int, centers: int, heads: int, by_rank: bool,
    weighed: bool, weight_heads: int, prefix: int, first: int, normed: bool, eps: float,
) -> tuple[Launch, Launch]:  # fmt: skip
    """Return the launches that cluster and that store the tokens."""
    batch, tokens, width = shape
    patches, gathered, blocks = tokens - prefix, prefix + keep + normed, prune.gather_config(width)
    cluster = Launch(
        _cluster_kernel, (batch, 1 + prune.splits_of(batch, width)), patches, keep, merge, prefix, first, *stride[:2],
        C=width, K=centers, H=heads, RANKS=by_rank, WEIGHTS=weighed, WH=weight_heads,
        **cluster_config(patches, merge, width),
    )  # fmt: skip
    condense = Launch(
        _condense_kernel, (batch, triton.cdiv(gathered, blocks["BLOCK_R"]) + centers),
        patches, keep, merge, prefix, eps, *stride[:2], C=width, K=centers, NORM=normed, **blocks,
    )  # fmt: skip
    return cluster, condense
