"""CLIP-TD (arXiv 2201.05729): distill a frozen CLIP into a vision-language student, on the tokens CLIP finds relevant.

Teacher                 a frozen CLIP: features of images and their patches, of texts, their words and answers
TeacherCache            the same features, encoded once and stored on disk
align_words/align_grid  the teacher's word or patch for each student token
TargetedDistillation    the objective with its projections
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
