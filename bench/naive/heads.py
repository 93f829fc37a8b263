"""The published formulas of CALIP, Tip-Adapter and TIP-X with every intermediate in memory, as baselines."""

from __future__ import annotations

import torch
from torch import Tensor


def calip_logits(visual: Tensor, pooled: Tensor, text: Tensor, alpha: float, beta2: float, beta3: float) -> Tensor:
    """Return CALIP's logits (B,K) of patches (B,P,E), images (B,E) and classes (K,E)."""
    similar = torch.einsum("bpe,ke->bpk", visual, text)
    visual_attended = torch.einsum("bpk,bpe->bke", (similar / alpha).softmax(1), visual)
    text_attended = torch.einsum("bpk,ke->bpe", (similar / alpha).softmax(2), text)
    pooled_attended = text_attended.mean(1) + text_attended.amax(1)
    return 100 * (
        pooled @ text.T + beta2 * torch.einsum("be,bke->bk", pooled, visual_attended) + beta3 * pooled_attended @ text.T
    )


def affinity(queries: Tensor, support: Tensor, one_hot: Tensor, beta: float) -> Tensor:
    """Return Tip-Adapter's votes (t,K) for queries (t,E), of a support (n,E) and its one-hot classes (n,K)."""
    return (-beta * (1 - queries @ support.T)).exp() @ one_hot


def likeness(queries: Tensor, text: Tensor, others: Tensor, one_hot: Tensor, tau: float) -> Tensor:
    """Return TIP-X's -KL(query ‖ support), summed by class (t,K), computed one query after another.

    `others` (n,K) is the logarithm of the support's softmax over the classes.
    """
    shares = (queries @ text.T / tau).softmax(1)
    divergences = torch.stack([(row * (row.log() - others)).sum(1) for row in shares])
    return -divergences @ one_hot
