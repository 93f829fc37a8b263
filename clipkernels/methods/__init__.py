"""The methods: frozen configurations that turn (tokens, blocks) into a plan and do nothing else.

Methods convert ratios into counts, with the expressions of the published code. The ops take counts.
"""

from clipkernels.methods.dense import Dense
from clipkernels.methods.evit import EViT
from clipkernels.methods.patch_ranking import PatchRanking
from clipkernels.methods.protocols import LearntTokens, Method, Predictor
from clipkernels.methods.schedule import Schedule
from clipkernels.methods.select import Select
from clipkernels.methods.tca import TCA
from clipkernels.methods.tome import ToMe

__all__ = ["Dense", "EViT", "LearntTokens", "Method", "PatchRanking", "Predictor", "Schedule", "Select", "TCA", "ToMe"]
