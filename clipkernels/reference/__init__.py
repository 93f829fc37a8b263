"""Every operation in plain PyTorch: the specification of the kernels. Modules have the stems of the kernel files.

B batch, N tokens, P = N - prefix patches, H heads, C width, D head width, E embedding, K classes. Scores and statistics
are fp32 (fp64 for fp64 inputs), ties go to the lower index, NaN counts as -inf. `clipkernels.ops` validates arguments
and documents them.
"""

from clipkernels.reference.affinity import affinity, sort_by_class
from clipkernels.reference.attention import attention, rank_tokens
from clipkernels.reference.condense import Condensed, condense_tokens
from clipkernels.reference.cross_attention import CrossAttended, calip_terms, cross_attention
from clipkernels.reference.epilogue import Act, Added, Norm, add_norm, bias_act
from clipkernels.reference.merge import Match, Merged, match_tokens, merge_tokens
from clipkernels.reference.predict import Mixer, map_weights, mix, pool_channels, predict_scores
from clipkernels.reference.prune import Pruned, prune_tokens
from clipkernels.reference.ranking import Heads, reduce_heads
from clipkernels.reference.targeted_l1 import targeted_l1

__all__ = [
    "Act",
    "Added",
    "Condensed",
    "CrossAttended",
    "Heads",
    "Match",
    "Merged",
    "Mixer",
    "Norm",
    "Pruned",
    "add_norm",
    "affinity",
    "attention",
    "bias_act",
    "calip_terms",
    "map_weights",
    "condense_tokens",
    "cross_attention",
    "match_tokens",
    "merge_tokens",
    "mix",
    "pool_channels",
    "predict_scores",
    "prune_tokens",
    "rank_tokens",
    "reduce_heads",
    "sort_by_class",
    "targeted_l1",
]
