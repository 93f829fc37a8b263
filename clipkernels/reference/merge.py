"""ToMe's bipartite soft matching, and the merge."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkernels.reference.epilogue import Norm, norm_rows
from clipkernels.reference.precision import autocast_disabled, upcast
from clipkernels.reference.ranking import is_exporting, rows_at, strongest_first
from clipkernels.reference.targeted_l1 import may_be_true


class Match(NamedTuple):
    """kept (B,A-r) and source (B,r) index the even tokens in ascending order, target (B,r) the odd ones; int64."""

    kept: Tensor
    source: Tensor
    target: Tensor


class Merged(NamedTuple):
    """tokens (B,N-r,C), size (B,N-r) fp32 (fp64 for fp64 inputs), normed like tokens or None."""

    tokens: Tensor
    size: Tensor
    normed: Tensor | None = None


def match_tokens(metric: Tensor, r: int, prefix: int) -> Match:
    if metric.ndim == 4:
        metric = metric.detach().mean(1)
    batch, tokens = metric.shape[:2]
    # The prefix takes no part, neither as a source (even positions) nor as a target (odd ones).
    even, odd = (prefix + 1) // 2, prefix // 2
    first = torch.arange(even if r else (tokens + 1) // 2, device=metric.device).expand(batch, -1)
    if r == 0:
        return Match(first.contiguous(), first[:, :0], first[:, :0])
    with autocast_disabled(metric):
        unit = normalize(upcast(metric.detach()), dim=-1)
        similarity = unit[:, ::2][:, even:] @ unit[:, 1::2][:, odd:].mT
    similarity = similarity.nan_to_num(float("-inf"), float("inf"), float("-inf"))
    strength, nearest = similarity.max(-1)
    order = strongest_first(strength)
    source = order[:, :r].sort(-1).values
    kept = torch.cat([first, order[:, r:].sort(-1).values + even], 1)
    return Match(kept, source + even, nearest.gather(1, source) + odd)


def merge_tokens(x: Tensor, match: Match, size: Tensor | None, norm: Norm | None) -> Merged:
    even, odd = x[:, ::2], x[:, 1::2]
    wide = upcast(odd)
    weight = wide.new_ones(x.shape[:2]) if size is None else size.to(wide.dtype)
    gain = rows_at(weight[:, ::2], match.source)
    total = weight[:, 1::2] + _sum_by_target(gain[..., None], match.target, odd.shape[1])[..., 0]
    # The mean is a correction of the target, so that equal tokens merge to themselves and others stay bit-equal.
    sums = total.gather(1, match.target)
    share = gain / sums.masked_fill(sums == 0, 1)  # of two tokens of size 0 the target remains
    # A token of size 0 adds nothing to another, not even a NaN.
    hides = size is not None and may_be_true(weight == 0, x)
    if hides:
        wide = wide.masked_fill(((weight[:, 1::2] == 0) & (total > 0))[..., None], 0)
    correction = share[..., None] * (upcast(rows_at(even, match.source)) - rows_at(wide, match.target))
    if hides:
        correction = correction.masked_fill((gain == 0)[..., None], 0)
    merged = wide + _sum_by_target(correction, match.target, odd.shape[1])
    tokens = torch.cat([rows_at(even, match.kept), merged.to(x.dtype)], 1)
    return Merged(tokens, torch.cat([rows_at(weight[:, ::2], match.kept), total], 1), norm_rows(tokens, norm))


def _sum_by_target(parts: Tensor, target: Tensor, rows: int) -> Tensor:
    """Return the sums (B,rows,C) of the parts (B,r,C) by target row."""
    if not is_exporting():
        return parts.new_zeros(parts.shape[0], rows, parts.shape[2]).scatter_add(
            1, target[..., None].expand_as(parts), parts
        )
    # Exported graphs run in runtimes that are slow at scatters, so this is a product with zeros and ones. It leaves out
    # values that are not finite, because 0·NaN would spoil other rows.
    one_hot = (target[:, None] == torch.arange(rows, device=parts.device)[:, None]).to(parts.dtype)
    nonfinite = ~parts.isfinite()
    with autocast_disabled(parts):
        total, nonfinite_count = one_hot @ parts.masked_fill(nonfinite, 0), one_hot @ nonfinite.to(parts.dtype)
    return total.masked_fill(nonfinite_count > 0, float("nan"))
