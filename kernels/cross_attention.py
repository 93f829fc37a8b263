"""CALIP's cross-attention: patches attend to the classes, classes to the patches, and the logits of both.

    A = visual @ text.T / α;  visual' = softmax_k(A) text;  text' = softmax_p(A)ᵀ visual
    terms = pooled textᵀ,  Σ_p softmax_p(A)·⟨pooled, visual_p⟩,  (mean_p + max_p of visual') textᵀ

A program holds rows of one side and goes once over all rows of the other side with a running softmax. A tile of the
other side is both its keys and its values. For text' the sides swap. The similarities (B,P,K) never leave a program.
Terms: reads B·P·E, and K·E from cache. For each of B·P/32 tiles of patches it writes the sum and the maximum of the
rows and, for each class, the maximum similarity and two sums: 2·E + 3·K fp32 numbers. A second launch adds them in a
fixed order and multiplies by the classes. Takes 4·B·P·K·E operations. The K×K Gram matrix of the classes would save
none, because the mean uses the rows that the maximum needs anyway.
Rows: reads both sides twice, writes B·(P + K)·E; takes 8·B·P·K·E operations.
If entire rows do not fit (in fp32, which no matrix unit multiplies exactly, or with little shared memory), a program
computes a slice of E of the result, and every slice computes the similarities again.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipkernels.kernels.launch import Launch, makes_launches
from clipkernels.kernels.rank import LOG2E


@triton.jit
def _rows(
    ptr, first, rows, start,
    E: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Load rows from `first` on, columns from `start` on, [BLOCK, WIDTH]; 0 beyond either end."""
    offs_r, offs_e = tl.arange(0, BLOCK), start + tl.arange(0, WIDTH)
    mask = (first + offs_r < rows)[:, None]
    if E % WIDTH != 0:
        mask = mask & (offs_e < E)[None, :]
    x = tl.load(ptr + (first + offs_r).to(tl.int64)[:, None] * E + offs_e[None, :], mask=mask, other=0.0)
    if WIDE:
        x = x.to(tl.float32)
    return x


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit
def _store_attended(
    acc, total, out_ptr, sums_ptr, first, M, start,
    E: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Store attended rows, or their sum and their maximum."""
    offs_r, offs_e = tl.arange(0, BLOCK), start + tl.arange(0, WIDTH)
    x = acc / total[:, None]
    mask_m = (first + offs_r < M)[:, None]
    if REDUCE:
        tl.store(sums_ptr + offs_e, tl.sum(tl.where(mask_m, x, 0.0), 0), mask=offs_e < E)
        tl.store(sums_ptr + E + offs_e, tl.max(tl.where(mask_m, x, float("-inf")), 0), mask=offs_e < E)
    else:
        rows_ptr = out_ptr + tl.cast(first, tl.int64) * E + offs_r[:, None] * E + offs_e[None, :]
        tl.store(rows_ptr, x.to(out_ptr.dtype.element_ty), mask=mask_m & (offs_e < E)[None, :])


@triton.jit(do_not_specialize=["M", "N", "tiles", "slices"])
def _attend_kernel(
    q_ptr, k_ptr, pooled_ptr, out_ptr, sums_ptr, stats_ptr,
    M, N, tiles, slices, scale,
    stride_qb, stride_kb, stride_pb,
    E: tl.constexpr, REDUCE: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, REST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attend: softmax_n(q k · scale) k for M rows q and N columns k of an image; scale is in units of log2."""
    piece, batch = tl.program_id(0) % (tiles * slices), tl.program_id(0).to(tl.int64) // (tiles * slices)
    if WHOLE:
        tile, start = piece, 0
    else:
        tile, start = piece // slices, piece % slices * BLOCK_E
    q_ptr += batch * stride_qb
    k_ptr += batch * stride_kb
    first = tile * BLOCK_M
    mask_m = (first + tl.arange(0, BLOCK_M) < M)[:, None]
    stats_ptr += (batch * tiles + tile) * 3 * N + 3 * tl.arange(0, BLOCK_N)
    if WHOLE:
        q = _rows(q_ptr, first, M, 0, E, BLOCK_M, BLOCK_E, WIDE)
        if REST:
            q_rest = _rows(q_ptr, first, M, BLOCK_E, E, BLOCK_M, REST, WIDE)
    if REDUCE:
        similarity = tl.zeros([BLOCK_M], tl.float32)  # of each row to the pooled image
        for d in range(0, E, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            x = _rows(q_ptr, first, M, d, E, BLOCK_M, BLOCK_D, WIDE).to(tl.float32)
            image = tl.load(pooled_ptr + batch * stride_pb + offs_d, mask=offs_d < E, other=0.0).to(tl.float32)
            similarity += tl.sum(x * image[None, :], 1)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    if REST:
        acc_rest = tl.zeros([BLOCK_M, REST], tl.float32)
    for column in range(TILES):
        first_n = column * BLOCK_N
        offs_n = first_n + tl.arange(0, BLOCK_N)
        k = _rows(k_ptr, first_n, N, start, E, BLOCK_N, BLOCK_E, WIDE)
        if WHOLE:
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            if REST:
                k_rest = _rows(k_ptr, first_n, N, BLOCK_E, E, BLOCK_N, REST, WIDE)
                s = tl.dot(q_rest, tl.trans(k_rest), s, input_precision="ieee")
        else:
            s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for d in range(0, E, BLOCK_D):
                a = _rows(q_ptr, first, M, d, E, BLOCK_M, BLOCK_D, WIDE)
                b = _rows(k_ptr, first_n, N, d, E, BLOCK_N, BLOCK_D, WIDE)
                s = tl.dot(a, tl.trans(b), s, input_precision="ieee")
        s *= scale
        if REDUCE and start == 0:  # this tile's part of the softmax over the rows
            logits = tl.where(mask_m, s, float("-inf"))
            top = tl.max(logits, 0)
            p = tl.exp2(logits - top[None, :])
            tl.store(stats_ptr, top, mask=offs_n < N)
            mass, weighted = tl.reduce((p, p * similarity[:, None]), 0, _add)
            tl.store(stats_ptr + 1, mass, mask=offs_n < N)
            tl.store(stats_ptr + 2, weighted, mask=offs_n < N)
            stats_ptr += 3 * BLOCK_N
        s = tl.where((offs_n < N)[None, :], s, float("-inf"))
        higher = tl.maximum(most, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(most - higher)
        total = total * shrink + tl.sum(p, 1)
        most = higher
        acc = tl.dot(p.to(k.dtype), k, acc * shrink[:, None], input_precision="ieee")
        if REST:
            acc_rest = tl.dot(p.to(k.dtype), k_rest, acc_rest * shrink[:, None], input_precision="ieee")
    out_ptr += batch * M * E
    sums_ptr += (batch * tiles + tile) * 2 * E
    _store_attended(acc, total, out_ptr, sums_ptr, first, M, start, E, BLOCK_M, BLOCK_E, REDUCE)
    if REST:
        _store_attended(acc_rest, total, out_ptr, sums_ptr, first, M, BLOCK_E, E, BLOCK_M, REST, REDUCE)


@triton.jit(do_not_specialize=["B", "P", "K", "tiles"])
def _terms_kernel(
    text_ptr, pooled_ptr, sums_ptr, stats_ptr, out_ptr,
    B, P, K, tiles,
    stride_pb,
    E: tl.constexpr, TILES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute the three terms of a tile of images and classes from the numbers that each tile of patches stored."""
    offs_b = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    first_k = tl.program_id(0) % tiles * BLOCK_K
    offs_k = first_k + tl.arange(0, BLOCK_K)
    pooled_ptr += offs_b[:, None] * stride_pb
    first = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    third = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    for d in range(0, E, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask = (offs_b < B)[:, None] & (offs_d < E)[None, :]
        image = tl.load(pooled_ptr + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        most = tl.full([BLOCK_B, BLOCK_D], float("-inf"), tl.float32)
        for tile in range(TILES):
            tile_ptr = sums_ptr + ((offs_b * TILES + tile) * 2 * E)[:, None] + offs_d[None, :]
            total += tl.load(tile_ptr, mask=mask, other=0.0)
            most = tl.maximum(most, tl.load(tile_ptr + E, mask=mask, other=0.0))
        text = tl.trans(_rows(text_ptr, first_k, K, d, E, BLOCK_K, BLOCK_D, True))
        first = tl.dot(image, text, first, input_precision="ieee")
        third = tl.dot(total / P + most, text, third, input_precision="ieee")
    mask = (offs_b < B)[:, None] & (offs_k < K)[None, :]
    top = tl.full([BLOCK_B, BLOCK_K], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    second = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    for tile in range(TILES):
        tile_stats_ptr = stats_ptr + ((offs_b * TILES + tile) * K)[:, None] * 3 + offs_k[None, :] * 3
        tile_top = tl.load(tile_stats_ptr, mask=mask, other=0.0)
        higher = tl.maximum(top, tile_top)
        shrink, grow = tl.exp2(top - higher), tl.exp2(tile_top - higher)
        total = total * shrink + tl.load(tile_stats_ptr + 1, mask=mask, other=1.0) * grow
        second = second * shrink + tl.load(tile_stats_ptr + 2, mask=mask, other=0.0) * grow
        top = higher
    logits_ptr = out_ptr + offs_b[:, None] * K + offs_k[None, :]
    tl.store(logits_ptr, 100 * first, mask=mask)
    tl.store(logits_ptr + tl.cast(B, tl.int64) * K, 100 * (second / total), mask=mask)
    tl.store(logits_ptr + 2 * tl.cast(B, tl.int64) * K, 100 * third, mask=mask)


def config(columns: int, width: int, dtype: torch.dtype, shared: int) -> dict[str, int | bool]:
    """Return block sizes, warps and stages for N columns of width E and `shared` bytes of shared memory per program."""
    if dtype != torch.float32:
        # A power of two, and the next power of two for the rest: 768 is 512 and 256, 1152 is 1024 and 128.
        block_e = max(16, 1 << (width.bit_length() - 1))
        rest = max(16, triton.next_power_of_2(width - block_e)) if width > block_e else 0
        block_e, rest = (2 * block_e, 0) if rest == block_e else (block_e, rest)
        span = block_e + rest
        # The most that fits eight warps. A warp computes eight columns, so with 32 columns each is computed twice. With
        # 32 rows of 1024 no registers are left for masks or unrolling.
        wide = 1024 if width == 1024 and columns > 96 else 768
        for block_m, block_n, least, most in ((32, 64, 0, 512), (32, 32, 0, wide), (16, 32, 513, 1536)):
            for stages in (3, 2):
                size = 2 * (span * (block_m + block_n * (stages - 1)) + block_m * block_n)
                if least <= span <= most and size <= shared:
                    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_E": block_e, "REST": rest, "BLOCK_D": 64}
                    return {"WHOLE": True, **blocks, "num_warps": 8, "num_stages": stages}
        blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_E": 256, "REST": 0, "BLOCK_D": 64}
        return {"WHOLE": False, **blocks, "num_warps": 8, "num_stages": 2}
    blocks = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_E": min(128, max(16, triton.next_power_of_2(width))), "REST": 0}
    return {"WHOLE": False, **blocks, "BLOCK_D": 32, "num_warps": 8, "num_stages": 2}


def terms_config() -> dict[str, int]:
    """Return block sizes and warps of the second launch."""
    return {"BLOCK_B": 16, "BLOCK_K": 32, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}


@cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may use; on other devices than CUDA, those of an H200."""
    if device.type != "cuda":
        return 232448
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block)


def attend(rows: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """Launch the kernel: softmax(rows columnsᵀ / α) columns, (B,M,E); a side of two axes is shared by all images."""
    return _attend(rows, columns, None, alpha)[0]


def calip_terms(visual: Tensor, pooled: Tensor, text: Tensor, alpha: float) -> Tensor:
    """Launch the kernels: the three terms of the logits, each × 100, (3,B,K) fp32."""
    batch, patches, _ = visual.shape
    terms = torch.empty(3, batch, len(text), dtype=torch.float32, device=visual.device)
    if batch == 0:
        return terms
    pooled, text = pooled if pooled.stride(1) == 1 else pooled.contiguous(), text.contiguous()
    _, sums, stats = _attend(visual, text, pooled, alpha)
    launch = _terms_launch(batch, patches, text.shape, pooled.stride(0), sums.shape[1])
    launch(text, pooled, sums, stats, terms)
    return terms


def _attend(rows: Tensor, columns: Tensor, pooled: Tensor | None, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the first kernel.

    Returns the attended rows (B,M,E), or with `pooled`, for each of T tiles of rows, their sum and their maximum
    (B,T,2,E) and, for each column, the maximum similarity, the sum and the weighted sum of the exponentials (B,T,N,3).
    The results that are not computed are empty.
    """
    (m, width), n = rows.shape[-2:], columns.shape[-2]
    batch = len(rows) if rows.ndim == 3 else len(columns)
    # The rows of an image must be contiguous, because the kernel is compiled for a row stride of E.
    rows, columns = (x if x.stride()[-2:] == (width, 1) else x.contiguous() for x in (rows, columns))
    tiles, launch = _attend_launch(
        batch, (m, n, width), rows.stride(0) if rows.ndim == 3 else 0, columns.stride(0) if columns.ndim == 3 else 0,
        None if pooled is None else pooled.stride(0), rows.dtype, alpha, shared_memory(rows.device),
    )  # fmt: skip
    reduce = pooled is not None
    out = rows.new_empty((0,) if reduce else (batch, m, width))
    sums, stats = (
        torch.empty((batch, tiles, *size) if reduce else (0,), dtype=torch.float32, device=rows.device)
        for size in ((2, width), (n, 3))
    )
    if batch:
        launch(rows, columns, rows if pooled is None else pooled, out, sums, stats)
    return out, sums, stats


@makes_launches
def _attend_launch(
    batch: int, sizes: tuple[int, int, int], stride_rows: int, stride_columns: int, stride_pooled: int | None,
    dtype: torch.dtype, alpha: float, shared: int,
) -> tuple[int, Launch]:  # fmt: skip
    """Return the number of tiles of rows and the launch, for sizes (M, N, E); a stride of `pooled` if it reduces."""
    (m, n, width), blocks = sizes, config(sizes[1], sizes[2], dtype, shared)
    tiles, slices = triton.cdiv(m, blocks["BLOCK_M"]), 1 if blocks["WHOLE"] else triton.cdiv(width, blocks["BLOCK_E"])
    return tiles, Launch(
        _attend_kernel, (batch * tiles * slices,), m, n, tiles, slices, LOG2E / alpha,
        stride_rows, stride_columns, stride_pooled or 0,
        E=width, REDUCE=stride_pooled is not None, WIDE=not isinstance(_attend_kernel, triton.JITFunction),
        TILES=triton.cdiv(n, blocks["BLOCK_N"]), **blocks,
    )  # fmt: skip


@makes_launches
def _terms_launch(batch: int, patches: int, shape: tuple[int, int], stride_pooled: int, parts: int) -> Launch:
    """Return the launch that adds the numbers of `parts` tiles of patches, for classes (K,E)."""
    (classes, width), blocks = shape, terms_config()
    tiles = triton.cdiv(classes, blocks["BLOCK_K"])
    return Launch(
        _terms_kernel, (triton.cdiv(batch, blocks["BLOCK_B"]) * tiles,), batch, patches, classes, tiles, stride_pooled,
        E=width, TILES=parts, **blocks,
    )  # fmt: skip
