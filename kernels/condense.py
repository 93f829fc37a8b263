"""Condense: keep the best patches, cluster the next best by K-centre greedy, fuse the rest, apply a LayerNorm.

    kept_i = place_i < keep;  centre_{j+1} = argmax_i min_{k≤j} ‖x_i - c_k‖ over the `merge` next places
    row_j = Σ w_i·x_i / Σ w_i over those nearest to c_j, w = 1/‖x_i - c_j‖ or 1;  fused = Σ weight_i·x_i over the rest

Reads M·C of x once, the merging rows K + 1 more times (they stay in cache: 52·1024 half-precision elements for L/14),
and writes M'·C. Two launches: the first selects and clusters, with one program per image, the second gathers. No sort,
no atomics, no host sync. A row's result depends only on its image.
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


@triton.jit(do_not_specialize=["P", "keep", "merge", "prefix", "first"])
def _cluster_kernel(
    x_ptr, scores_ptr, weights_ptr, reduced_ptr, order_ptr, source_ptr, index_ptr, coefficient_ptr,
    P, keep, merge, prefix, first,
    stride_xb, stride_xn,
    C: tl.constexpr, K: tl.constexpr, H: tl.constexpr, RANK: tl.constexpr, OWN: tl.constexpr, WH: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the patches of an image in descending order, the row that each goes to, and its coefficient there."""
    batch = tl.program_id(0).to(tl.int64)
    x_ptr += batch * stride_xb
    order_ptr += batch * P
    source_ptr += batch * P
    coefficient_ptr += batch * P
    index_ptr += batch * (keep + K)
    offs = tl.arange(0, BLOCK_P)
    if H:
        reduced = reduce_heads(scores_ptr + batch * H * P, offs, P, H * 1.0, H, RANK, BLOCK_P, BLOCK_J)
        row_ptr = reduced_ptr + batch * P
        tl.store(row_ptr + offs, reduced, mask=offs < P)
        tl.debug_barrier()  # the scores that a thread reads next were stored by others
    else:
        row_ptr = scores_ptr + batch * P
    at = rank_of(row_ptr, offs, P, BLOCK_P, BLOCK_J)
    if not OWN:
        weight = load_scores(row_ptr, offs, P)
    elif WH:
        weight = reduce_heads(weights_ptr + batch * WH * P, offs, P, WH * 1.0, WH, 0, BLOCK_P, BLOCK_J)
    else:
        weight = load_scores(weights_ptr + batch * P, offs, P)
    kept, gone = (offs < P) & (at < keep), (offs < P) & (at >= keep + merge)
    tl.store(order_ptr + at, offs, mask=offs < P)
    tl.store(index_ptr + at, offs.to(tl.int64), mask=kept)
    tl.store(source_ptr + offs, tl.where(kept, prefix + at, prefix + keep + K).to(tl.int64), mask=kept | gone)
    weight = tl.where(weight > float("-inf"), weight, 0.0)  # NaN compares as false
    tl.store(coefficient_ptr + offs, tl.where(kept, 1.0, weight), mask=kept | gone)
    tl.debug_barrier()  # the order that a thread reads next was stored by others

    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < merge
    patch = tl.load(order_ptr + keep + offs_m, mask=mask_m, other=0)
    rows_ptr = x_ptr + (prefix + patch).to(tl.int64) * stride_xn
    distance = tl.full([BLOCK_M], float("inf"), dtype=tl.float32)  # to the nearest centre so far
    joined = tl.zeros([BLOCK_M], dtype=tl.int32)
    chosen = first
    for center in range(K):
        own = tl.load(order_ptr + keep + chosen)
        tl.store(index_ptr + keep + center, own.to(tl.int64))
        own_ptr = x_ptr + (prefix + own).to(tl.int64) * stride_xn
        squares = tl.zeros([BLOCK_M], dtype=tl.float32)
        for start in range(0, C, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C)
            mask = mask_m[:, None] & (offs_c < C)[None, :]
            x = tl.load(rows_ptr[:, None] + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
            c = tl.load(own_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
            apart = tl.where(mask, x - c[None, :], 0.0)
            squares += tl.sum(apart * apart, 1)
        away = tl.sqrt_rn(squares)
        closer = away < distance  # the earlier of equally near centres stays; NaN is never closer
        joined = tl.where(closer, center, joined)
        distance = tl.where(closer, away, distance)
        chosen = tl.argmax(tl.where(mask_m, distance, -1.0), 0).to(tl.int32)

    inverse = tl.div_rn(1.0, tl.where(distance == 0.0, 1.0, distance))
    mass = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    for center in range(K):
        member = (joined == center) & mask_m
        mass = tl.where(member, tl.sum(tl.where(member, inverse, 0.0), 0), mass)
    tl.store(coefficient_ptr + patch, tl.div_rn(inverse, mass), mask=mask_m)
    tl.store(source_ptr + patch, (prefix + keep + joined).to(tl.int64), mask=mask_m)


@triton.jit(do_not_specialize=["P", "keep", "merge", "prefix"])
def _condense_kernel(
    x_ptr, order_ptr, source_ptr, index_ptr, coefficient_ptr, tokens_ptr, normed_ptr, weight_ptr, bias_ptr,
    P, keep, merge, prefix, eps,
    stride_xb, stride_xn,
    C: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    batch, tile = tl.program_id(0).to(tl.int64), tl.program_id(1) - K - 1
    x_ptr += batch * stride_xb
    order_ptr += batch * P
    rows = prefix + keep + K + 1
    tokens_ptr += batch * rows * C
    normed_ptr += batch * rows * C
    offs_c = tl.arange(0, BLOCK_C)
    if tile >= 0:
        offs_r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        kept = (offs_r >= prefix) & (offs_r < prefix + keep)
        best = tl.load(order_ptr + offs_r - prefix, mask=kept, other=0)
        from_row = tl.where(offs_r < prefix, offs_r, prefix + best).to(tl.int64)
        mask = (offs_r < prefix + keep)[:, None] & (offs_c < C)[None, :]
        x = tl.load(x_ptr + from_row[:, None] * stride_xn + offs_c[None, :], mask=mask, other=0.0)
        store_rows(x, offs_r, prefix + keep, tokens_ptr, normed_ptr, weight_ptr, bias_ptr, eps, C, NORM, BLOCK_C)
    else:  # the sums are the first programs, because they take longest: the fused token's, then one per centre
        fused = tile == -K - 1
        center = tile + K
        row = tl.where(fused, prefix + keep + K, prefix + keep + center)
        begin = tl.where(fused, keep + merge, keep)
        count = tl.where(fused, P - keep - merge, merge)
        acc = tl.zeros([BLOCK_C], dtype=tl.float32)
        members = 0
        for start in range(0, BLOCK_P, BLOCK_R):
            if start < count:
                offs = start + tl.arange(0, BLOCK_R)
                patch = tl.load(order_ptr + begin + offs, mask=offs < count, other=0).to(tl.int64)
                to = tl.load(source_ptr + batch * P + patch, mask=offs < count, other=-1)
                here = (offs < count) & (to == row)
                weight = tl.load(coefficient_ptr + batch * P + patch, mask=here, other=0.0)
                piece_ptr = x_ptr + (prefix + patch)[:, None] * stride_xn + offs_c[None, :]
                piece = tl.load(piece_ptr, mask=here[:, None] & (offs_c < C)[None, :], other=0.0).to(tl.float32)
                acc += tl.sum(weight[:, None] * piece, 0)
                members += tl.sum(here.to(tl.int32), 0)
        if (members == 0) & (tile > -K - 1):  # a centre without patches coincides with another and yields its own token
            own = tl.load(index_ptr + batch * (keep + K) + keep + center)
            acc = tl.load(x_ptr + (prefix + own) * stride_xn + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
        offs_1 = row + tl.arange(0, 1)
        store_rows(acc[None, :], offs_1, rows, tokens_ptr, normed_ptr, weight_ptr, bias_ptr, eps, C, NORM, BLOCK_C)


def config(patches: int, merge: int, width: int) -> dict[str, dict[str, int]]:
    """Return block sizes and warps of both launches, for P patches of width C, `merge` of which are clustered."""
    block_m = max(16, triton.next_power_of_2(merge))
    # With more than 64 merging rows the compiler spills if there are more warps or wider tiles.
    tile = {"BLOCK_C": max(16, min(triton.next_power_of_2(width), 4096 // block_m)) if block_m <= 64 else 16}
    places = ranking.blocks(patches)
    warps = {"num_warps": 4} if block_m > 64 else {}
    gather = {"BLOCK_P": places["BLOCK_P"], **layer_norm.blocks(16, width, 8192), "num_warps": 4}
    return {"cluster": {**places, **warps, "BLOCK_M": block_m, **tile}, "gather": gather}


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Launch the kernels.

    Returns tokens (B,prefix+keep+centers+1,C), source (B,P) int64, index (B,keep+centers) int64, the coefficient (B,P)
    fp32 of each patch in its row, and normed like tokens or None.
    """
    batch, tokens, width = x.shape
    patches = tokens - prefix
    out = x.new_empty(batch, prefix + keep + centers + 1, width)
    source = torch.empty(batch, patches, dtype=torch.int64, device=x.device)
    index = torch.empty(batch, keep + centers, dtype=torch.int64, device=x.device)
    coefficient = torch.empty(batch, patches, dtype=torch.float32, device=x.device)
    normed = torch.empty_like(out) if norm is not None else None
    if batch == 0:
        return out, source, index, coefficient, normed
    x = x if x.stride(2) == 1 else x.contiguous()
    scores = scores.contiguous()
    weights = weights if weights is None else weights.contiguous()
    per_head = scores.ndim == 3
    reduced = torch.empty(batch, patches, dtype=torch.float32, device=x.device) if per_head else scores
    order = torch.empty(batch, patches, dtype=torch.int32, device=x.device)
    weight, bias, eps = layer_norm.arguments(norm, x)
    cluster, gather = _condense_launches(
        x.shape, x.stride(), keep, merge, centers, scores.shape[1] if per_head else 0, heads == "rank",
        weights is not None, weights.shape[1] if weights is not None and weights.ndim == 3 else 0, prefix, first,
        norm is not None, eps,
    )  # fmt: skip
    cluster(x, scores, scores if weights is None else weights, reduced, order, source, index, coefficient)
    gather(x, order, source, index, coefficient, out, out if normed is None else normed, weight, bias)
    return out, source, index, coefficient, normed


@lru_cache(maxsize=1024)
def _condense_launches(
    shape: tuple[int, ...], stride: tuple[int, ...], keep: int, merge: int, centers: int, heads: int, rank: bool,
    weighed: bool, weight_heads: int, prefix: int, first: int, normed: bool, eps: float,
) -> tuple[Launch, Launch]:  # fmt: skip
    batch, tokens, width = shape
    patches = tokens - prefix
    blocks = config(patches, merge, width)
    cluster = Launch(
        _cluster_kernel, (batch,), patches, keep, merge, prefix, first, *stride[:2],
        C=width, K=centers, H=heads, RANK=rank, OWN=weighed, WH=weight_heads, **blocks["cluster"],
    )  # fmt: skip
    gather = Launch(
        _condense_kernel, (batch, triton.cdiv(prefix + keep, blocks["gather"]["BLOCK_R"]) + centers + 1),
        patches, keep, merge, prefix, eps, *stride[:2], C=width, K=centers, NORM=normed, **blocks["gather"],
    )  # fmt: skip
    return cluster, gather
