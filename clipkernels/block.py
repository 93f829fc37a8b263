"""One pre-norm transformer block with a step between its attention and its MLP, whatever library it comes from.

x = x + attention(norm1(x));  x = step(x, signal);  x = x + mlp(norm2(x))

A step that a predictor decides comes first, so that this block's attention is spared, too.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkernels import ops
from clipkernels.backend import Backend
from clipkernels.plan import Condense, Merge, Predict, Prune, Step
from clipkernels.reference import Norm


class Branch(NamedTuple):
    """What joins the residual: scale·(y + bias), y (B,M,C), bias and scale (C,) or None where y has them already."""

    y: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


class Parts(Protocol):
    """What an adapter says of a host's block. Every method reads the host's current weights.

    `fused` asks for branches whose bias and layer scale are left to the sum that follows, as far as the host allows.
    """

    @property
    def norm1(self) -> Norm | None:
        """(weight, bias, eps) of the norm before attention; None where its module must be called."""

    @property
    def norm2(self) -> Norm | None:
        """Likewise of the norm before the MLP."""

    def qkv(
        self, x: Tensor, normed: Tensor | None, rows: int | None, rope: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """norm1, unless x comes `normed`, projections, and the turns of a rotary table (…,P,2·D) that tells where the
        patches are: q (B,H,rows or N,D), k and v (B,H,N,D) of x (B,N,C)."""

    def project(self, out: Tensor, fused: bool) -> Branch:
        """The attention branch of attention's out (B,H,M,D): output projection and layer scale."""

    def mlp(self, x: Tensor, normed: Tensor | None, fused: bool) -> Branch:
        """The MLP branch of x (B,M,C): norm2, unless x comes `normed`, MLP, layer scale."""


class Predictor(Protocol):
    """What ranks patches by the tokens that enter a block."""

    def __call__(self, x: Tensor, prefix: int) -> Tensor:
        """Scores (B,P) of the patches of x (B,prefix+P,C)."""


class TokenState(NamedTuple):
    """The tokens between two blocks, and the tensors that travel with them.

    x (B,N,C): the tokens.
    normed (B,N,C): norm1 of x, where the block before has computed it, or None.
    size (B,N): patches behind each token, None before any merge.
    rope (…,P,2·D): the host's rotary table of the patches, sines then cosines, or None.
    """

    x: Tensor
    normed: Tensor | None = None
    size: Tensor | None = None
    rope: Tensor | None = None


class BlockOutput(NamedTuple):
    """The tokens that leave a block, and `to` (B,N), the row that each entering row went to (-1: gone), or None."""

    state: TokenState
    to: Tensor | None


def forward(
    parts: Parts,
    state: TokenState,
    step: Step | None,
    prefix: int,
    *,
    proportional: bool = False,
    rows: int | None = None,
    track: bool = False,
    after: Norm | None = None,
    fused: bool = False,
    anchors: Tensor | None = None,
    predictor: Predictor | None = None,
) -> BlockOutput:
    """One block.

    Args:
        parts: the host's block.
        state: the tokens that enter.
        step: the operation on the tokens, or None.
        prefix: leading tokens that no step touches.
        proportional: weigh keys by size.
        rows: compute these leading rows alone, or None for all. A step after attention is ignored then, because it
            moves no prefix token.
        track: also return the row that each row went to.
        after: norm1 of the block that follows, computed with the last sum.
        fused: sums, norms and activations run as kernels.
        anchors: (A,C) CLS tokens, rows of zeros being none. Attention sees the one most like an image's own as one more
            token, which then goes. None for no such token.
        predictor: ranks the patches for a `Predict`.
    """
    (x, normed, size, rope), to = state, None
    if isinstance(step, Predict):
        assert predictor is not None
        norm1 = parts.norm1 if fused else None
        kept = Prune(step.keep, fuse=False)
        (x, normed, size, rope), to = _prune(state, predictor(x, prefix), kept, prefix, norm1, track)
        step = None
    step = step if rows is None else None
    # Merging compares the keys themselves: their mean over heads is part of matching.
    signal = step.signal if isinstance(step, (Prune, Condense)) else None
    weights = size if proportional else None
    if anchors is None:
        q, k, v = parts.qkv(x, normed, rows, rope)
        out, scores = ops.attention(q, k, v, weights, signal, prefix)
    else:
        led = torch.cat([x, _nearest(anchors, x[:, 0])[:, None].to(x.dtype)], 1)
        q, k, v = parts.qkv(led, None, rows, None if rope is None else _unplaced(rope))
        weights = None if weights is None else torch.cat([weights, torch.ones_like(weights[:, :1])], 1)
        out, scores = ops.attention(q, k, v, weights, signal, prefix)
        out, scores = out[:, :, : x.shape[1]], None if scores is None else scores[..., :-1]
    norm2 = parts.norm2 if fused else None
    backend: Backend = "auto" if fused else "reference"
    branch = parts.project(out, fused)
    read = x if rows is None else x[:, :rows]
    x, normed = ops.add_norm(read, branch.y, branch.bias, branch.scale, None if step else norm2, backend=backend)
    if isinstance(step, Prune):
        if scores is None:
            scores = _random_scores(x.shape[1] - prefix, step.seed, x.device).expand(x.shape[0], -1)
        (x, normed, size, rope), to = _prune(TokenState(x, None, size, rope), scores, step, prefix, norm2, track)
    elif isinstance(step, Condense):
        assert scores is not None
        condensed = ops.condense_tokens(
            x, scores, step.keep, step.merge, step.centers, scores, step.heads, prefix, step.first, norm2
        )
        leading = torch.arange(prefix, device=x.device).expand(x.shape[0], -1)
        to = torch.cat([leading, condensed.source], 1) if track else None
        rope = None if rope is None else gather_rope(rope, condensed.index, unplaced=True)
        size = None if size is None else _condensed_sizes(size, condensed, prefix)
        x, normed = condensed.tokens, condensed.normed
    elif isinstance(step, Merge):
        # Only CLS may stand among the tokens that alternate: registers would end up between patches.
        lead = max(prefix - 1, 0)
        match = ops.match_tokens(k[:, :, lead:], step.r, prefix - lead)
        to = _merged_to(match, x.shape[1], lead) if track else None
        rope = None if rope is None else gather_rope(rope, _merged_from(match, x.shape[1] - lead, prefix - lead))
        rest = None if size is None else size[:, lead:]
        merged = ops.merge_tokens(x[:, lead:], match, rest, None if lead else norm2)
        x, size, normed = merged if not lead else _led_by(x[:, :lead], merged)
    branch = parts.mlp(x, normed, fused)
    x, normed = ops.add_norm(x, branch.y, branch.bias, branch.scale, after, backend=backend)
    return BlockOutput(TokenState(x, normed, size, rope), to)


def _prune(state: TokenState, scores: Tensor, step: Prune, prefix: int, norm: Norm | None, track: bool) -> BlockOutput:
    """The tokens after pruning, `normed` by the norm that follows."""
    x, _, size, rope = state
    keep, fuse = step.keep, step.fuse
    pruned = ops.prune_tokens(x, scores, keep, fuse, prefix=prefix, norm=norm)
    to = _pruned_to(pruned.index, keep, fuse, x.shape[1], prefix) if track else None
    rope = None if rope is None else gather_rope(rope, pruned.index, fuse)
    if size is not None:
        # A fused token is an ordinary patch from here on.
        size = torch.cat([size[:, :prefix], size.gather(1, pruned.index + prefix), size.new_ones(x.shape[0], fuse)], 1)
    return BlockOutput(TokenState(pruned.tokens, pruned.normed, size, rope), to)


def _led_by(leading: Tensor, merged: ops.Merged) -> tuple[Tensor, Tensor, None]:
    """Tokens and sizes of a merge with leading tokens (B,n,C) put back in front."""
    ones = merged.size.new_ones(leading.shape[:2])
    return torch.cat([leading, merged.tokens], 1), torch.cat([ones, merged.size], 1), None


def _nearest(anchors: Tensor, cls: Tensor) -> Tensor:
    """The anchor (B,C) of the largest cosine with each CLS token (B,C)."""
    with torch.autocast(cls.device.type, enabled=False):
        table = anchors.to(torch.promote_types(cls.dtype, torch.float32))
        near = normalize(cls.to(table.dtype), dim=-1) @ normalize(table, dim=-1).T
    return table[near.masked_fill((table == 0).all(-1), float("-inf")).argmax(1)]


def _condensed_sizes(size: Tensor, condensed: ops.Condensed, prefix: int) -> Tensor:
    """Sizes (B,M) after condensing: a centre stands for all that joined it, the fused token for one."""
    merged = torch.arange(condensed.tokens.shape[1] - 1, device=size.device)[:, None] == condensed.source[:, None]
    patches = (merged * size[:, None, prefix:]).sum(2)[:, prefix:]
    return torch.cat([size[:, :prefix], patches, torch.ones_like(size[:, :1])], 1)


def _unplaced(rope: Tensor) -> Tensor:
    """A rotary table (…,P,2·D) with one more row, of a token that stands for no place and so is not turned."""
    sines, cosines = rope[..., :1, :].chunk(2, -1)
    return torch.cat([rope, torch.cat([torch.zeros_like(sines), torch.ones_like(cosines)], -1)], -2)


def gather_rope(rope: Tensor, index: Tensor, unplaced: bool = False) -> Tensor:
    """The rows (B,·,P',2·D) of a rotary table (…,P,2·D) for the patches at index (B,P'), and with `unplaced` for a
    fused token."""
    batch = index.shape[0]  # len() would fix it in a graph that is exported
    rope = rope.expand(batch, *rope.shape[-3:]) if rope.ndim > 2 else rope.expand(batch, 1, *rope.shape)
    moved = rope.gather(2, index[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3]))
    return _unplaced(moved) if unplaced else moved


def _pruned_to(index: Tensor, keep: int, fuse: bool, tokens: int, prefix: int) -> Tensor:
    """Row after pruning (B,N) of each row: the fused one, or -1, for those not kept."""
    to = index.new_full((index.shape[0], tokens), prefix + keep if fuse else -1)
    to[:, :prefix] = torch.arange(prefix, device=index.device)
    rows = torch.arange(prefix, prefix + keep, device=index.device).expand_as(index)
    return to.scatter(1, index + prefix, rows)


def _merged_to(match: ops.Match, tokens: int, lead: int) -> Tensor:
    """Row after merging (B,N) of each row: a merged one shares its target's, the `lead` first ones stay."""
    batch, survivors = match.kept.shape
    device, odd = match.kept.device, (tokens - lead) // 2
    rows = [torch.arange(survivors, device=device).expand(batch, -1), survivors + match.target]
    # Kept and merged tokens are a permutation of the even ones; its inverse spares the scatter that ONNX is slow at.
    even = torch.cat(rows, 1).gather(1, torch.cat([match.kept, match.source], 1).argsort(1))
    odds = torch.arange(survivors, survivors + odd, device=device).expand(batch, -1)
    both = torch.stack([even[:, :odd], odds], 2).flatten(1)
    leading = torch.arange(-lead, 0, device=device).expand(batch, -1)
    return torch.cat([leading, both, even[:, odd:]], 1) + lead


def _merged_from(match: ops.Match, tokens: int, prefix: int) -> Tensor:
    """The patch (B,M-prefix) whose place each row after merging keeps: of a merged one, its target's."""
    odd = torch.arange(1, tokens, 2, device=match.kept.device).expand(match.kept.shape[0], -1)
    return torch.cat([2 * match.kept[:, prefix:], odd], 1) - prefix


def _random_scores(patches: int, seed: int, device: torch.device) -> Tensor:
    """Scores (1,P) fp32 of a random order that only P and the seed decide, adding up to one like attention."""
    mask, odd = 0xFFFFFFFF, 0x45D9F3B
    # An integer hash made on the device: torch's generators would need state, and a table a copy in every forward.
    bits = (torch.arange(patches, device=device) + ((seed * 0x9E3779B9 + odd) & mask)) & mask
    for _ in range(3):
        bits = ((bits ^ (bits >> 16)) * odd) & mask
    scores = ((bits ^ (bits >> 16)) >> 8).float() + 1
    return (scores / scores.sum())[None]
