"""The operations: each public function validates its arguments, chooses a backend and runs there.

B batch, N tokens, P = N - prefix patches, H heads, C width, D head width, E embedding, K classes. The first `prefix`
tokens (CLS, registers) are never scored, dropped or merged. Ties go to the lower index and NaN counts as -inf, on every
backend. Choices carry no gradient: ranks and matches are returned detached. Weights carry one: the attention that
weighs a fused token, and the distances that weigh merged ones.
"""

from clipkernels.ops.affinity import affinity
from clipkernels.ops.attention import attention, rank_tokens
from clipkernels.ops.condense import condense_tokens
from clipkernels.ops.cross_attention import calip_logits, cross_attention
from clipkernels.ops.epilogue import add_norm, bias_act
from clipkernels.ops.merge import match_tokens, merge_tokens
from clipkernels.ops.predict import predict_scores
from clipkernels.ops.prune import prune_tokens
from clipkernels.ops.targeted_l1 import targeted_l1
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
