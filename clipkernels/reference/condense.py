"""TCA's condensation: kept, clustered, fused."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clipkernels.reference.epilogue import Norm, normed
from clipkernels.reference.precision import autocast_disabled, upcast
from clipkernels.reference.prune import fused
from clipkernels.reference.ranking import Heads, inverse_of, reduce_heads, rows_at, strongest_first


class Condensed(NamedTuple):
    """tokens (B,prefix+keep+centers+1,C), source (B,P) int64 the row that holds each patch, index (B,keep+centers)
    int64 the patch behind each kept row and each centre, normed like tokens or None."""

    tokens: Tensor
    source: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index is not missed here
    normed: Tensor | None = None


def condense_tokens(
    x: Tensor,
    scores: Tensor,
    keep: int,
    merge: int,
    centers: int,
    weights: Tensor | None,
    heads: Heads,
    prefix: int,
    first: int,
    norm: Norm | None,
) -> Condensed:
    if weights is None:
        weights = scores if scores.ndim == 2 else reduce_heads(scores, heads)
    elif weights.ndim == 3:
        weights = reduce_heads(weights, "mean")
    order = strongest_first(scores if scores.ndim == 2 else reduce_heads(scores, heads))
    kept, middle, gone = order[:, :keep], order[:, keep : keep + merge], order[:, keep + merge :]
    near = rows_at(x, middle + prefix)
    chosen, joined, share = _cluster(near.detach(), centers, first)
    with autocast_disabled(x):
        merged = (share @ upcast(near)).to(x.dtype)
    tokens = torch.cat([x[:, :prefix], rows_at(x, kept + prefix), merged, fused(x, weights, gone, prefix)], 1)
    rows = torch.arange(prefix, prefix + keep, device=x.device).expand_as(kept)
    row = torch.cat([rows, joined + prefix + keep, torch.full_like(gone, prefix + keep + centers)], 1)
    index = torch.cat([kept, middle.gather(1, chosen)], 1)
    return Condensed(tokens, row.gather(1, inverse_of(order)), index, normed(tokens, norm))


def _cluster(x: Tensor, centers: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """K-centre greedy on tokens (B,M,C): the centres (B,K), the centre each token joins (B,M), and each centre's
    weights of the tokens (B,K,M), inverse to the distance and adding up to one."""
    wide, chosen = upcast(x), [torch.full((x.shape[0],), first, device=x.device)]
    distance = torch.full_like(wide[..., 0], float("inf"))  # to the nearest centre so far
    joined = torch.zeros_like(distance, dtype=torch.int64)
    for place in range(centers):
        # Differences themselves, so that a token is at distance 0 from itself; NaN is never closer.
        away = (wide - rows_at(wide, chosen[place][:, None])).square().sum(-1).sqrt()
        closer = away < distance
        joined, distance = joined.masked_fill(closer, place), torch.where(closer, away, distance)
        chosen.append(distance.argmax(1))
    inverse = torch.where(distance == 0, 1, 1 / distance)
    center = torch.arange(centers, device=x.device)[:, None]
    share = inverse[:, None].masked_fill(joined[:, None] != center, 0)
    # A centre that no token joins coincides with another: it yields its own token.
    own = torch.stack(chosen[:-1], 1)
    itself = (torch.arange(x.shape[1], device=x.device) == own[..., None]).to(share.dtype)
    share = torch.where(share.sum(2, keepdim=True) > 0, share, itself)
    return own, joined, share / share.sum(2, keepdim=True)
