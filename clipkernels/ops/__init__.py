"""One public function per operation: validate, choose a backend, run.

B batch, N tokens, P = N - prefix patches, H heads, C width, D head width, E embedding, K classes. The first `prefix`
tokens (CLS, registers) are never scored, dropped or merged. Ties go to the lower index and NaN counts as -inf, on every
backend. Choices carry no gradient: signals, ranks and matches come back detached.
"""

from clipkernels.ops.distill import targeted_l1
from clipkernels.ops.epilogue import add_norm, bias_act
from clipkernels.ops.features import affinity, calip_logits, cross_attention
from clipkernels.ops.tokens import (
    attention,
    condense_tokens,
    match_tokens,
    merge_tokens,
    predict_scores,
    prune_tokens,
    rank_tokens,
)
from clipkernels.reference import Added, Condensed, CrossAttended, Match, Merged, Mixer, Pruned

__all__ = [
    "Added",
    "Condensed",
    "CrossAttended",
    "Match",
    "Merged",
    "Mixer",
    "Pruned",
    "add_norm",
    "affinity",
    "attention",
    "bias_act",
    "calip_logits",
    "condense_tokens",
    "cross_attention",
    "match_tokens",
    "merge_tokens",
    "predict_scores",
    "prune_tokens",
    "rank_tokens",
    "targeted_l1",
]
