"""CLIP-TD's distance as it reads: every token is projected, and what is not selected is multiplied by 0."""

from __future__ import annotations

from torch import Tensor


def targeted_l1(student: Tensor, teacher: Tensor, projection: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """(B,n,d), (B,n,E), (E,d), (B,n), (B,n) -> (B,)."""
    return (mask * weights * (student @ projection.T - teacher).abs().mean(2)).sum(1)
