"""Recovery: distil a reduced tower to its own dense embeddings, so that what was embedded before stays valid.

recover      train a reduced tower in place, on images without labels
Recovered    its result, with the Closeness before and after and every Evaluation
Progress     its state after a batch
"""

from clipkernels.learn.recovery.recover import recover
from clipkernels.learn.recovery.results import Closeness, Evaluation, Progress, Recovered

__all__ = ["Closeness", "Evaluation", "Progress", "Recovered", "recover"]
