"""Patch Ranking's predictor: one MLP-Mixer block on pooled channels scores every patch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, gelu, layer_norm, linear

from clipkernels.reference.precision import autocast_disabled, upcast


class Mixer(NamedTuple):
    """Weights in the layout of torch.nn.LayerNorm and Linear: N tokens, G pooled channels, Ht and Hc hidden units."""

    norm1_weight: Tensor  # (G,)
    norm1_bias: Tensor  # (G,)
    token_in_weight: Tensor  # (Ht,N)
    token_in_bias: Tensor  # (Ht,)
    token_out_weight: Tensor  # (N,Ht)
    token_out_bias: Tensor  # (N,)
    norm2_weight: Tensor  # (G,)
    norm2_bias: Tensor  # (G,)
    channel_in_weight: Tensor  # (Hc,G)
    channel_in_bias: Tensor  # (Hc,)
    channel_out_weight: Tensor  # (G,Hc)
    channel_out_bias: Tensor  # (G,)
    score_weight: Tensor  # (G,)
    score_bias: Tensor  # (1,)
    eps: float = 1e-5


def map_weights(mixer: Mixer, change: Callable[[Tensor], Tensor]) -> Mixer:
    """Return a mixer whose weights are the results of `change`, such as a conversion to another dtype."""
    *weights, eps = mixer  # not a slice, because torch 2.6 cannot trace a slice of a NamedTuple
    parts: list[Any] = [*[change(weight) for weight in weights], eps]
    return Mixer(*parts)


def pool_channels(x: Tensor, channels: int) -> Tensor:
    """Return the means (B,N,channels) of x (B,N,C) over bins ⌊g·C/channels⌋ to ⌈(g+1)·C/channels⌉, in fp32 or fp64."""
    if x.shape[2] % channels == 0:  # faster, and exported to ONNX as a mean
        return x.unflatten(2, (channels, -1)).mean(-1, dtype=torch.promote_types(x.dtype, torch.float32))
    return adaptive_avg_pool1d(upcast(x), channels)


def mix(pooled: Tensor, mixer: Mixer, prefix: int) -> Tensor:
    """Return the scores (B,P) of pooled tokens (B,N,G), in fp32 or fp64; differentiable in tokens and weights."""
    with autocast_disabled(pooled):
        p = upcast(pooled)
        wide = map_weights(mixer, lambda weight: weight.to(p.dtype))
        across = layer_norm(p, p.shape[-1:], wide.norm1_weight, wide.norm1_bias, wide.eps).mT
        hidden = gelu(linear(across, wide.token_in_weight, wide.token_in_bias))
        p = p + linear(hidden, wide.token_out_weight, wide.token_out_bias).mT
        along = layer_norm(p, p.shape[-1:], wide.norm2_weight, wide.norm2_bias, wide.eps)
        hidden = gelu(linear(along, wide.channel_in_weight, wide.channel_in_bias))
        p = p + linear(hidden, wide.channel_out_weight, wide.channel_out_bias)
        return p[:, prefix:] @ wide.score_weight + wide.score_bias


def predict_scores(x: Tensor, mixer: Mixer, prefix: int) -> Tensor:
    return mix(pool_channels(x, len(mixer.norm1_weight)), mixer, prefix)
