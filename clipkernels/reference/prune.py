"""Pruning: keep the best patches, drop the others or fuse them into one token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clipkernels.reference.epilogue import Norm, norm_rows
from clipkernels.reference.precision import autocast_disabled, upcast
from clipkernels.reference.ranking import Heads, reduce_heads, rows_at, strongest_first
from clipkernels.reference.targeted_l1 import may_be_true


class Pruned(NamedTuple):
    """tokens (B,prefix+keep[+1],C), index (B,keep) int64, the kept patches ascending, normed like tokens or None."""

    tokens: Tensor
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which no caller needs
    normed: Tensor | None = None


def prune_tokens(
    x: Tensor, scores: Tensor, keep: int, fuse: bool, heads: Heads, prefix: int, norm: Norm | None
) -> Pruned:
    if scores.ndim == 3:
        scores = reduce_heads(scores, heads)
    order = strongest_first(scores)
    index = order[:, :keep].sort(-1).values
    rows = [x[:, :prefix], rows_at(x, index + prefix)]
    if fuse:
        rows.append(fuse_rows(x, scores, order[:, keep:], prefix))
    tokens = torch.cat(rows, 1)
    return Pruned(tokens, index, norm_rows(tokens, norm))


def fuse_rows(x: Tensor, scores: Tensor, patches: Tensor, prefix: int) -> Tensor:
    """Return Σ scoreᵢ·xᵢ (B,1,C) over the patches with indices `patches` (B,n)."""
    weights = upcast(scores.gather(1, patches))
    # NaN and -inf mark a patch that does not exist, so it must not contribute.
    weights = weights.masked_fill(weights.isnan() | weights.isneginf(), 0)
    dtype = torch.promote_types(weights.dtype, upcast(x).dtype)
    rows = hide_unweighed(rows_at(x, patches + prefix).to(dtype), weights)
    with autocast_disabled(x):
        return (weights[:, None].to(dtype) @ rows).to(x.dtype)


def hide_unweighed(x: Tensor, weights: Tensor) -> Tensor:
    """Return rows x (B,n,C) with zeros for values that are not finite in rows of weight 0; weights (B,n).

    A product would not do, because 0·NaN is NaN. Finite values stay, because the gradient of a weight needs them.
    """
    absent = weights == 0
    return x.masked_fill(absent[..., None] & ~x.isfinite(), 0) if may_be_true(absent, x, weights) else x
