"""AdamW with linear warm-up and a half cosine, whose state between two steps is three vectors and a count.

The order of an epoch depends on the seed and the number of the epoch alone, and the learning rate on the step alone, so
a checkpoint holds weights, moments and counts, and no state of a generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn


def rate_at(step: int, total: int, warmup: float) -> float:
    """The share of the learning rate in a step, from 0: linear up to 1 in the warm-up, then half a cosine to 0."""
    warm = round(warmup * total)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def generator_of(seed: int, purpose: str) -> torch.Generator:
    """A generator that depends on a seed and a purpose alone."""
    digest = sha256(f"{purpose} of {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """The values of tensors as one vector on the CPU."""
    return torch.cat([tensor.detach().flatten().cpu() for tensor in tensors])


@torch.no_grad()
def write(vector: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write the values of a vector to tensors, as `flatten` reads them."""
    for tensor, values in zip(tensors, vector.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view(tensor.shape))


def adamw(weights: Sequence[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW, whose weight decay is for matrices alone."""
    decayed = [weight for weight in weights if weight.ndim > 1]
    others = [weight for weight in weights if weight.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr)


def moments(optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], name: str) -> list[Tensor]:
    """A moment of AdamW, "exp_avg" or "exp_avg_sq", of each weight; zeros before its first step."""
    return [optimizer.state[weight].get(name, torch.zeros_like(weight)) for weight in weights]


def restore(
    optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], first: Tensor, second: Tensor, step: int
) -> None:
    """Set both moments, as vectors of `flatten`, and the step of an optimizer."""
    for name, vector in (("exp_avg", first), ("exp_avg_sq", second)):
        values = [torch.zeros_like(weight) for weight in weights]
        write(vector, values)
        for weight, moment in zip(weights, values, strict=True):
            optimizer.state[weight][name] = moment
            optimizer.state[weight]["step"] = torch.tensor(float(step))
