"""The scale and the bias with which a model turns cosines into logits, in every library.

logits = exp(logit_scale) · cos(image, text) + logit_bias
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class ModelLogits(NamedTuple):
    """The factor of a model's cosines, and the bias of its logits; None for a model without one, as CLIP's."""

    scale: float
    bias: float | None


def logits_of(model: Any) -> ModelLogits | None:
    """The scale and the bias of a model's logits, None for a model without a scale.

    open_clip, transformers and OpenAI's clip all hold the logarithm of the scale. It is read in the precision of the
    model.

    Raises:
        ValueError: a scale or a bias that is not one finite number.
    """
    scale = getattr(model, "logit_scale", None)
    if scale is None:
        return None
    bias = getattr(model, "logit_bias", None)
    factor = torch.as_tensor(scale).detach().double().exp()
    return ModelLogits(_number("logit_scale", factor), None if bias is None else _number("logit_bias", bias))


def _number(name: str, value: Any) -> float:
    """The value of a tensor of one element.

    Raises:
        ValueError: several elements, or one that is not finite.
    """
    tensor: Tensor = torch.as_tensor(value).detach()
    if tensor.numel() != 1 or not tensor.isfinite().all():
        raise ValueError(f"the model's {name} must be one finite number, got {tensor.tolist()!r:.100}")
    return float(tensor)
