"""Patch Ranking (arXiv 2409.14607): which patches CLIP can do without, learnt from what happens when they go.

golden_ranking   images -> the order in which their patches may go, by trying, which is slow
fit_predictor    such rankings -> a small network that ranks by what enters a block, for `ck.PatchRanking`
fit_tokens       a few labelled images -> tokens that make up for what is gone, likewise
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
