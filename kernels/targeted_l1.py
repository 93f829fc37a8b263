"""Targeted L1: distance of an instance's selected, projected tokens to a teacher's, and its gradients.

    v = P h - g;  out_b = Σ_i w_bi · ‖v_bi‖₁ / E over the selected i
    c_bi = w_bi · grad_b / E;  grad of h_bi = c_bi · sign(v_bi) P;  grad of P = Σ_bi c_bi · sign(v_bi)ᵀ h_bi

A running count of the mask turns the r selected rows of all instances into one matrix. Its tiles are full however few
tokens an instance selects, and the host need not know r. P h is never in memory; if a gradient is required, its signs
are stored, in two bits each. For the gradient of P each c·sign(v) is rounded to the input dtype, as h is, which takes
0.3 of the error budget at worst.

Reads r·(d + E) elements and writes r·E/4 bytes of signs. The gradient of h reads the signs and writes B·n·d elements,
zeros included. The gradient of P reads r·d elements and the signs, and adds up to GROUPS parts of 4·E·d bytes. Each of
the three takes 2·r·d·E operations and reads P from cache. At B = 256, n = 197, r = 79·B, d = 768, E = 512 in bf16 they
move 54, 80 and 59 MB (13, 19, 14 µs) and take 16 GFLOP (20 µs) each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipkernels.kernels.launch import Launch, makes_launches

SIGNS = tl.constexpr(16)  # signs per word
GROUPS = 8  # number of partial sums of the gradient of P
CHUNK = 512  # rows that a group processes at a time


@triton.jit(do_not_specialize=["rows"])
def _order_kernel(count_ptr, order_ptr, rows, BLOCK: tl.constexpr):
    """Store the indices of the selected rows, then those of the others, and last the number of selected rows."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    count = tl.load(count_ptr + offs, mask=offs < rows, other=0)
    before = tl.load(count_ptr + offs - 1, mask=(offs > 0) & (offs < rows), other=0)  # [BLOCK]
    total = tl.load(count_ptr + rows - 1)
    tl.store(order_ptr + tl.where(count > before, before, total + offs - count), offs, mask=offs < rows)
    tl.store(order_ptr + rows, total, mask=tl.program_id(0) == 0)


@triton.jit
def _rows(x_ptr, index, n, stride_xb, stride_xn):
    """Return pointers to rows of x (B,n,…)."""
    return x_ptr + (index // n).to(tl.int64) * stride_xb + (index % n).to(tl.int64) * stride_xn


@triton.jit
def _tile(row_ptr, offs_c, mask_r, C, WIDE: tl.constexpr):
    """Load columns of rows, 0 beyond their ends."""
    x = tl.load(row_ptr[:, None] + offs_c[None, :], mask=mask_r[:, None] & (offs_c < C)[None, :], other=0.0)
    return x.to(tl.float32) if WIDE else x


@triton.jit
def _unpack(signs_ptr, offs_r, total, start, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load signs [ROWS, COLUMNS] from column `start` on, 0 beyond the last selected row and the last column."""
    WORDS: tl.constexpr = (E + SIGNS - 1) // SIGNS
    offs_w = start // SIGNS + tl.arange(0, COLUMNS // SIGNS)
    word_ptr = signs_ptr + offs_r.to(tl.int64)[:, None] * WORDS + offs_w[None, :]
    words = tl.load(word_ptr, mask=(offs_r < total)[:, None] & (offs_w < WORDS)[None, :], other=0)
    codes = tl.reshape((words[:, :, None] >> (2 * tl.arange(0, SIGNS))[None, None, :]) & 3, [ROWS, COLUMNS])
    return ((codes & 1) - (codes >> 1)).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "n"])
def _distance_kernel(
    student_ptr, teacher_ptr, projection_ptr, order_ptr, part_ptr, signs_ptr,
    rows, n,
    stride_sb, stride_sn, stride_tb, stride_tn,
    D: tl.constexpr, E: tl.constexpr, LEARNS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Store what a tile of E contributes to the distances of a tile of selected rows, and the signs."""
    TILES: tl.constexpr = (E + BLOCK - 1) // BLOCK
    tile, first = tl.program_id(0) % TILES, tl.program_id(0) // TILES * BLOCK
    offs_r, offs_e = first + tl.arange(0, BLOCK), tile * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(order_ptr + rows)
    if first < total:
        mask_r, mask_e = offs_r < total, offs_e < E
        index = tl.load(order_ptr + offs_r, mask=mask_r, other=0)  # [BLOCK]
        row_ptr = _rows(student_ptr, index, n, stride_sb, stride_sn)
        v = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(0, D, STEP):
            offs_d = start + tl.arange(0, STEP)
            h = _tile(row_ptr, offs_d, mask_r, D, WIDE)  # [BLOCK, STEP]
            p = _tile(projection_ptr + offs_e.to(tl.int64) * D, offs_d, mask_e, D, WIDE)  # [BLOCK, STEP]
            v = tl.dot(h, tl.trans(p), v, input_precision="ieee")  # [BLOCK, BLOCK]
        g = _tile(_rows(teacher_ptr, index, n, stride_tb, stride_tn), offs_e, mask_r, E, True)  # [BLOCK, BLOCK]
        v = tl.where(mask_e[None, :], v - g, 0.0)
        tl.store(part_ptr + tile.to(tl.int64) * rows + index, tl.sum(tl.abs(v), 1), mask=mask_r)
        if LEARNS:
            codes = (v > 0).to(tl.int32) + 2 * (v < 0).to(tl.int32)
            codes = tl.reshape(codes, [BLOCK, BLOCK // SIGNS, SIGNS]) << (2 * tl.arange(0, SIGNS))[None, None, :]
            WORDS: tl.constexpr = (E + SIGNS - 1) // SIGNS
            offs_w = tile * (BLOCK // SIGNS) + tl.arange(0, BLOCK // SIGNS)
            word_ptr = signs_ptr + offs_r.to(tl.int64)[:, None] * WORDS + offs_w[None, :]
            words = tl.sum(codes, 2).to(tl.int64).to(tl.int32)  # the interpreter of triton 3.2 sums to int64
            tl.store(word_ptr, words, mask=mask_r[:, None] & (offs_w < WORDS)[None, :])


@triton.jit(do_not_specialize=["rows", "n"])
def _add_kernel(
    part_ptr, weight_ptr, mask_ptr, out_ptr, rows, n, E: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add the weighted distances of an instance, tile after tile."""
    batch = tl.program_id(0).to(tl.int64)
    weighted = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < n:
        offs_n = start + tl.arange(0, BLOCK)
        chosen = tl.load(mask_ptr + batch * n + offs_n, mask=offs_n < n, other=0) != 0  # [BLOCK]
        distance = tl.zeros([BLOCK], tl.float32)
        for tile in range(TILES):
            distance += tl.load(part_ptr + tl.cast(rows, tl.int64) * tile + batch * n + offs_n, mask=chosen, other=0.0)
        weighted += tl.load(weight_ptr + batch * n + offs_n, mask=chosen, other=0.0).to(tl.float32) * distance
        start += BLOCK
    tl.store(out_ptr + batch, tl.sum(weighted, 0) / E)


@triton.jit(do_not_specialize=["rows"])
def _student_kernel(
    signs_ptr, projection_ptr, scale_ptr, order_ptr, grad_ptr,
    rows,
    D: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a tile of rows, 0 after the last selected row."""
    TILES: tl.constexpr = (D + BLOCK - 1) // BLOCK
    tile, first = tl.program_id(0) % TILES, tl.program_id(0) // TILES * BLOCK
    offs_r, offs_d = first + tl.arange(0, BLOCK), tile * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(order_ptr + rows)
    grad = tl.zeros([BLOCK, BLOCK], tl.float32)
    if first < total:
        for start in range(0, E, STEP):
            offs_e = start + tl.arange(0, STEP)
            p = _tile(projection_ptr + offs_e.to(tl.int64) * D, offs_d, offs_e < E, D, WIDE)  # [STEP, BLOCK]
            signs = _unpack(signs_ptr, offs_r, total, start, E, BLOCK, STEP)  # [BLOCK, STEP]
            grad = tl.dot(signs.to(p.dtype), p, grad, input_precision="ieee")  # [BLOCK, BLOCK]
    index = tl.load(order_ptr + offs_r, mask=offs_r < rows, other=0)  # [BLOCK]
    scale = tl.load(scale_ptr + index, mask=offs_r < total, other=0.0)
    grad = tl.where((offs_r < total)[:, None], grad * scale[:, None], 0.0)
    rows_ptr = grad_ptr + index.to(tl.int64)[:, None] * D + offs_d[None, :]
    tl.store(rows_ptr, grad.to(grad_ptr.dtype.element_ty), mask=(offs_r < rows)[:, None] & (offs_d < D)[None, :])


@triton.jit(do_not_specialize=["rows", "n", "groups"])
def _projection_kernel(
    signs_ptr, student_ptr, scale_ptr, order_ptr, part_ptr,
    rows, n, groups,
    stride_sb, stride_sn,
    D: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Store the part of a group of rows, every `groups`-th chunk, in a tile of the gradient."""
    TILES: tl.constexpr = (D + BLOCK - 1) // BLOCK
    item, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    first = item // TILES * BLOCK
    offs_e, offs_d = first + tl.arange(0, BLOCK), item % TILES * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(order_ptr + rows)
    grad = tl.zeros([BLOCK, BLOCK], tl.float32)
    begin = group * CHUNK
    while begin < total:
        for start in range(0, CHUNK, STEP):
            offs_r = begin + start + tl.arange(0, STEP)
            mask_r = offs_r < total
            index = tl.load(order_ptr + offs_r, mask=mask_r, other=0)  # [STEP]
            h = _tile(_rows(student_ptr, index, n, stride_sb, stride_sn), offs_d, mask_r, D, WIDE)  # [STEP, BLOCK]
            scale = tl.load(scale_ptr + index, mask=mask_r, other=0.0)
            factor = _unpack(signs_ptr, offs_r, total, first, E, STEP, BLOCK) * scale[:, None]  # [STEP, BLOCK]
            factor = factor.to(student_ptr.dtype.element_ty).to(h.dtype)  # rounded even if h was widened
            grad = tl.dot(tl.trans(factor), h, grad, input_precision="ieee")  # [BLOCK, BLOCK]
        begin += groups * CHUNK
    rows_ptr = part_ptr + (group.to(tl.int64) * E + offs_e)[:, None] * D + offs_d[None, :]
    tl.store(rows_ptr, grad, mask=(offs_e < E)[:, None] & (offs_d < D)[None, :])


def config(width: int, embedding: int, dtype: torch.dtype, over_rows: bool = False) -> dict[str, int]:
    """Return the side of a tile, the elements per step of a product, warps and stages.

    The batch is not an argument, so it cannot change the result's bits.
    """
    narrow = bool(width % 8 or embedding % 8)  # loads are narrow, with an address for each element
    if narrow or dtype == torch.float32:  # fp32 has no tensor cores
        return {"BLOCK": 64, "STEP": 16, "num_warps": 8 if narrow else 4, "num_stages": 2}
    # A product over rows unpacks, scales and transposes the signs of a step in registers, so its steps are short.
    return {"BLOCK": 128, "STEP": 32 if over_rows else 64, "num_warps": 8, "num_stages": 2 if over_rows else 3}


def targeted_l1(
    student: Tensor, teacher: Tensor, projection: Tensor, weights: Tensor, mask: Tensor, learns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels: distances (B,) fp32 and, for the backward, signs (B·n,⌈E/16⌉) and order (B·n+1,) int32.

    Without `learns` the signs have no rows. The interpreter multiplies in fp32, because it has no bf16 arithmetic.
    """
    (batch, tokens, _), embedding = student.shape, teacher.shape[2]
    rows = batch * tokens
    order = torch.empty(rows + 1, dtype=torch.int32, device=student.device)
    signs = order.new_empty(rows if learns else 0, triton.cdiv(embedding, SIGNS.value))
    if rows == 0:
        return student.new_zeros(batch, dtype=torch.float32), signs, order.zero_()
    student, teacher = (x if x.stride(2) == 1 else x.contiguous() for x in (student, teacher))
    mask = mask.contiguous()
    tiles, sort, measure, add = _launches(
        student.shape, embedding, student.stride(), teacher.stride(), student.dtype, learns
    )  # fmt: skip
    out, part = (torch.empty(size, dtype=torch.float32, device=student.device) for size in (batch, (tiles, rows)))
    sort(mask.view(-1).cumsum(0, dtype=torch.int32), order)
    measure(student, teacher, projection.contiguous(), order, part, signs)
    add(part, weights.contiguous(), mask.view(torch.uint8), out)
    return out, signs, order


@makes_launches
def _launches(
    shape: tuple[int, int, int], embedding: int, stride_s: tuple[int, ...], stride_t: tuple[int, ...],
    dtype: torch.dtype, learns: bool,
) -> tuple[int, Launch, Launch, Launch]:  # fmt: skip
    """Return the number of tiles of E, and the launches that order rows, measure distances and add them."""
    (batch, tokens, width), blocks = shape, config(shape[2], embedding, dtype)
    rows, tiles = batch * tokens, triton.cdiv(embedding, blocks["BLOCK"])
    sort = Launch(_order_kernel, (triton.cdiv(rows, 1024),), rows, BLOCK=1024, num_warps=4)
    measure = Launch(
        _distance_kernel, (triton.cdiv(rows, blocks["BLOCK"]) * tiles,), rows, tokens, *stride_s[:2], *stride_t[:2],
        D=width, E=embedding, LEARNS=learns, WIDE=not isinstance(_distance_kernel, triton.JITFunction), **blocks,
    )  # fmt: skip
    add = Launch(_add_kernel, (batch,), rows, tokens, E=embedding, TILES=tiles, BLOCK=128, num_warps=4)
    return tiles, sort, measure, add


def student_gradient(projection: Tensor, scale: Tensor, signs: Tensor, order: Tensor) -> Tensor:
    """Launch the kernel: gradient (B,n,d) of student, like projection; scale (B,n) fp32 multiplies a token's signs."""
    embedding, width = projection.shape
    grad = torch.empty(*scale.shape, width, dtype=projection.dtype, device=projection.device)
    if grad.numel():
        launch = _student_launch(scale.numel(), width, embedding, projection.dtype)
        launch(signs, projection.contiguous(), scale.contiguous(), order, grad)
    return grad


@makes_launches
def _student_launch(rows: int, width: int, embedding: int, dtype: torch.dtype) -> Launch:
    blocks = config(width, embedding, dtype)
    return Launch(
        _student_kernel, (triton.cdiv(rows, blocks["BLOCK"]) * triton.cdiv(width, blocks["BLOCK"]),), rows,
        D=width, E=embedding, WIDE=not isinstance(_student_kernel, triton.JITFunction), **blocks,
    )  # fmt: skip


def projection_gradient(student: Tensor, scale: Tensor, signs: Tensor, order: Tensor, embedding: int) -> Tensor:
    """Launch the kernel: gradient (E,d) of projection, like student; scale (B,n) fp32 multiplies a token's signs."""
    batch, tokens, width = student.shape
    if batch * tokens == 0:
        return student.new_zeros(embedding, width)
    short = student.dtype == torch.float16  # its range is short, so the largest factor is scaled to 1
    if short:
        most = scale.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        scale = scale / most
    student = student if student.stride(2) == 1 else student.contiguous()
    groups, launch = _projection_launch(student.shape, embedding, student.stride(), student.dtype)
    part = torch.empty(groups, embedding, width, dtype=torch.float32, device=student.device)
    launch(signs, student, scale.contiguous(), order, part)
    return (part.sum(0) * most if short else part.sum(0)).to(student.dtype)


@makes_launches
def _projection_launch(
    shape: tuple[int, int, int], embedding: int, stride: tuple[int, ...], dtype: torch.dtype
) -> tuple[int, Launch]:
    """Return the number of groups of rows, and the launch."""
    batch, tokens, width = shape
    rows, blocks = batch * tokens, config(width, embedding, dtype, over_rows=True)
    groups = min(GROUPS, triton.cdiv(rows, CHUNK))
    tiles = triton.cdiv(embedding, blocks["BLOCK"]) * triton.cdiv(width, blocks["BLOCK"])
    return groups, Launch(
        _projection_kernel, (tiles * groups,), rows, tokens, groups, *stride[:2],
        D=width, E=embedding, WIDE=not isinstance(_projection_kernel, triton.JITFunction), CHUNK=CHUNK, **blocks,
    )  # fmt: skip
