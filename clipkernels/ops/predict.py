"""Scores of the patches from a trained predictor: `predict_scores`."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import reference
from clipkernels.arguments import (
    check_positive,
    check_prefix,
    check_same,
    check_tensors,
    check_tokens,
    describe,
    shape_of,
)
from clipkernels.backend import Backend
from clipkernels.custom_ops import predict as _predict
from clipkernels.messages import join_sizes
from clipkernels.reference import Mixer

# Widths of a predictor that fit into the registers of a program.
_MIXER_WIDTHS = {16, 32, 64}
# The axes of each weight of a predictor.
_MIXER: dict[str, tuple[str, ...]] = {
    "norm1_weight": ("G",),
    "norm1_bias": ("G",),
    "token_in_weight": ("Ht", "N"),
    "token_in_bias": ("Ht",),
    "token_out_weight": ("N", "Ht"),
    "token_out_bias": ("N",),
    "norm2_weight": ("G",),
    "norm2_bias": ("G",),
    "channel_in_weight": ("Hc", "G"),
    "channel_in_bias": ("Hc",),
    "channel_out_weight": ("G", "Hc"),
    "channel_out_bias": ("G",),
    "score_weight": ("G",),
    "score_bias": ("1",),
}


def predict_scores(x: Tensor, mixer: Mixer, prefix: int = 1, *, backend: Backend = "auto") -> Tensor:
    """Scores (B,P) fp32 of the patches from a small trained predictor. Larger is more important.

    Channels are pooled to G. One MLP mixes the tokens, another the channels, and a linear map scores each row:

        p = adaptive_avg_pool1d(x, G)
        p = p + token_out(gelu(token_in(norm1(p).mT))).mT
        p = p + channel_out(gelu(channel_in(norm2(p))))
        (p @ score_weight + score_bias)[:, prefix:]

    Args:
        x: (B,N,C) tokens that enter a block.
        mixer: weights for N tokens, in the dtype and on the device of x; see `ops.Mixer`.
        prefix: leading tokens that take part in the mixing but get no score.
        backend: "auto", "triton" or "reference".
    Returns:
        (B,P) fp32 (fp64 for fp64 inputs), detached.
    Raises:
        TypeError: x is no tensor, or mixer no `Mixer` of tensors.
        ValueError: shapes, dtypes or devices do not match.
    Guarantees: the GELU is exact; sums and norms in fp32; with half-precision weights the triton backend rounds the
        operands of products to that precision; deterministic; a NaN makes every score of its image NaN and changes no
        other image. A kernel exists for widths G and Ht of 16, 32 or 64 with Hc of 128 or a larger power of two; `auto`
        uses it in half precision only. Training goes through `reference.mix`, which is differentiable.
    Source: the predictor of Patch Ranking, arXiv 2409.14607.
    """
    _check_predict(x, mixer, prefix)
    pooled, token, channel = (bias.shape[0] for bias in (mixer.norm1_bias, mixer.token_in_bias, mixer.channel_in_bias))
    refusal = None
    if not ({pooled, token} <= _MIXER_WIDTHS and channel >= 128 and channel & (channel - 1) == 0):
        limits = "widths G and Ht of 16, 32 or 64 and a width Hc of 128 or a larger power of two"
        refusal = f"takes {limits}, got {pooled}, {token} and {channel}"
    elif x.dtype == torch.float32 and isinstance(backend, str) and _backend.requested_backend(backend) != "triton":
        # A prediction, not measured: no matrix unit multiplies fp32 exactly, and each image has only one program.
        refusal = "is not faster in float32"
    chosen = _backend.choose(backend, x.device, x.dtype, "predict_scores", refusal)
    run = reference.predict_scores if chosen == "reference" else _predict.predict_scores
    return run(x.detach(), reference.map_weights(mixer, lambda weight: weight.detach()), prefix)


def _check_predict(x: Tensor, mixer: Mixer, prefix: int) -> None:
    check_tokens(x)
    if not x.shape[1]:
        raise ValueError(f"x must be (B,N,C) with N of at least 1, got {shape_of(x)}")
    check_prefix(prefix, x.shape[1])
    if not isinstance(mixer, Mixer):
        raise TypeError(f"mixer must be an ops.Mixer, got {describe(mixer)}")
    check_tensors(**{name: getattr(mixer, name) for name in _MIXER})
    sizes = {"N": x.shape[1], "1": 1}
    for letter, name in (("G", "norm1_weight"), ("Ht", "token_in_bias"), ("Hc", "channel_in_bias")):
        vector = getattr(mixer, name)
        if vector.ndim != 1 or not vector.shape[0]:
            raise ValueError(f"{name} must be ({letter},) with {letter} of at least 1, got {shape_of(vector)}")
        sizes[letter] = vector.shape[0]
    for name, letters in _MIXER.items():
        weight = getattr(mixer, name)
        expected = tuple(sizes[letter] for letter in letters)
        if tuple(weight.shape) != expected:
            axes = f"({letters[0]},)" if len(letters) == 1 else f"({join_sizes(letters)})"
            raise ValueError(f"{name} must be {axes} = ({join_sizes(expected)}), got {shape_of(weight)}")
        check_same(x, **{name: weight})
    check_positive(eps=mixer.eps)
