"""The places of rows after a step: the row of each entering token, the patch of each leaving row, and its rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels import ops


def append_identity(rope: Tensor) -> Tensor:
    """A rotary table (…,P,2·D) and an extra row, the rotation by 0, for a token without a position."""
    sines, cosines = rope[..., :1, :].chunk(2, -1)
    return torch.cat([rope, torch.cat([torch.zeros_like(sines), torch.ones_like(cosines)], -1)], -2)


def gather_rope(rope: Tensor, index: Tensor, fused: bool = False) -> Tensor:
    """The rows (B,·,P',2·D) of a rotary table (…,P,2·D) for the patches at index (B,P').

    With `fused`, an extra row follows: the rotation by 0, for a fused token.
    """
    batch = index.shape[0]  # len() would become a constant in an exported graph
    rope = rope.expand(batch, *rope.shape[-3:]) if rope.ndim > 2 else rope.expand(batch, 1, *rope.shape)
    rows = rope.gather(2, index[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3]))
    return append_identity(rows) if fused else rows


def rows_after_pruning(index: Tensor, keep: int, fuse: bool, tokens: int, prefix: int) -> Tensor:
    """The row (B,N) of each token after pruning. A token not kept gets the fused token's row, or -1."""
    rows = index.new_full((index.shape[0], tokens), prefix + keep if fuse else -1)
    rows[:, :prefix] = torch.arange(prefix, device=index.device)
    patches = torch.arange(prefix, prefix + keep, device=index.device).expand_as(index)
    return rows.scatter(1, index + prefix, patches)


def rows_after_merging(match: ops.Match, tokens: int, lead: int) -> Tensor:
    """The row (B,N) of each token after merging. A merged token gets its target's row; the first `lead` rows stay."""
    batch, survivors = match.kept.shape
    device, odd = match.kept.device, (tokens - lead) // 2
    rows = [torch.arange(survivors, device=device).expand(batch, -1), survivors + match.target]
    # Kept and merged tokens are a permutation of the even ones. Its inverse avoids a scatter, which is slow in ONNX.
    even = torch.cat(rows, 1).gather(1, torch.cat([match.kept, match.source], 1).argsort(1))
    odds = torch.arange(survivors, survivors + odd, device=device).expand(batch, -1)
    pairs = torch.stack([even[:, :odd], odds], 2).flatten(1)
    leading = torch.arange(-lead, 0, device=device).expand(batch, -1)
    return torch.cat([leading, pairs, even[:, odd:]], 1) + lead


def patches_after_merging(match: ops.Match, tokens: int, prefix: int) -> Tensor:
    """The patch (B,M-prefix) whose position each row takes after merging; a merged token takes its target's."""
    odd = torch.arange(1, tokens, 2, device=match.kept.device).expand(match.kept.shape[0], -1)
    return torch.cat([2 * match.kept[:, prefix:], odd], 1) - prefix


def origin_of(index: Tensor, rows: Tensor, fused: int) -> Tensor:
    """The patch (B,n+1) whose position each row has: those at index (B,n), and the first patch in the fused row.

    rows (B,P): the row of each patch.
    """
    return torch.cat([index, (rows == fused).int().argmax(1, keepdim=True)], 1)
