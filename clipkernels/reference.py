"""Every operation in plain PyTorch: the definition of correct.

B batch, N tokens, P = N - prefix patches, H heads, C width, D head width. Scores and statistics are fp32 (fp64 for
fp64 inputs), ties go to the lower index, NaN counts as -inf. Arguments are validated by `clipkernels.ops`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, normalize, scaled_dot_product_attention

Norm = tuple[Tensor, Tensor, float]
Heads = Literal["mean", "rank"]
Act = Literal["quick_gelu", "gelu", "gelu_tanh"]

# Rows of attention that `received` holds at once.
ROWS = 128
# Up to so many keys CPUs run bf16 attention faster as bmm + softmax than as SDPA; fp16 runs slower so, and overflows.
EXPLICIT = 600


class Pruned(NamedTuple):
    """tokens (B,prefix+keep[+1],C), index (B,keep) int64 into the patches, ascending, normed like tokens or None."""

    tokens: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index is not missed here
    normed: Tensor | None = None


class Match(NamedTuple):
    """kept (B,A-r) and source (B,r) int64 into the even tokens, ascending; target (B,r) int64 into the odd ones."""

    kept: Tensor
    source: Tensor
    target: Tensor


class Merged(NamedTuple):
    """tokens (B,N-r,C), size (B,N-r) fp32, normed like tokens or None."""

    tokens: Tensor
    size: Tensor
    normed: Tensor | None = None


class Condensed(NamedTuple):
    """tokens (B,prefix+keep+centers+1,C), source (B,P) int64 the row that holds each patch, index (B,keep+centers)
    int64 the patch behind each kept row and each centre, normed like tokens or None."""

    tokens: Tensor
    source: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index is not missed here
    normed: Tensor | None = None


class Added(NamedTuple):
    """tokens (…,C), normed like tokens or None."""

    tokens: Tensor
    normed: Tensor | None = None


def attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, signal: str | None, prefix: int
) -> tuple[Tensor, Tensor | None]:
    bias = _bias(size)
    explicit = q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= EXPLICIT
    if explicit:
        logits = (q * q.shape[-1] ** -0.5) @ k.mT
        out = torch.softmax(logits if bias is None else logits + bias.to(q.dtype), -1) @ v
    else:
        # Every query's row named: onnxruntime's Attention, opset 23, broadcasts none.
        mask = None if bias is None else bias.to(q.dtype).expand(-1, -1, q.shape[2], -1)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if signal == "cls":
        return out, _probabilities(q[:, :, :1], k, bias)[:, :, 0, prefix:].detach()
    if signal == "received":
        return out, _received(q, k, bias)[:, prefix:].detach()
    return out, k.mean(1).detach() if signal == "keys" else None


def _bias(size: Tensor | None) -> Tensor | None:
    """What proportional attention adds to the logits of each key, (B,1,1,N), or None."""
    return None if size is None else _wide(size).log()[:, None, None, :]


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Attention (B,H,M,N) of some query rows (B,H,M,D), in fp32."""
    with _exactly(q):
        logits = _wide(q) @ _wide(k).mT * q.shape[-1] ** -0.5
    return torch.softmax(logits if bias is None else logits + bias, -1)


def _received(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Column means (B,N) of the attention over heads and queries, a block of rows at a time."""
    total = q.new_zeros(k.shape[0], k.shape[2], dtype=_wide(q).dtype)
    for start in range(0, q.shape[2], ROWS):
        total = total + _probabilities(q[:, :, start : start + ROWS], k, bias).sum((1, 2))
    return total / (q.shape[1] * q.shape[2])


def rank_tokens(q: Tensor, k: Tensor, heads: Heads, query: str, size: Tensor | None, prefix: int) -> Tensor:
    bias = _bias(size)
    if query == "all":
        return _received(q, k, bias)[:, prefix:].detach()
    return reduce_heads(_probabilities(q[:, :, :1], k, bias)[:, :, 0, prefix:], heads).detach()


def reduce_heads(scores: Tensor, heads: Heads) -> Tensor:
    """Scores (B,P) of per-head scores (B,H,P): their mean, or the mean of each head's ranks (0 weakest)."""
    if heads == "mean":
        return _wide(scores).mean(1)
    # The place in a stable descending order counts those that beat a patch; integer ranks are summed exactly.
    place = _inverse(strongest_first(scores))
    return (scores.shape[-1] - 1 - place).sum(1).to(_wide(scores).dtype) / scores.shape[1]


def strongest_first(scores: Tensor) -> Tensor:
    """Indices int64 in descending order of scores, equal ones by position, NaN as -inf."""
    scores = scores.detach().nan_to_num(float("-inf"), float("inf"), float("-inf"))
    if not torch.compiler.is_compiling():
        return scores.argsort(dim=-1, descending=True, stable=True)
    # Graphs are exported, and ONNX has no stable sort: the place of a score is the number of those that beat it.
    one, other, at = scores[..., None], scores[..., None, :], torch.arange(scores.shape[-1], device=scores.device)
    return ((other > one) | ((other == one) & (at < at[:, None]))).sum(-1).argsort(-1)


def _inverse(order: Tensor) -> Tensor:
    """The place (…,P) of each index in an order (…,P)."""
    if torch.compiler.is_compiling():  # graphs are exported, and runtimes are slow at scatters
        return order.argsort(-1)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def prune_tokens(
    x: Tensor, scores: Tensor, keep: int, fuse: bool, heads: Heads, prefix: int, norm: Norm | None
) -> Pruned:
    if scores.ndim == 3:
        scores = reduce_heads(scores, heads)
    order = strongest_first(scores)
    index = order[:, :keep].sort(-1).values
    rows = [x[:, :prefix], _rows(x, index + prefix)]
    if fuse:
        rows.append(_fused(x, scores, order[:, keep:], prefix))
    tokens = torch.cat(rows, 1)
    return Pruned(tokens, index, _norm(tokens, norm))


def _fused(x: Tensor, scores: Tensor, gone: Tensor, prefix: int) -> Tensor:
    """Σ scoreᵢ·xᵢ (B,1,C) over the patches at `gone` (B,n)."""
    weights = _wide(scores.gather(1, gone))
    # A patch that is not there (NaN, -inf) weighs nothing.
    weights = weights.masked_fill(weights.isnan() | weights.isneginf(), 0)
    dtype = torch.promote_types(weights.dtype, _wide(x).dtype)
    with _exactly(x):
        return (weights[:, None].to(dtype) @ _rows(x, gone + prefix).to(dtype)).to(x.dtype)


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
    near = _rows(x, middle + prefix)
    chosen, joined, share = _cluster(near.detach(), centers, first)
    with _exactly(x):
        merged = (share @ _wide(near)).to(x.dtype)
    tokens = torch.cat([x[:, :prefix], _rows(x, kept + prefix), merged, _fused(x, weights, gone, prefix)], 1)
    rows = torch.arange(prefix, prefix + keep, device=x.device).expand_as(kept)
    row = torch.cat([rows, joined + prefix + keep, torch.full_like(gone, prefix + keep + centers)], 1)
    index = torch.cat([kept, middle.gather(1, chosen)], 1)
    return Condensed(tokens, row.gather(1, _inverse(order)), index, _norm(tokens, norm))


def _cluster(x: Tensor, centers: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """K-centre greedy on tokens (B,M,C): the centres (B,K), the centre each token joins (B,M), and each centre's
    weights of the tokens (B,K,M), inverse to the distance and adding up to one."""
    wide, chosen = _wide(x), [torch.full((x.shape[0],), first, device=x.device)]
    distance = torch.full_like(wide[..., 0], float("inf"))  # to the nearest centre so far
    joined = torch.zeros_like(distance, dtype=torch.int64)
    for place in range(centers):
        # Differences themselves, so that a token is at distance 0 from itself; NaN is never closer.
        away = (wide - _rows(wide, chosen[place][:, None])).square().sum(-1).sqrt()
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


def match_tokens(metric: Tensor, r: int, prefix: int) -> Match:
    if metric.ndim == 4:
        metric = metric.detach().mean(1)
    batch, tokens = metric.shape[:2]
    # The prefix never merges: neither as a source (even positions) nor as a target (odd ones).
    even, odd = (prefix + 1) // 2, prefix // 2
    first = torch.arange(even if r else (tokens + 1) // 2, device=metric.device).expand(batch, -1)
    if r == 0:
        return Match(first.contiguous(), first[:, :0], first[:, :0])
    with _exactly(metric):
        unit = normalize(_wide(metric.detach()), dim=-1)
        similarity = unit[:, ::2][:, even:] @ unit[:, 1::2][:, odd:].mT
    similarity = similarity.nan_to_num(float("-inf"), float("inf"), float("-inf"))
    strength, nearest = similarity.max(-1)
    order = strongest_first(strength)
    source = order[:, :r].sort(-1).values
    kept = torch.cat([first, order[:, r:].sort(-1).values + even], 1)
    return Match(kept, source + even, nearest.gather(1, source) + odd)


def merge_tokens(x: Tensor, match: Match, size: Tensor | None, norm: Norm | None) -> Merged:
    even, odd = x[:, ::2], x[:, 1::2]
    wide = _wide(odd)
    weight = wide.new_ones(x.shape[:2]) if size is None else size.to(wide.dtype)
    gain = _rows(weight[:, ::2], match.source)
    total = weight[:, 1::2] + _sums(gain[..., None], match.target, odd.shape[1])[..., 0]
    # As a correction to the target, so that equal tokens merge to themselves and untouched ones stay bit-equal.
    share = gain / total.gather(1, match.target)
    pull = share[..., None] * (_wide(_rows(even, match.source)) - _rows(wide, match.target))
    merged = wide + _sums(pull, match.target, odd.shape[1])
    tokens = torch.cat([_rows(even, match.kept), merged.to(x.dtype)], 1)
    return Merged(tokens, torch.cat([_rows(weight[:, ::2], match.kept), total], 1), _norm(tokens, norm))


def _sums(parts: Tensor, target: Tensor, rows: int) -> Tensor:
    """The sum (B,rows,C) of those parts (B,r,C) that go to each row."""
    if not torch.compiler.is_compiling():
        return parts.new_zeros(len(parts), rows, parts.shape[2]).scatter_add(
            1, target[..., None].expand_as(parts), parts
        )
    # Graphs are exported, and runtimes are slow at scatters: a product with zeros and ones, kept clear of 0·NaN.
    goes = (target[:, None] == torch.arange(rows, device=parts.device)[:, None]).to(parts.dtype)
    wrong = ~parts.isfinite()
    with _exactly(parts):
        total, spoilt = goes @ parts.masked_fill(wrong, 0), goes @ wrong.to(parts.dtype)
    return total.masked_fill(spoilt > 0, float("nan"))


def bias_act(x: Tensor, bias: Tensor | None, act: Act) -> Tensor:
    z = x if bias is None else x + bias
    if act == "quick_gelu":
        return (z * torch.sigmoid(1.702 * z)).to(x.dtype)
    return gelu(z, approximate="tanh" if act == "gelu_tanh" else "none").to(x.dtype)


def add_norm(x: Tensor, y: Tensor, bias: Tensor | None, scale: Tensor | None, norm: Norm | None) -> Added:
    z = y if bias is None else y + bias
    tokens = x + (z if scale is None else z * scale)
    tokens = tokens.to(torch.promote_types(x.dtype, y.dtype))  # vectors may be wider
    return Added(tokens, _norm(tokens, norm))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _exactly(x: Tensor) -> torch.autocast:
    """Where scores and sums stay as wide as they are, autocast or not."""
    return torch.autocast("cuda" if x.device.type == "cuda" else "cpu", enabled=False)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows (B,n,...) of x (B,N,...) at index (B,n)."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def _norm(x: Tensor, norm: Norm | None) -> Tensor | None:
    if norm is None:
        return None
    weight, bias, eps = norm
    return layer_norm(_wide(x), x.shape[-1:], weight.to(_wide(x)), bias.to(_wide(x)), eps).to(x.dtype)
