"""Patch Ranking (arXiv 2409.14607): learn to rank patches by how little CLIP's answer changes without them.

golden_ranking   images -> the order in which their patches may be removed, by exhaustive search, which is slow
fit_predictor    golden rankings -> a small network that ranks patches by a block's input, for `ck.PatchRanking`
fit_tokens       a few labelled images -> tokens that make up for the removed patches, for `ck.PatchRanking`
"""

from clipkernels.learn.patch_ranking.golden import golden_ranking
from clipkernels.learn.patch_ranking.predictor import Fitted, RankPredictor, fit_predictor, overlap
from clipkernels.learn.patch_ranking.rankings import Rankings
from clipkernels.learn.patch_ranking.tokens import FittedTokens, VisualTokens, fit_tokens

__all__ = [
    "Fitted",
    "FittedTokens",
    "RankPredictor",
    "Rankings",
    "VisualTokens",
    "fit_predictor",
    "fit_tokens",
    "golden_ranking",
    "overlap",
]
