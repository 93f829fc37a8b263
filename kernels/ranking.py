"""Selection and ranks of an image's scores: the strongest ones by a threshold, the order and the ranks by a sort.

    threshold = max {t : #{i : key_i ≥ t} ≥ count};  chosen_i = key_i > threshold, or key_i = threshold and room is left

A key holds the bits of a score as an integer of the same order: NaN counts as -inf, -0 as 0. The threshold comes bit by
bit from 32 counts, so a selection takes 32·P comparisons, and ties go to the lower index by a running count. An order
takes a sort of keys packed with their indices. An image has up to a few thousand scores, which stay in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipkernels.kernels.launch import Launch, makes_launches

LOWEST_KEY = tl.constexpr(-(2**31))


@triton.jit
def load_scores(ptr, offs, size):
    """Load scores as fp32; -inf for NaN and beyond `size`."""
    s = tl.load(ptr + offs, mask=offs < size, other=float("-inf")).to(tl.float32)
    return tl.where(s == s, s, float("-inf"))


@triton.jit
def sum_heads(
    ptr, offs, size, divisor,
    H: tl.constexpr, RANKS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Return the sum of H rows of scores, or with RANKS of int32 ranks, divided by `divisor`."""
    total = tl.zeros([BLOCK_P], dtype=tl.int32 if RANKS else tl.float32)
    for start in range(0, H, BLOCK_H):  # several rows in flight
        offs_h = start + tl.arange(0, BLOCK_H)
        mask = (offs_h < H)[:, None] & (offs < size)[None, :]
        rows = tl.load(ptr + offs_h.to(tl.int64)[:, None] * size + offs[None, :], mask=mask, other=0)
        total += tl.sum(rows.to(tl.int32 if RANKS else tl.float32), 0)
    return tl.div_rn(total.to(tl.float32), divisor)  # rounded like the reference, because ranks divided by H may tie


@triton.jit
def keys_of(scores, offs, size):
    """Return int32 keys in the order of fp32 scores; beyond `size` a key below that of -inf."""
    bits = tl.where(scores == scores, scores, float("-inf")).to(tl.int32, bitcast=True)
    bits = tl.where(bits == LOWEST_KEY, 0, bits)  # -0, whose bits are those of the lowest key
    return tl.where(offs < size, bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST_KEY)


@triton.jit
def choose_strongest(keys, count):
    """Return a mask of the `count` strongest of `keys`, and for each key the number of chosen ones before it."""
    # The bits of a threshold are found from the highest down, in unsigned order. With count 0 all of them are set, and
    # no key is that high.
    bits = (keys ^ LOWEST_KEY).to(tl.uint32, bitcast=True)
    threshold, step = tl.cast(0, tl.uint32), tl.cast(0x80000000, tl.uint32)
    for _ in range(32):
        number = tl.sum((bits >= threshold + step).to(tl.int32), 0)
        threshold += tl.where(number >= count, step, 0)
        step = step >> 1
    higher, equal = (bits > threshold).to(tl.int32), (bits == threshold).to(tl.int32)
    room = count - tl.sum(higher, 0)
    running = tl.cumsum(higher + (equal << 16), 0)  # two counts in one scan, because both are below 2**16
    higher_before, equal_before = (running & 0xFFFF) - higher, (running >> 16) - equal
    chosen = (higher > 0) | ((equal > 0) & (equal_before < room))
    return chosen, higher_before + tl.minimum(equal_before, room)


@triton.jit
def _compare_and_swap(x, descending, DISTANCE: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sort every pair of elements DISTANCE apart, ascending unless `descending` is 1."""
    shape: tl.constexpr = [BLOCK_P // (2 * DISTANCE), 2, DISTANCE]
    x = tl.reshape(x, shape)
    partner = tl.broadcast_to(tl.sum(x, 1)[:, None, :], shape) - x  # exact for integers, even where the sum overflows
    is_second = tl.arange(0, 2)[None, :, None]
    swaps = (x > partner) != (tl.reshape(descending, shape) != is_second)
    return tl.reshape(tl.where(swaps, partner, x), [BLOCK_P])


@triton.jit
def sort_strongest_first(keys, offs, BLOCK_P: tl.constexpr, LOG_P: tl.constexpr):
    """Return the index of the strongest of BLOCK_P = 2**LOG_P keys, of the next one, and so on; ties ascend."""
    packed = ((~keys).to(tl.int64) << 32) | offs.to(tl.int64)
    for stage in tl.static_range(1, LOG_P + 1):  # bitonic, in instructions and in interpreted time below `tl.sort`
        descending = (offs >> stage) & 1
        for step in tl.static_range(1, stage + 1):
            packed = _compare_and_swap(packed, descending, 2 ** (stage - step), BLOCK_P)
    return (packed & 0xFFFFFFFF).to(tl.int32)


@triton.jit(do_not_specialize=["P"])
def _ranks_kernel(scores_ptr, ranks_ptr, P, BLOCK_P: tl.constexpr, LOG_P: tl.constexpr):
    row, offs = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_P)
    keys = keys_of(load_scores(scores_ptr + row * P, offs, P), offs, P)
    index = sort_strongest_first(keys, offs, BLOCK_P, LOG_P)
    tl.store(ranks_ptr + row * P + index, P - 1 - offs, mask=offs < P)


def blocks(size: int) -> dict[str, int]:
    """Return block sizes and warps to choose among `size` scores."""
    block_p = max(16, triton.next_power_of_2(size))
    # A count over several warps passes a barrier, so few scores are one warp's.
    return {"BLOCK_P": block_p, "BLOCK_H": 8, "num_warps": max(1, min(8, block_p // 256))}


def config(size: int) -> dict[str, int]:
    """Return block sizes and warps to sort `size` scores."""
    block_p = blocks(size)["BLOCK_P"]
    # An exchange between warps passes shared memory, so a warp sorts more scores than it counts.
    return {"BLOCK_P": block_p, "LOG_P": block_p.bit_length() - 1, "num_warps": max(1, min(8, block_p // 512))}


def rank_scores(scores: Tensor) -> Tensor:
    """Launch the kernel: the rank of every score in its row, (B,H,P) int32 for contiguous (B,H,P); 0 is weakest."""
    batch, heads, patches = scores.shape
    ranks = torch.empty(batch, heads, patches, dtype=torch.int32, device=scores.device)
    if ranks.numel():
        _ranks_launch(batch * heads, patches)(scores, ranks)
    return ranks


@makes_launches
def _ranks_launch(rows: int, patches: int) -> Launch:
    return Launch(_ranks_kernel, (rows,), patches, **config(patches))
