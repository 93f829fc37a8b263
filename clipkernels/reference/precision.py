"""Precision of scores and sums: fp32, and fp64 for fp64 inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """Return x in fp32, or x itself if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()


def autocast_disabled(x: Tensor) -> torch.autocast:
    """Return a context for the device of x in which autocast does not narrow scores and sums."""
    return torch.autocast("cuda" if x.device.type == "cuda" else "cpu", enabled=False)
