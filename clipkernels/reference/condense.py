"""TCA's condensation: keep the best patches, cluster the next best, fuse the rest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clipkernels.reference.epilogue import Norm, norm_rows
from clipkernels.reference.precision import autocast_disabled, upcast
from clipkernels.reference.prune import fuse_rows
from clipkernels.reference.ranking import Heads, inverse_of, reduce_heads, rows_at, strongest_first


class Condensed(NamedTuple):
    """tokens (B,prefix+keep+centers+1,C), source (B,P) int64, the row that contains each patch, index (B,keep+centers)
    int64, the patch of each kept row and each centre, normed like tokens or None."""

    tokens: Tensor
    source: Tensor
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which no caller needs
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
    best, middle, rest = order[:, :keep], order[:, keep : keep + merge], order[:, keep + merge :]
    candidates = rows_at(x, middle + prefix)
    center, cluster = _cluster(candidates.detach(), centers, first)
    with autocast_disabled(x):
        merged = _means(candidates, center, cluster).to(x.dtype)
    tokens = torch.cat([x[:, :prefix], rows_at(x, best + prefix), merged, fuse_rows(x, weights, rest, prefix)], 1)
    rows = torch.arange(prefix, prefix + keep, device=x.device).expand_as(best)
    row = torch.cat([rows, cluster + prefix + keep, torch.full_like(rest, prefix + keep + centers)], 1)
    index = torch.cat([best, middle.gather(1, center)], 1)
    return Condensed(tokens, row.gather(1, inverse_of(order)), index, norm_rows(tokens, norm))


def _cluster(x: Tensor, centers: int, first: int) -> tuple[Tensor, Tensor]:
    """Run K-centre greedy on tokens (B,M,C): return the centres (B,K) and the centre that each token joins (B,M)."""
    wide, next_center = upcast(x), torch.full((x.shape[0],), first, device=x.device)
    distance = torch.full_like(wide[..., 0], float("inf"))  # to the nearest centre so far
    cluster = torch.zeros_like(distance, dtype=torch.int64)
    chosen: list[Tensor] = []
    for number in range(centers):
        chosen.append(next_center)
        # From differences, so that a token is at distance 0 from itself. A NaN is never closer.
        distance_to_center = (wide - rows_at(wide, next_center[:, None])).square().sum(-1).sqrt()
        closer = distance_to_center < distance
        cluster, distance = cluster.masked_fill(closer, number), torch.where(closer, distance_to_center, distance)
        next_center = distance.argmax(1)
    return torch.stack(chosen, 1), cluster


def _means(x: Tensor, center: Tensor, cluster: Tensor) -> Tensor:
    """Return each centre's token (B,K,C): the mean of its tokens among (B,M,C), weighted by the inverse distance."""
    wide, centers = upcast(x), center.shape[1]
    apart = wide - rows_at(wide, center.gather(1, cluster))
    squares = apart.detach().square().sum(-1)
    at_center, is_far = squares == 0, ~squares.isfinite()  # a NaN is farthest
    # Inverse distances are the exponentials of these logits: the gradient of a softmax neither divides nor multiplies
    # tiny numbers. A weight of 1 at distance 0 is a constant, because the norm of 0 has no gradient.
    logits = -torch.linalg.vector_norm(apart.masked_fill((at_center | is_far)[..., None], 1), dim=-1).log()
    logits = logits.masked_fill(at_center, 0).masked_fill(is_far, float("-inf"))
    logits = logits[:, None].masked_fill(
        cluster[:, None] != torch.arange(centers, device=x.device)[:, None], float("-inf")
    )
    is_empty = logits.isneginf().all(2, keepdim=True)
    shares = logits.masked_fill(is_empty, 0).softmax(2)
    # A token that is not finite has no share in any mean, but 0·NaN would spoil them all.
    means = shares @ wide.masked_fill(~wide.isfinite(), 0)
    # A centre that no token joins coincides with another one, or is not finite. It yields its own token.
    return torch.where(is_empty, rows_at(wide, center), means)
