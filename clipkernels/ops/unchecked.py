"""The operations inside a tower that runs on the Triton backend, without checks of their arguments.

Patching has checked the blocks and the plan, `backend.use_kernels` has chosen the backend once for the forward, and
adapters read only weights of the right size. So these launch directly. Arguments that a called module can still get
wrong, the shape and dtype of its output, lead to the public operation, which raises the error or takes the reference.
So do more merging patches than a kernel holds.
"""

from __future__ import annotations

from torch import Tensor

from clipkernels import ops
from clipkernels.custom_ops import attention as _attention
from clipkernels.custom_ops import condense as _condense
from clipkernels.custom_ops import epilogue as _epilogue
from clipkernels.custom_ops.epilogue import bias_act
from clipkernels.custom_ops.merge import match_tokens, merge_tokens
from clipkernels.custom_ops.prune import prune_tokens
from clipkernels.ops.attention import HEAD_WIDTH, prefers_fused
from clipkernels.ops.condense import MAX_MERGE
from clipkernels.plan import Signal
from clipkernels.reference import Added, Condensed, Heads, Norm

__all__ = [
    "add_norm",
    "attention",
    "bias_act",
    "condense_tokens",
    "match_tokens",
    "merge_tokens",
    "prune_tokens",
]


def attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, signal: Signal | None, prefix: int
) -> tuple[Tensor, Tensor | None]:
    shape = k.shape
    if not (q.dtype is k.dtype is v.dtype and v.shape == shape and q.shape[3] == shape[3] <= HEAD_WIDTH):
        return ops.attention(q, k, v, size, signal, prefix)
    return _attention.attention(q, k, v, size, signal, prefix, prefers_fused(q, size, signal))


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
    run = _condense.condense_tokens if merge <= MAX_MERGE else ops.condense_tokens
    return run(x, scores, keep, merge, centers, weights, heads, prefix, first, norm)


def add_norm(x: Tensor, y: Tensor, bias: Tensor | None, scale: Tensor | None, norm: Norm | None) -> Added:
    if y.dtype is not x.dtype or y.shape != x.shape:
        return ops.add_norm(x, y, bias, scale, norm)
    return _epilogue.add_norm(x, y, bias, scale, norm)
