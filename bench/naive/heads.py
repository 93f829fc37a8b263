"""The formulas of CALIP, Tip-Adapter and TIP-X as they are published, everything whole in memory: what ours are timed
against."""

from __future__ import annotations

import torch
from torch import Tensor


def calip_logits(visual: Tensor, pooled: Tensor, text: Tensor, alpha: float, beta2: float, beta3: float) -> Tensor:
    """CALIP's logits (B,K) of patches (B,P,E), images (B,E) and classes (K,E)."""
    similar = torch.einsum("bpe,ke->bpk", visual, text)
    seen = torch.einsum("bpk,bpe->bke", (similar / alpha).softmax(1), visual)
    found = torch.einsum("bpk,ke->bpe", (similar / alpha).softmax(2), text)
    both = found.mean(1) + found.amax(1)
    return 100 * (pooled @ text.T + beta2 * torch.einsum("be,bke->bk", pooled, seen) + beta3 * both @ text.T)


def affinity(queries: Tensor, support: Tensor, one_hot: Tensor, beta: float) -> Tensor:
    """Tip-Adapter's votes (t,K) of a support (n,E) and its classes (n,K)."""
    return (-beta * (1 - queries @ support.T)).exp() @ one_hot


def likeness(queries: Tensor, text: Tensor, others: Tensor, one_hot: Tensor, tau: float) -> Tensor:
    """TIP-X's -KL(query ‖ support), summed by class (t,K), one query after another; others (n,K) is the logarithm of
    the support's softmax over the classes."""
    own = (queries @ text.T / tau).softmax(1)
    apart = torch.stack([(row * (row.log() - others)).sum(1) for row in own])
    return -apart @ one_hot
