"""CLIP-TD's distance, transcribed literally: every token is projected, and unselected tokens are multiplied by 0."""

from __future__ import annotations

from torch import Tensor


def targeted_l1(student: Tensor, teacher: Tensor, projection: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Return the distances (B,).

    Args:
        student: (B,n,d) tokens.
        teacher: (B,n,E) tokens.
        projection: (E,d).
        weights: (B,n).
        mask: (B,n), true for a selected token.
    """
    return (mask * weights * (student @ projection.T - teacher).abs().mean(2)).sum(1)
