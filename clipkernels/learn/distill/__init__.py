"""CLIP-TD (arXiv 2201.05729): a student of images and text learns from a frozen CLIP, where CLIP sees what matters.

Teacher                 a frozen CLIP: what it says of images and their patches, of texts, their words and answers
TeacherCache            the same, encoded once and kept on disk
align_words/align_grid  which of its words and patches stands for each of a student's
TargetedDistillation    the objective, with the projections that it needs
"""

from clipkernels.learn.distill.align import align_grid, align_words
from clipkernels.learn.distill.cache import TeacherCache
from clipkernels.learn.distill.features import TeacherFeatures
from clipkernels.learn.distill.objective import Distilled, TargetedDistillation
from clipkernels.learn.distill.teacher import Teacher

__all__ = [
    "Distilled",
    "TargetedDistillation",
    "Teacher",
    "TeacherCache",
    "TeacherFeatures",
    "align_grid",
    "align_words",
]
