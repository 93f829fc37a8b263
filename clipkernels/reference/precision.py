"""How wide scores and sums are: fp32, and fp64 for fp64 inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def autocast_disabled(x: Tensor) -> torch.autocast:
    """Where scores and sums stay as wide as they are, autocast or not."""
    return torch.autocast("cuda" if x.device.type == "cuda" else "cpu", enabled=False)
