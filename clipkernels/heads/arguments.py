"""Checks of the arguments of heads, and their normalisation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def check_labels(labels: Tensor, images: int, classes: int) -> Tensor:
    """The labels, if they are (n,) int64 in 0..K-1.

    Raises:
        ValueError: labels of another shape, dtype or range.
    """
    if labels.shape != (images,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be ({images},) torch.int64, got {tuple(labels.shape)} {labels.dtype}")
    if images and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        span = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"labels must be from 0 to {classes - 1}, got {span}")
    return labels


def check_not_empty(images: int) -> None:
    """Raise ValueError unless there is at least one image to fit on."""
    if not images:
        raise ValueError("features must be of at least one image, got none")


def normalize_as(x: Tensor, like: Tensor) -> Tensor:
    """L2-normalised rows in the dtype of `like`, computed in fp32 or wider."""
    return normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(like.dtype)
