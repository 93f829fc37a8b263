"""What heads demand of what they are given, and how they normalise it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def check_labels(labels: Tensor, images: int, classes: int) -> Tensor:
    """Labels (n,) int64 in 0..K-1.

    Raises:
        ValueError: other labels.
    """
    if labels.shape != (images,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be ({images},) torch.int64, got {tuple(labels.shape)} {labels.dtype}")
    if images and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        span = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"labels must be from 0 to {classes - 1}, got {span}")
    return labels


def check_not_empty(images: int) -> None:
    """Raises ValueError where there is no image to fit on."""
    if not images:
        raise ValueError("features must be of at least one image, got none")


def check_positive(**named: float) -> None:
    """Raises ValueError for what is no finite number above zero."""
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive, got {value!r}")


def normalize_as(x: Tensor, like: Tensor) -> Tensor:
    """Rows of length one, computed in fp32 at least, in the dtype of `like`."""
    return normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(like.dtype)
