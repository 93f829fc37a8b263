"""Questions about images, as CLIP-TD is judged by: VQA v2, SNLI-VE and VCR, with few labels and shifted domains.

read_vqa/read_snli_ve/read_vcr     annotation files in their own layouts
normalize_answer/vqa_accuracy      VQA's normalisation and soft accuracy
score_vqa/score_classes/score_vcr  the scores of the tasks
low_shot/held_out_values           nested subsets by share, and domains by a field
"""

from clipkernels.questions.scores import score_classes, score_vcr, score_vqa
from clipkernels.questions.snli_ve import read_snli_ve
from clipkernels.questions.subsets import held_out_values, low_shot
from clipkernels.questions.vcr import read_vcr
from clipkernels.questions.vqa import read_vqa
from clipkernels.questions.vqa_answers import normalize_answer, vqa_accuracy

__all__ = [
    "held_out_values",
    "low_shot",
    "normalize_answer",
    "read_snli_ve",
    "read_vcr",
    "read_vqa",
    "score_classes",
    "score_vcr",
    "score_vqa",
    "vqa_accuracy",
]
