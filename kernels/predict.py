"""Predict: a small MLP-Mixer on pooled channels scores every patch, with one program per image.

    p = pool(x) [N, G];  p += W₂ gelu(W₁ LN(p));  p += gelu(LN(p) V₁ᵀ) V₂ᵀ;  score = p · w

W acts along the tokens, V along the channels. There are two loops over tiles of tokens: the first pools channels and
accumulates the hidden tokens [Ht, G], which depend on all tokens; the second computes the rest row by row.
Reads N·C of x and writes N - prefix scores. The pooled tokens, N·G fp32, are written and read again from cache, and the
channel weights are read from cache for every tile. Takes N·(C·G + 2·Ht·G + 2·G·Hc) products. The first C·G of them
pool: they multiply x by zeros and ones, and the sums are divided by the size of a bin, so that loads of rows are wide
for any C/G and bins may overlap. One launch, no atomics. A score depends only on its image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipkernels.kernels.launch import Launch, makes_launches


@triton.jit
def _pool(
    x_ptr, offs_n, N, stride_xn,
    C: tl.constexpr, G: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return means of channels over bins ⌊g·C/G⌋ to ⌈(g+1)·C/G⌉ for a tile of tokens, [BLOCK_N, G]; 0 beyond N."""
    offs_g = tl.arange(0, G)
    low, high = offs_g * C // G, ((offs_g + 1) * C + G - 1) // G
    row_ptr = x_ptr + offs_n.to(tl.int64)[:, None] * stride_xn
    acc = tl.zeros([BLOCK_N, G], tl.float32)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask = (offs_n < N)[:, None] & (offs_c < C)[None, :]
        x = tl.load(row_ptr + offs_c[None, :], mask=mask, other=0.0)
        if WIDE:
            x = x.to(tl.float32)
        member = (offs_c[:, None] >= low[None, :]) & (offs_c[:, None] < high[None, :])  # [BLOCK_C, G]
        acc = tl.dot(x, member.to(x.dtype), acc, input_precision="ieee")
    return acc / (high - low).to(tl.float32)[None, :]


@triton.jit
def _normed(p, weight_ptr, bias_ptr, eps, G: tl.constexpr):
    """Return the LayerNorm of rows [BLOCK_N, G]."""
    offs_g = tl.arange(0, G)
    centred = p - (tl.sum(p, 1) / G)[:, None]
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / G + eps)
    weight, bias = tl.load(weight_ptr + offs_g).to(tl.float32), tl.load(bias_ptr + offs_g).to(tl.float32)
    return centred * rstd[:, None] * weight[None, :] + bias[None, :]


@triton.jit
def _gelu(x):
    return x * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)))


@triton.jit
def _matrix(ptr, offs_r, rows, offs_c, columns, stride, WIDE: tl.constexpr):
    """Load a tile of a weight, 0 beyond its ends."""
    mask = (offs_r < rows)[:, None] & (offs_c < columns)[None, :]
    weight = tl.load(ptr + offs_r[:, None] * stride + offs_c[None, :], mask=mask, other=0.0)
    if WIDE:
        weight = weight.to(tl.float32)
    return weight


@triton.jit(do_not_specialize=["N", "prefix"])
def _predict_kernel(
    x_ptr, norm1_weight_ptr, norm1_bias_ptr, token_in_weight_ptr, token_in_bias_ptr, token_out_weight_ptr,
    token_out_bias_ptr, norm2_weight_ptr, norm2_bias_ptr, channel_in_weight_ptr, channel_in_bias_ptr,
    channel_out_weight_ptr, channel_out_bias_ptr, score_weight_ptr, score_bias_ptr, pooled_ptr, scores_ptr,
    N, prefix, eps,
    stride_xb, stride_xn,
    C: tl.constexpr, G: tl.constexpr, HT: tl.constexpr, HC: tl.constexpr, WIDE: tl.constexpr, TILES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    x_ptr += batch * stride_xb
    pooled_ptr += batch * N * G
    scores_ptr += batch * (N - prefix)
    offs_g, offs_t = tl.arange(0, G), tl.arange(0, HT)
    hidden = tl.zeros([HT, G], tl.float32)
    for tile in range(TILES):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        p = _pool(x_ptr, offs_n, N, stride_xn, C, G, WIDE, BLOCK_N, BLOCK_C)
        tl.store(pooled_ptr + offs_n[:, None] * G + offs_g[None, :], p, mask=(offs_n < N)[:, None])
        normed = _normed(p, norm1_weight_ptr, norm1_bias_ptr, eps, G)
        token_in = _matrix(token_in_weight_ptr, offs_t, HT, offs_n, N, N, WIDE)  # [HT, BLOCK_N]
        hidden = tl.dot(token_in, normed.to(token_in.dtype), hidden, input_precision="ieee")
    hidden = _gelu(hidden + tl.load(token_in_bias_ptr + offs_t).to(tl.float32)[:, None])
    tl.debug_barrier()  # the pooled tokens that a thread reads next were stored by others
    for tile in range(TILES):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        p = tl.load(pooled_ptr + offs_n[:, None] * G + offs_g[None, :], mask=(offs_n < N)[:, None], other=0.0)
        p += tl.load(token_out_bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[:, None]
        token_out = _matrix(token_out_weight_ptr, offs_n, N, offs_t, HT, HT, WIDE)  # [BLOCK_N, HT]
        p = tl.dot(token_out, hidden.to(token_out.dtype), p, input_precision="ieee")
        normed = _normed(p, norm2_weight_ptr, norm2_bias_ptr, eps, G).to(token_out.dtype)
        p += tl.load(channel_out_bias_ptr + offs_g).to(tl.float32)[None, :]
        for start in range(0, HC, BLOCK_H):
            offs_h = start + tl.arange(0, BLOCK_H)
            channel_in = _matrix(channel_in_weight_ptr, offs_h, HC, offs_g, G, G, WIDE)  # [BLOCK_H, G]
            inner = tl.dot(normed, tl.trans(channel_in), input_precision="ieee")
            inner = _gelu(inner + tl.load(channel_in_bias_ptr + offs_h).to(tl.float32)[None, :])
            channel_out = _matrix(channel_out_weight_ptr, offs_g, G, offs_h, HC, HC, WIDE)  # [G, BLOCK_H]
            p = tl.dot(inner.to(channel_out.dtype), tl.trans(channel_out), p, input_precision="ieee")
        score = tl.sum(p * tl.load(score_weight_ptr + offs_g).to(tl.float32)[None, :], 1)
        score += tl.load(score_bias_ptr).to(tl.float32)
        tl.store(scores_ptr + offs_n - prefix, score, mask=(offs_n >= prefix) & (offs_n < N))


def config(tokens: int, hidden: int, dtype: torch.dtype) -> dict[str, int]:
    """Return block sizes, warps and stages for N tokens and Hc hidden channels."""
    if dtype == torch.float32:
        return {"BLOCK_N": 32, "BLOCK_C": 32, "BLOCK_H": min(32, hidden), "num_warps": 8, "num_stages": 2}
    # Every tile computes the bins of all channels again, so tiles are large.
    block_n, block_c = (64, 128) if tokens <= 64 else (128, 64)
    return {"BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_H": min(64, hidden), "num_warps": 8, "num_stages": 3}


def predict_scores(x: Tensor, weights: list[Tensor], eps: float, prefix: int) -> Tensor:
    """Launch the kernel: scores (B,P) fp32 of tokens (B,N,C), for the weights of a `reference.Mixer` in its order."""
    batch, tokens, _ = x.shape
    scores = torch.empty(batch, tokens - prefix, dtype=torch.float32, device=x.device)
    if scores.numel() == 0:
        return scores
    sizes = (weights[0].shape[0], weights[2].shape[0], weights[8].shape[0])
    x = x if x.stride(2) == 1 else x.contiguous()
    pooled = torch.empty(batch, tokens, sizes[0], dtype=torch.float32, device=x.device)
    launch = _predict_launch(x.shape, x.stride(), x.dtype, sizes, eps, prefix)
    launch(x, *(weight.contiguous() for weight in weights), pooled, scores)
    return scores


@makes_launches
def _predict_launch(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, sizes: tuple[int, int, int], eps: float,
    prefix: int,
) -> Launch:  # fmt: skip
    (batch, tokens, width), (channels, token, hidden) = shape, sizes
    blocks = config(tokens, hidden, dtype)
    return Launch(
        _predict_kernel, (batch,), tokens, prefix, eps, *stride[:2], C=width, G=channels, HT=token, HC=hidden,
        WIDE=not isinstance(_predict_kernel, triton.JITFunction), TILES=triton.cdiv(tokens, blocks["BLOCK_N"]),
        **blocks,
    )  # fmt: skip
