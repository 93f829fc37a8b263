"""What a tower does with its tokens: attention and its signals, predicted scores, prune, condense, match and merge."""

from __future__ import annotations

from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import checks, reference
from clipkernels.backend import Backend
from clipkernels.custom_ops import attention as _attention
from clipkernels.custom_ops import condense as _condense
from clipkernels.custom_ops import merge as _merge
from clipkernels.custom_ops import predict as _predict
from clipkernels.custom_ops import prune as _prune
from clipkernels.plan import Signal
from clipkernels.reference import Condensed, Heads, Match, Merged, Mixer, Norm, Pruned

# Head widths past this would spill: they take SDPA.
_HEAD_WIDTH = 128
# Widths of a predictor that a program's registers hold.
_MIXER_WIDTHS = {16, 32, 64}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    signal: Signal | None = None,
    prefix: int = 1,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Non-causal attention, and the signal that ranks or matches its tokens.

        out = softmax(q @ k.mT / D**0.5 + size.log()[:, None, None]) @ v

    Args:
        q: (B,H,M,D) queries, M = N, or fewer leading rows where only those are wanted.
        k: (B,H,N,D) keys.
        v: (B,H,N,D) values.
        size: (B,N) patches behind each token, whose logarithm is added to the logits of that key; None is all ones.
        signal: "cls", the first query's softmax over all N keys without the prefix columns, (B,H,P) fp32;
            "received", the mean attention each patch receives over heads and queries, (B,P) fp32, M = N;
            "keys", the mean of k over heads, (B,N,D) in its dtype; None.
        prefix: leading tokens that get no score.
        backend: "auto", "triton" or "reference".
    Returns:
        out (B,H,M,D), and the signal, detached, or None.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming what was expected and what came.
    Guarantees: the N×N attention is never whole in memory for a signal; signals accumulate in fp32. On the CPU in bf16,
        up to 600 keys, where SDPA is slower, `out` rounds logits and probabilities to bf16: many times SDPA's error
        where logits are large. On a GPU `auto` is SDPA beside a score kernel wherever that is expected to be faster,
        and always if a gradient is wanted; one fused launch, with the same bits for an image in any batch, is
        backend="triton".
    Source: the size bias is ToMe's proportional attention, arXiv 2210.09461, section 3.
    """
    checks.check_attention(q, k, v, size, signal, prefix)
    chosen = _heads_backend(backend, q, "attention")
    if chosen == "reference":
        return reference.attention(q, k, v, size, signal, prefix)
    # Until measured: SDPA and a score kernel, unless a bias by size slows SDPA or a second kernel needs QKᵀ again.
    better = q.dtype != torch.float32 and (size is not None or signal == "received")
    fused = better or _backend.asked(backend) == "triton"
    return _attention.attention(q, k, v, size, signal, prefix, fused)


def rank_tokens(
    q: Tensor,
    k: Tensor,
    heads: Heads = "mean",
    query: Literal["cls", "all"] = "cls",
    size: Tensor | None = None,
    prefix: int = 1,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Scores (B,P) fp32 of the patches, larger is more important: an attention signal reduced over heads.

    Args:
        q: (B,H,M,D) queries.
        k: (B,H,N,D) keys.
        heads: "mean" of the heads' scores, or "rank": per head the number of patches a patch beats (of two equal
            scores the lower index beats the higher), summed exactly over heads and divided by H.
        query: "cls", the first query's attention, or "all", the mean over all queries (M = N, heads="mean").
        size: (B,N) or None, as in `attention`.
        prefix: leading tokens that get no score.
        backend: "auto", "triton" or "reference".
    Returns:
        (B,P) fp32 (fp64 for fp64 inputs), detached.
    Raises:
        ValueError: shapes or choices that do not fit.
    Source: "mean" EViT, arXiv 2202.07800, section 3.2; "rank" TCA, arXiv 2410.14729.
    """
    checks.check_rank(q, k, heads, query, size, prefix)
    chosen = _heads_backend(backend, q, "rank_tokens")
    run = reference.rank_tokens if chosen == "reference" else _attention.rank_tokens
    return run(q, k, heads, query, size, prefix)


def predict_scores(x: Tensor, mixer: Mixer, prefix: int = 1, *, backend: Backend = "auto") -> Tensor:
    """Scores (B,P) fp32 of the patches by a small trained predictor, larger is more important.

    Channels are pooled to G; one MLP mixes the tokens, one the channels, and a linear map makes a score of each row:

        p = adaptive_avg_pool1d(x, G)
        p = p + token_out(gelu(token_in(norm1(p).mT))).mT
        p = p + channel_out(gelu(channel_in(norm2(p))))
        (p @ score_weight + score_bias)[:, prefix:]

    Args:
        x: (B,N,C) tokens that enter a block.
        mixer: weights for these N tokens, in the dtype of x and on its device; see `ops.Mixer`.
        prefix: leading tokens that are mixed in but get no score.
        backend: "auto", "triton" or "reference".
    Returns:
        (B,P) fp32 (fp64 for fp64 inputs), detached.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    Guarantees: the GELU is exact; sums and norms in fp32, products of halves from operands rounded to halves on the
        triton backend; deterministic; a NaN spoils every score of its image and no other. Widths G and Ht of 16, 32
        or 64 with an Hc of 128 or a larger power of two have a kernel, which `auto` takes for halves alone. What is
        trained is `reference.mix`, which is differentiable.
    Source: the predictor of Patch Ranking, arXiv 2409.14607.
    """
    checks.check_predict(x, mixer, prefix)
    pooled, token, channel = (bias.shape[0] for bias in (mixer.norm1_bias, mixer.token_in_bias, mixer.channel_in_bias))
    served = {pooled, token} <= _MIXER_WIDTHS and channel >= 128 and channel & (channel - 1) == 0
    if x.dtype == torch.float32:  # until measured: no matrix unit multiplies it exactly, and an image has one program
        served = served and _backend.asked(backend) == "triton"
    name = f"predict_scores of widths {pooled}, {token} and {channel}"
    chosen = _backend.choose(backend, x.device, x.dtype, name, served)
    run = reference.predict_scores if chosen == "reference" else _predict.predict_scores
    return run(x.detach(), reference.changed(mixer, lambda weight: weight.detach()), prefix)


def prune_tokens(
    x: Tensor,
    scores: Tensor,
    keep: int,
    fuse: bool = False,
    heads: Heads = "mean",
    prefix: int = 1,
    norm: Norm | None = None,
    *,
    backend: Backend = "auto",
) -> Pruned:
    """The prefix and the `keep` best patches in their old order, optionally with the rest fused into one token.

    Args:
        x: (B,N,C) tokens.
        scores: (B,P), or per head (B,H,P), then reduced by `heads`; any float dtype.
        keep: patches kept, 0 to P.
        fuse: append Σ scoreᵢ·xᵢ over the patches not kept, not renormalised, accumulated in fp32; a patch whose score
            is NaN or -inf weighs nothing. With keep = P this is a row of zeros.
        heads: "mean" or "rank", as in `rank_tokens`.
        prefix: leading tokens always kept.
        norm: (weight (C,), bias (C,), eps): also return the LayerNorm of the result.
        backend: "auto", "triton" or "reference".
    Returns:
        Pruned(tokens (B,prefix+keep[+1],C), index (B,keep) int64 into the patches, ascending, normed).
    Raises:
        ValueError: shapes, dtypes, devices or counts that do not fit.
    Guarantees: kept rows are bit-equal copies; exactly `keep` rows whatever the scores; deterministic; differentiable
        in x and, where they weigh the fused token, in scores (B,P).
    Source: EViT, arXiv 2202.07800, section 3.2.
    """
    checks.check_prune(x, scores, keep, heads, prefix, norm)
    dtype = torch.promote_types(x.dtype, scores.dtype)
    chosen = _backend.choose(backend, x.device, dtype, "prune_tokens")
    run = reference.prune_tokens if chosen == "reference" else _prune.prune_tokens
    return run(x, scores, keep, fuse, heads, prefix, norm)


def condense_tokens(
    x: Tensor,
    scores: Tensor,
    keep: int,
    merge: int,
    centers: int,
    weights: Tensor | None = None,
    heads: Heads = "mean",
    prefix: int = 1,
    first: int = 0,
    norm: Norm | None = None,
    *,
    backend: Backend = "auto",
) -> Condensed:
    """The prefix, the `keep` best patches by descending score, the next `merge` as `centers` tokens, the rest fused.

    Centres are chosen by K-centre greedy: each next one is the patch farthest (Euclidean) from its nearest centre;
    every patch joins the nearest. A centre's token is Σ wᵢxᵢ / Σ wᵢ, wᵢ = 1/‖xᵢ-c‖, or 1 at distance 0. Equal
    distances go to the higher score, or the earlier centre; a centre that no patch joins yields its own token.

    Args:
        x: (B,N,C) tokens.
        scores: (B,P), or per head (B,H,P), then reduced by `heads`; any float dtype.
        keep: patches kept.
        merge: patches that merge, 1 to P - keep.
        centers: tokens that they become, 1 to merge.
        weights: (B,P), or (B,H,P) then averaged, of the patches in the fused token Σ weightᵢ·xᵢ, not renormalised;
            None is the reduced scores. NaN and -inf weigh nothing.
        heads: "mean" or "rank", as in `rank_tokens`.
        prefix: leading tokens always kept.
        first: the place of the first centre among the merging patches in descending score.
        norm: (weight (C,), bias (C,), eps): also return the LayerNorm of the result.
        backend: "auto", "triton" or "reference".
    Returns:
        Condensed(tokens (B,prefix+keep+centers+1,C), source (B,P) int64 the row of tokens that holds each patch,
        index (B,keep+centers) int64 the patch behind each kept row and each centre, normed).
    Raises:
        ValueError: shapes, dtypes, devices or counts that do not fit.
    Guarantees: kept rows are bit-equal copies; distances and sums in fp32, from differences, so that a centre is at
        distance 0 from itself; deterministic; differentiable in x and in what weighs the fused token, distances
        being choices.
    Source: TCA, arXiv 2410.14729, section 3.2.
    """
    checks.check_condense(x, scores, keep, merge, centers, weights, heads, prefix, first, norm)
    dtypes = (tensor.dtype for tensor in (x, scores, weights) if tensor is not None)
    dtype = reduce(torch.promote_types, dtypes)
    chosen = _backend.choose(backend, x.device, dtype, "condense_tokens")
    run = reference.condense_tokens if chosen == "reference" else _condense.condense_tokens
    return run(x, scores, keep, merge, centers, weights, heads, prefix, first, norm)


def match_tokens(metric: Tensor, r: int, prefix: int = 1, *, backend: Backend = "auto") -> Match:
    """Which r tokens merge into which: each even token's most similar odd token, the r most similar pairs.

    Tokens at even positions (A) each have an edge to their most similar token at an odd position (B), by cosine
    similarity in fp32; the r strongest edges merge. Prefix tokens neither merge nor are merged into.

    Args:
        metric: (B,N,D), normalised here; or the keys (B,H,N,D) themselves, whose mean over heads it then is.
        r: edges, 0 to (N - prefix)//2.
        prefix: leading tokens left alone.
        backend: "auto", "triton" or "reference".
    Returns:
        Match(kept (B,A-r), source (B,r), both int64 into the A tokens and ascending, target (B,r) int64 into B).
    Raises:
        ValueError: shapes or an r that do not fit.
    Source: ToMe, arXiv 2210.09461, section 3.
    """
    checks.check_match(metric, r, prefix)
    chosen = _backend.choose(backend, metric.device, metric.dtype, "match_tokens")
    return (reference.match_tokens if chosen == "reference" else _merge.match_tokens)(metric, r, prefix)


def merge_tokens(
    x: Tensor, match: Match, size: Tensor | None = None, norm: Norm | None = None, *, backend: Backend = "auto"
) -> Merged:
    """The tokens after a merge: surviving A tokens in position order, then B tokens, means weighted by size.

    Args:
        x: (B,N,C) tokens.
        match: from `match_tokens`.
        size: (B,N) patches behind each token; None is all ones.
        norm: (weight (C,), bias (C,), eps): also return the LayerNorm of the result.
        backend: "auto", "triton" or "reference".
    Returns:
        Merged(tokens (B,N-r,C), size (B,N-r) fp32, normed). Sizes add up to those of the input.
    Raises:
        ValueError: shapes or devices that do not fit.
    Guarantees: tokens that nothing merged into are bit-equal copies; equal tokens merge to themselves; fp32
        accumulation; differentiable in x.
    Source: ToMe, arXiv 2210.09461, section 3.
    """
    checks.check_merge(x, match, size, norm)
    chosen = _backend.choose(backend, x.device, x.dtype, "merge_tokens")
    return (reference.merge_tokens if chosen == "reference" else _merge.merge_tokens)(x, match, size, norm)


def _heads_backend(backend: Backend, q: Tensor, op: str) -> str:
    """The backend for queries (B,H,M,D)."""
    width = q.shape[-1]
    return _backend.choose(backend, q.device, q.dtype, f"{op} at head width {width}", width <= _HEAD_WIDTH)
