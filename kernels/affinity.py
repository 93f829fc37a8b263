"""Affinity: kernel similarity of each query to the rows of a support set, summed by class, in one pass.

    out_ic = Σ_{j in class c} w_j · exp(-β(1 - q_i·f_j))

The support is sorted by class. A program takes BLOCK_T queries, BLOCK_C consecutive classes and those of their rows
that lie between two multiples of ROWS. However unequal the classes are, no program has more than ROWS rows, and each
tile of queries has K/BLOCK_C + n/ROWS programs. With n < ROWS these programs write the result. Otherwise several may
share a class, and a second launch adds their sums in the order of the rows.

Reads q and f once from memory, (t + n)·E elements (f again from cache for each tile of queries), and writes 4·t·K
bytes. With two launches another 4·t·K + 64·t·n/ROWS bytes are written and read. Takes 2·t·n·E operations, and 64·t·n
for the sums by class: in half precision a product with a 0/1 matrix built in registers; in fp32, which has no tensor
cores, plain additions. At n = 50,000, K = 1000, E = 512, t = 256 in bf16 that is 56 MB (13 µs) and 14 GFLOP
(18 µs). Two matrix products take 39 GFLOP, read 100 MB of ones and zeros, and move the (t,n) affinities several times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipkernels.kernels.launch import Launch, makes_launches
from clipkernels.kernels.rank import LOG2E

REDO = tl.constexpr(16)  # rows and elements at a time on the rare path, small to save registers


@triton.jit
def _bound(offsets_ptr, classes, mask, low, rows):
    """Return the offsets of classes relative to row `low`, clamped to 0..rows."""
    return tl.minimum(tl.maximum(tl.load(offsets_ptr + classes, mask=mask, other=0) - low, 0), rows).to(tl.int32)


@triton.jit
def _sums(
    q_ptr, f_ptr, weight_ptr, offsets_ptr, offs_t, low, rows, t, count, scale, stride_qt, stride_fn,
    E: tl.constexpr, WEIGHED: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return the sums [BLOCK_T, BLOCK_C] over `rows` rows from row `low` on, for `count` classes."""
    offs_c = tl.arange(0, BLOCK_C)
    q_ptr += offs_t.to(tl.int64)[:, None] * stride_qt
    first = _bound(offsets_ptr, offs_c, offs_c < count, low, rows)
    stop = _bound(offsets_ptr + 1, offs_c, offs_c < count, low, rows)
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    start = 0
    while start < rows:
        offs_n = start + tl.arange(0, BLOCK_N)
        row_ptr = f_ptr + offs_n.to(tl.int64)[None, :] * stride_fn
        s = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for begin in range(0, E, BLOCK_E):
            offs_e = begin + tl.arange(0, BLOCK_E)
            q = tl.load(q_ptr + offs_e[None, :], mask=(offs_t < t)[:, None] & (offs_e < E)[None, :], other=0.0)
            f = tl.load(row_ptr + offs_e[:, None], mask=(offs_e < E)[:, None] & (offs_n < rows)[None, :], other=0.0)
            if WIDE:
                q, f = q.to(tl.float32), f.to(tl.float32)
            s = tl.dot(q, f, s, input_precision="ieee")
        p = tl.exp2((s - 1.0) * scale)
        if WEIGHED:
            p *= tl.load(weight_ptr + offs_n, mask=offs_n < rows, other=0.0).to(tl.float32)[None, :]
        if EXACT:
            c = 0
            while c < count:
                begins = _bound(offsets_ptr, c, True, low, rows)
                ends = _bound(offsets_ptr + 1, c, True, low, rows)
                if (begins < start + BLOCK_N) & (ends > start):
                    member = (offs_n >= begins) & (offs_n < ends)
                    part = tl.sum(tl.where(member[None, :], p, 0.0), 1)  # [BLOCK_T]
                    total += tl.where((offs_c == c)[None, :], part[:, None], 0.0)
                c += 1
        else:  # multiply by a 0/1 matrix; p is split in two bf16 parts, which keeps 16 bits
            member = (offs_n[:, None] >= first[None, :]) & (offs_n[:, None] < stop[None, :])
            member = tl.where(member, 1.0, 0.0).to(tl.bfloat16)  # [BLOCK_N, BLOCK_C]
            coarse = p.to(tl.bfloat16)
            fine = (p - coarse.to(tl.float32)).to(tl.bfloat16)
            if WIDE:
                coarse, fine, member = coarse.to(tl.float32), fine.to(tl.float32), member.to(tl.float32)
            total = tl.dot(coarse, member, total, input_precision="ieee")
            total = tl.dot(fine, member, total, input_precision="ieee")
        start += BLOCK_N
    return total


@triton.jit(do_not_specialize=["t", "n", "K", "tiles"])
def _affinity_kernel(
    q_ptr, f_ptr, weight_ptr, offsets_ptr, out_ptr,
    t, n, K, tiles, scale,
    stride_qt, stride_fn,
    E: tl.constexpr, WEIGHED: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Programs of the same rows are neighbours, so that they share the rows in cache.
    tile, item = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    offs_t, offs_c = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    # Group g of classes begins at row a_g, in chunk a_g // ROWS. The item of (group, chunk) is group + chunk.
    offs_g = tl.arange(0, BLOCK_G)
    mask_g = (offs_g > 0) & (offs_g * BLOCK_C < K)
    a = tl.load(offsets_ptr + offs_g * BLOCK_C, mask=mask_g, other=0)
    group = tl.sum((mask_g & (offs_g + a // ROWS <= item)).to(tl.int32), 0)
    chunk = (item - group).to(tl.int64)
    offsets_ptr += group * BLOCK_C
    count = tl.minimum(BLOCK_C, K - group * BLOCK_C)
    low = tl.maximum(chunk * ROWS, tl.load(offsets_ptr))
    high = tl.minimum(tl.minimum((chunk + 1) * ROWS, n), tl.load(offsets_ptr + count))
    rows = tl.maximum(high - low, 0).to(tl.int32)
    f_ptr += low * stride_fn
    weight_ptr += low
    total = _sums(
        q_ptr, f_ptr, weight_ptr, offsets_ptr, offs_t, low, rows, t, count, scale, stride_qt, stride_fn,
        E, WEIGHED, WIDE, EXACT, BLOCK_T, BLOCK_N, BLOCK_E, BLOCK_C,
    )  # fmt: skip
    if not EXACT:
        has_nan = tl.max((total != total).to(tl.int32), 1)  # [BLOCK_T]
        if tl.max(has_nan, 0) > 0:  # 0·∞ is NaN, but a row that is not finite may spoil its own class only
            exact = _sums(
                q_ptr, f_ptr, weight_ptr, offsets_ptr, offs_t, low, rows, t, count, scale, stride_qt, stride_fn,
                E, WEIGHED, WIDE, True, BLOCK_T, REDO, REDO, BLOCK_C,
            )  # fmt: skip
            total = tl.where((has_nan > 0)[:, None], exact, total)
    if SPLIT:
        offs = (item.to(tl.int64) * t + offs_t)[:, None] * BLOCK_C + offs_c[None, :]
        tl.store(out_ptr + offs, total, mask=(offs_t < t)[:, None] & (offs_c < BLOCK_C)[None, :])
    else:
        offs = offs_t.to(tl.int64)[:, None] * K + (group * BLOCK_C + offs_c)[None, :]
        tl.store(out_ptr + offs, total, mask=(offs_t < t)[:, None] & (offs_c < count)[None, :])


@triton.jit(do_not_specialize=["t", "n", "K", "tiles"])
def _add_kernel(
    part_ptr, offsets_ptr, out_ptr,
    t, n, K, tiles,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add the parts (items,t,BLOCK_C) of each group of classes, in the order of their rows."""
    tile, group = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    offs_t, offs_c = tile * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    offs_k = group * BLOCK_C + offs_c
    begins = tl.load(offsets_ptr + group * BLOCK_C)
    ends = tl.load(offsets_ptr + tl.minimum((group + 1) * BLOCK_C, K))
    item = group + tl.minimum(tl.maximum(begins, 0), n) // ROWS
    last = group + tl.minimum(tl.maximum(ends, 0), n) // ROWS
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    mask = (offs_t < t)[:, None] & (offs_k < K)[None, :]
    while item <= last:
        offs_i = item + tl.arange(0, BLOCK_I)
        from_ptr = part_ptr + (offs_i[:, None, None] * t + offs_t[None, :, None]) * BLOCK_C + offs_c[None, None, :]
        parts = tl.load(from_ptr, mask=(offs_i <= last)[:, None, None] & mask[None, :, :], other=0.0)
        total += tl.sum(parts, 0)
        item += BLOCK_I
    tl.store(out_ptr + offs_t.to(tl.int64)[:, None] * K + offs_k[None, :], total, mask=mask)


def config(n: int, dtype: torch.dtype) -> dict[str, int]:
    """Return rows per program, block sizes, warps and stages for n rows.

    The number of queries is not an argument, so it cannot change the result's bits.
    """
    # At least about 128 programs, as long as each of them has two tiles of rows.
    if dtype == torch.float32:  # without tensor cores, which would round the operands
        block_n, block_c = (64, 16) if n > 8192 else (32, 8)
        blocks = {"BLOCK_T": 32, "BLOCK_E": 16, "BLOCK_C": block_c, "num_warps": 4, "num_stages": 2}
    else:
        block_n = 128 if n > 16384 else 64
        blocks = {"BLOCK_T": 128, "BLOCK_E": 64, "BLOCK_C": 16, "num_warps": 8, "num_stages": 3}
    return {"ROWS": max(2 * block_n, triton.next_power_of_2(n // 128)), "BLOCK_N": block_n, **blocks}


def affinity(queries: Tensor, support: Tensor, offsets: Tensor, beta: float, weights: Tensor | None) -> Tensor:
    """Launch the kernels: (t,K) fp32, for a support whose class c has the rows from offsets[c] to offsets[c+1].

    Rows before offsets[0] and from offsets[K] on belong to no class. The interpreter multiplies in fp32, because it has
    no bf16 arithmetic.
    """
    t, classes = queries.shape[0], offsets.shape[0] - 1
    out = torch.empty(t, classes, dtype=torch.float32, device=queries.device)
    if t == 0:
        return out
    queries, support = (x if x.stride(1) == 1 else x.contiguous() for x in (queries, support))
    offsets = offsets.contiguous()
    launch, add, parts = _affinity_launches(
        queries.shape, support.shape[0], classes, queries.stride(0), support.stride(0), queries.dtype, beta,
        weights is not None,
    )  # fmt: skip
    part = out if add is None else torch.empty(parts, dtype=torch.float32, device=queries.device)
    launch(queries, support, queries if weights is None else weights.contiguous(), offsets, part)
    if add is not None:
        add(part, offsets, out)
    return out


@makes_launches
def _affinity_launches(
    shape: tuple[int, int], n: int, classes: int, stride_qt: int, stride_fn: int, dtype: torch.dtype, beta: float,
    weighed: bool,
) -> tuple[Launch, Launch | None, tuple[int, int, int]]:  # fmt: skip
    """Return the launch, the one that adds the parts, or None if there is one part, and the shape of the parts."""
    (t, width), blocks = shape, config(n, dtype)
    groups = triton.cdiv(classes, blocks["BLOCK_C"])
    items, tiles = groups + n // blocks["ROWS"], triton.cdiv(t, blocks["BLOCK_T"])
    launch = Launch(
        _affinity_kernel, (tiles * items,), t, n, classes, tiles, beta * LOG2E, stride_qt, stride_fn,
        E=width, WEIGHED=weighed, WIDE=not isinstance(_affinity_kernel, triton.JITFunction), SPLIT=items > groups,
        EXACT=dtype == torch.float32, BLOCK_G=triton.next_power_of_2(groups), **blocks,
    )  # fmt: skip
    tiles = triton.cdiv(t, 16)
    add = Launch(
        _add_kernel, (tiles * groups,), t, n, classes, tiles,
        ROWS=blocks["ROWS"], BLOCK_R=16, BLOCK_I=8, BLOCK_C=blocks["BLOCK_C"], num_warps=4,
    )  # fmt: skip
    return launch, add if items > groups else None, (items, t, blocks["BLOCK_C"])
