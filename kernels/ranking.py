"""Ranks without sorting: the position of a score is the number of scores that beat it.

    place_i = #{j : s_j > s_i or (s_j = s_i and j < i)}

Works on the scores of one image, up to a few thousand. NaN counts as -inf, and ties go to the lower index.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_scores(ptr, offs, size):
    """Load scores as fp32; -inf for NaN and beyond `size`."""
    s = tl.load(ptr + offs, mask=offs < size, other=float("-inf")).to(tl.float32)
    return tl.where(s == s, s, float("-inf"))


@triton.jit
def rank_of(ptr, offs, size, BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr):
    """Return, for each score at `offs`, the number of `size` scores that beat it."""
    own = load_scores(ptr, offs, size)
    count = tl.zeros_like(offs)
    for start in range(0, BLOCK_P, BLOCK_J):
        if start < size:
            offs_j = start + tl.arange(0, BLOCK_J)
            other = load_scores(ptr, offs_j, size)
            earlier = offs_j[:, None] < offs[None, :]  # [BLOCK_J, BLOCK_P]
            beats = (other[:, None] > own[None, :]) | ((other[:, None] == own[None, :]) & earlier)
            count += tl.sum((beats & (offs_j < size)[:, None]).to(tl.int32), 0)
    return count


@triton.jit
def reduce_heads(
    ptr, offs, size, divisor,
    H: tl.constexpr, RANK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Return the sum of H rows of scores, or of their ranks (0 is weakest), divided by `divisor`."""
    total = tl.zeros([BLOCK_P], dtype=tl.int32 if RANK else tl.float32)
    if RANK:
        for head in range(H):
            row_ptr = ptr + tl.cast(head, tl.int64) * size
            total += size - 1 - rank_of(row_ptr, offs, size, BLOCK_P, BLOCK_J)
    else:  # several rows in flight
        for start in range(0, H, BLOCK_J):
            offs_h = start + tl.arange(0, BLOCK_J)
            mask = (offs_h < H)[:, None] & (offs < size)[None, :]
            rows = tl.load(ptr + offs_h.to(tl.int64)[:, None] * size + offs[None, :], mask=mask, other=0.0)
            total += tl.sum(rows.to(tl.float32), 0)
    return tl.div_rn(total.to(tl.float32), divisor)  # rounded like the reference, because ranks divided by H may tie


def blocks(size: int) -> dict[str, int]:
    """Return block sizes and warps to rank `size` scores."""
    block_p = max(16, triton.next_power_of_2(size))
    return {"BLOCK_P": block_p, "BLOCK_J": 8, "num_warps": 8 if block_p >= 256 else 4}
