"""Attention with a signal that ranks tokens: non-causal, up to a thousand tokens, from the packed projection.

    p_ij ∝ size_j · exp(q_i·k_j / D**0.5);  out = p v;  cls_h = p_h0;  received = mean over heads and queries of p

A key of size 0 takes no part, whatever its k and v hold. If all have size 0, every result is 0.

Reads Q, K, V once (3·B·N·C) and writes B·N·C. The CLS row adds B·H·P fp32: the program that holds query 0 stores its
logits as it meets the keys, and its softmax at the end. `received` needs the final row sums first: each program keeps
the probabilities of two tiles of keys and computes QKᵀ again for the tiles between them (none up to 128 keys, K from
cache). It stores its column sums, and a second launch adds them in a fixed order. Takes 4·B·N²·C operations, up to
6·B·N²·C with `received`.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipkernels.kernels.launch import Launch, makes_launches
from clipkernels.kernels.rank import LOG2E, LOWEST, in_units, reduce_scores


@triton.jit
def _load_rows(
    ptr, offs_n, visible, stride,
    D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Load channels START to START + WIDTH of rows, [N, WIDTH]; 0 beyond D and, with MASKED, in invisible rows."""
    offs_d = START + tl.arange(0, WIDTH)
    mask = (offs_d < D)[None, :]
    if MASKED:
        mask = mask & visible[:, None]
    x = tl.load(ptr + offs_n.to(tl.int64)[:, None] * stride + offs_d[None, :], mask=mask, other=0.0)
    return x.to(tl.float32) if WIDE else x


@triton.jit
def _logits(
    q, q_rest, k_ptr, size_ptr, offs_n, keys, stride_kn,
    D: tl.constexpr, SIZED: tl.constexpr, WIDE: tl.constexpr, PARTIAL: tl.constexpr,
    BLOCK_D: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Return q·k [BLOCK_M, TILE], -inf for invisible keys; those keys, transposed; visibility and sizes [TILE]."""
    visible, size = offs_n < keys, 1.0
    if SIZED:
        size = tl.load(size_ptr + offs_n, mask=visible, other=0.0).to(tl.float32)
        visible = size > 0.0
    k = tl.trans(_load_rows(k_ptr, offs_n, visible, stride_kn, D, 0, BLOCK_D, PARTIAL, WIDE))
    k_rest = k
    s = tl.dot(q, k, input_precision="ieee")
    if REST:
        k_rest = tl.trans(_load_rows(k_ptr, offs_n, visible, stride_kn, D, BLOCK_D, REST, PARTIAL, WIDE))
        s = tl.dot(q_rest, k_rest, s, input_precision="ieee")
    if SIZED or PARTIAL:
        s = tl.where(visible[None, :], s, float("-inf"))
    return s, k, k_rest, visible, size


@triton.jit
def _store_logits(
    q_ptr, k, k_rest, row_ptr, offs_n, keys, prefix, query_0,
    D: tl.constexpr, WIDE: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Store the products of query 0 with a tile of keys, without the prefix, if this program holds that query."""
    if query_0:
        # 16 times the same query, the least of a matrix instruction. To move one row out of all logits takes more.
        offs_m = tl.arange(0, 16)
        query = _load_rows(q_ptr, offs_m, offs_m, 0, D, 0, BLOCK_D, False, WIDE)
        s = tl.dot(query, k, input_precision="ieee")
        if REST:
            query_rest = _load_rows(q_ptr, offs_m, offs_m, 0, D, BLOCK_D, REST, False, WIDE)
            s = tl.dot(query_rest, k_rest, s, input_precision="ieee")
        logit = tl.sum(tl.where((offs_m == 0)[:, None], s, 0.0), 0)
        tl.store(row_ptr + offs_n, logit, mask=(offs_n >= prefix) & (offs_n < keys))


@triton.jit
def _attend(
    q, q_rest, q_ptr, k_ptr, v_ptr, size_ptr, row_ptr, acc, acc_rest, total, most,
    query_0, keys, prefix, scale, stride_kn, stride_vn,
    D: tl.constexpr, SIZED: tl.constexpr, CLS: tl.constexpr, OUT: tl.constexpr, WIDE: tl.constexpr,
    PARTIAL: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys: Σ exp(s - max) v, the sums and maxima, and return exp(s - max) [BLOCK_M, TILE] with them.

    A PARTIAL tile has fewer than TILE keys, and no tile precedes it. Maxima are not scaled. Sums are of every eighth
    key [BLOCK_M, 8], so that threads need not add theirs in each tile.
    """
    offs_n = tl.arange(0, TILE)
    s, k, k_rest, visible, size = _logits(
        q, q_rest, k_ptr, size_ptr, offs_n, keys, stride_kn, D, SIZED, WIDE, PARTIAL, BLOCK_D, REST
    )
    if CLS:
        _store_logits(q_ptr, k, k_rest, row_ptr, offs_n, keys, prefix, query_0, D, WIDE, BLOCK_D, REST)
    higher = tl.maximum(most, tl.max(s, 1))
    peak = higher * scale
    p = tl.exp2(s * scale - peak[:, None])  # one multiply-add before the exponential
    if SIZED:  # exp(s + log size) = size·exp(s)
        p *= size[None, :]
    shrink = tl.exp2(most * scale - peak)[:, None]
    total = total * shrink + tl.sum(tl.reshape(p, [p.shape[0], TILE // 8, 8]), 1)
    if OUT:
        v = _load_rows(v_ptr, offs_n, visible, stride_vn, D, 0, BLOCK_D, SIZED or PARTIAL, WIDE)
        acc = tl.dot(p.to(v.dtype), v, acc if PARTIAL else acc * shrink, input_precision="ieee")
        if REST:
            v_rest = _load_rows(v_ptr, offs_n, visible, stride_vn, D, BLOCK_D, REST, SIZED or PARTIAL, WIDE)
            part = acc_rest if PARTIAL else acc_rest * shrink
            acc_rest = tl.dot(p.to(v.dtype), v_rest, part, input_precision="ieee")
    return acc, acc_rest, total, higher, p


@triton.jit
def _store_softmax(row_ptr, size_ptr, tile, offs_m, peak, share, N, prefix, scale, SIZED: tl.constexpr):
    """Replace the logits of query 0 by their softmax, in place, if this program holds that query."""
    if tile == 0:
        row_peak = tl.sum(tl.where(offs_m == 0, peak, 0.0), 0)
        row_share = tl.sum(tl.where(offs_m == 0, share, 0.0), 0)
        tl.debug_barrier()  # the logits that a thread reads next were stored by others
        for start in range(0, N, 256):
            offs_n = start + tl.arange(0, 256)
            mask = (offs_n >= prefix) & (offs_n < N)
            logit = tl.load(row_ptr + offs_n, mask=mask, other=0.0)
            weight = row_share
            if SIZED:
                size = tl.load(size_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
                logit = tl.where(size > 0.0, logit, float("-inf"))
                weight *= size
            tl.store(row_ptr + offs_n, tl.exp2(logit * scale - row_peak) * weight, mask=mask)


@triton.jit(do_not_specialize=["M", "N", "tiles", "full"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, size_ptr, out_ptr, signal_ptr,
    H, M, N, tiles, full, prefix, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    D: tl.constexpr, SIZED: tl.constexpr, SIGNAL: tl.constexpr, OUT: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    # One grid axis: the others are limited to 65,535 programs. Programs of a head are neighbours and share its keys in
    # cache.
    tile, row = tl.program_id(0) % tiles, tl.program_id(0).to(tl.int64) // tiles
    head, batch = row % H, row // H
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    q_ptr += (batch * stride_qb + head * stride_qh) * UNIT
    k_ptr += (batch * stride_kb + head * stride_kh) * UNIT
    v_ptr += (batch * stride_vb + head * stride_vh) * UNIT
    stride_qm, stride_kn = tl.cast(stride_qm, tl.int64) * UNIT, tl.cast(stride_kn, tl.int64) * UNIT
    stride_vn = tl.cast(stride_vn, tl.int64) * UNIT
    size_ptr += batch * N
    rows = 1 if SIGNAL == "cls" else tiles  # of the signal, for each head
    row_ptr = signal_ptr + ((batch * H + head) * rows + (0 if SIGNAL == "cls" else tile)) * (N - prefix) - prefix
    offs_q = tl.minimum(offs_m, M - 1)  # beyond M the last row again, because zeros times an infinite key are NaN
    q = _load_rows(q_ptr, offs_q, mask_m, stride_qm, D, 0, BLOCK_D, False, WIDE)
    q_rest = q
    if REST:
        q_rest = _load_rows(q_ptr, offs_q, mask_m, stride_qm, D, BLOCK_D, REST, False, WIDE)

    # The last tile of keys, which they need not fill, comes first: only its logits are masked, and no sum precedes it.
    start = full * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_rest = tl.zeros([BLOCK_M, REST if REST else 16], tl.float32)
    total = tl.zeros([BLOCK_M, 8], tl.float32)
    most = tl.full([BLOCK_M], LOWEST, tl.float32)
    acc, acc_rest, total, most, p_tail = _attend(
        q, q_rest, q_ptr, k_ptr + start * stride_kn, v_ptr + start * stride_vn, size_ptr + start, row_ptr + start,
        acc, acc_rest, total, most, tile == 0, N - start, prefix - start, scale, stride_kn, stride_vn,
        D, SIZED, SIGNAL == "cls", OUT, WIDE, True, TAIL, BLOCK_D, REST,
    )  # fmt: skip
    peak_tail = most * scale
    p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(full):
        begin = step * BLOCK_N
        acc, acc_rest, total, most, p = _attend(
            q, q_rest, q_ptr, k_ptr + begin * stride_kn, v_ptr + begin * stride_vn, size_ptr + begin, row_ptr + begin,
            acc, acc_rest, total, most, tile == 0, BLOCK_N, prefix - begin, scale, stride_kn, stride_vn,
            D, SIZED, SIGNAL == "cls", OUT, WIDE, False, BLOCK_N, BLOCK_D, REST,
        )  # fmt: skip

    sums, peak = tl.sum(total, 1), most * scale
    if SIZED:  # without a key the sums are 0, and so are all results
        sums = tl.where(sums == 0.0, 1.0, sums)
    share = 1.0 / sums
    if OUT:
        out_ptr += ((batch * M + offs_m) * H + head)[:, None] * D
        offs_d = tl.arange(0, BLOCK_D)
        out = (acc * share[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offs_d[None, :], out, mask=mask_m[:, None] & (offs_d < D)[None, :])
        if REST:
            offs_rest = BLOCK_D + tl.arange(0, REST)
            out_rest = (acc_rest * share[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + offs_rest[None, :], out_rest, mask=mask_m[:, None] & (offs_rest < D)[None, :])
    if SIGNAL == "cls":
        _store_softmax(row_ptr, size_ptr, tile, offs_m, peak, share, N, prefix, scale, SIZED)
    if SIGNAL == "received":  # the column sums; the probabilities of the first and of the last tile are at hand
        share = tl.where(mask_m, share, 0.0)
        offs_t = start + tl.arange(0, TAIL)
        received = tl.sum(p_tail * (tl.exp2(peak_tail - peak) * share)[:, None], 0)
        tl.store(row_ptr + offs_t, received, mask=(offs_t >= prefix) & (offs_t < N))
        offs_n = start - BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(row_ptr + offs_n, tl.sum(p * share[:, None], 0), mask=offs_n >= prefix)
        for step in range(full - 1):
            offs_n = step * BLOCK_N + tl.arange(0, BLOCK_N)
            s, _, _, _, size = _logits(
                q, q_rest, k_ptr, size_ptr, offs_n, N, stride_kn, D, SIZED, WIDE, False, BLOCK_D, REST
            )
            weight = tl.exp2(s * scale - peak[:, None]) * share[:, None]
            if SIZED:
                weight *= size[None, :]
            tl.store(row_ptr + offs_n, tl.sum(weight, 0), mask=offs_n >= prefix)


def config(rows: int, keys: int, width: int, dtype: torch.dtype, signal: str | None, hopper: bool) -> dict[str, int]:
    """Return block sizes, warps and stages for M queries and N keys of heads of width D.

    The products computed, and the share of them that is useful, by tokens and width:

        N, D      197, 64      257, 64      577, 64      729, 72
        computed  256 x 208    384 x 272    640 x 592    768 x 736 x 80
        useful    73 %         63 %         88 %         85 %
    """
    # Channels beyond 64 are a tile of their own, if that is narrower than padding to 128.
    block_d = max(16, triton.next_power_of_2(width))
    rest = max(16, triton.next_power_of_2(width - 64)) if 64 < width <= 96 else 0
    block_d = 64 if rest else block_d
    # As many queries per program as fit without spills, because each program reads all keys and values of its head.
    wide = width > 64
    if dtype == torch.float32:  # without tensor cores, so that the selections match the reference
        block_m, block_n, warps = (16, 16, 4) if wide or signal is not None else (32, 32, 8)
        warps = 8 if width > 80 else warps  # four spill at a width of 96
    else:
        block_n = 32 if wide and (rows <= 16 or not hopper) else 64
        if rows <= 64 or signal == "received":
            block_m, warps = 16 if rows <= 16 else 64, 4
        else:
            block_m, warps = 128, 4 if hopper and not wide else 8
    tail = max(16, triton.next_power_of_2((keys - 1) % block_n + 1))
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "TAIL": tail, "BLOCK_D": block_d, "REST": rest,
        "num_warps": warps, "num_stages": 2,
    }  # fmt: skip


@cache
def is_hopper(device: torch.device) -> bool:
    """Return true for NVIDIA GPUs of compute capability 9, whose matrix instructions are issued by four warps."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


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
        prefix, is_hopper(q.device),
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
    hopper: bool,
) -> tuple[Launch, tuple[int, ...]]:  # fmt: skip
    """Return the launch, and the shape of its signal."""
    (batch, heads, rows, width), patches = shape, tokens - prefix
    blocks = config(rows, tokens, width, dtype, signal, hopper)
    tiles = triton.cdiv(rows, blocks["BLOCK_M"])
    unit, (in_q, in_k, in_v) = in_units(stride_q, stride_k, stride_v)
    launch = Launch(
        _attention_kernel, (tiles * heads * batch,), heads, rows, tokens, tiles, (tokens - 1) // blocks["BLOCK_N"],
        prefix, LOG2E * width**-0.5, *in_q, *in_k, *in_v,
        D=width, SIZED=sized, SIGNAL=signal, OUT=valued, WIDE=not isinstance(_attention_kernel, triton.JITFunction),
        UNIT=unit, **blocks,
    )  # fmt: skip
    shapes = {None: (0,), "cls": (batch, heads, patches), "received": (batch, heads * tiles, patches)}
    return launch, shapes[signal]
