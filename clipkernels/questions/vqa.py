"""VQA v2: open questions about COCO's images, each with the answers of ten annotators.

v2_OpenEnded_mscoco_{split}_questions.json   the questions
v2_mscoco_{split}_annotations.json           ten answers to each, and its type
COCO_{split}_{image id, 12 digits}.jpg       the images

Source: VQA v2, arXiv 1612.00837; the layout is that of the files on visualqa.org.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from clipkernels.evaluation.text_files import read_json
from clipkernels.messages import quantity
from clipkernels.questions.annotation_files import Annotations

QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANNOTATIONS = "v2_mscoco_{}_annotations.json"
FOLDERS = ("{}", "", "images/{}", "images")
"""Folders in which the images of a split may be."""
ANNOTATORS = 10
Number = Annotated[int, msgspec.Meta(ge=0)]


class VQAQuestion(NamedTuple):
    """An open question about an image.

    number: its id.
    image: name of the image file.
    text: the question.
    answers: the answers of the ten annotators, as they wrote them.
    question_type: the first words of the question, such as "what color is the".
    answer_type: "yes/no", "number" or "other".
    """

    number: int
    image: str
    text: str
    answers: tuple[str, ...]
    question_type: str
    answer_type: str


class _Question(msgspec.Struct):
    question_id: Number
    image_id: Number
    question: str


class _Questions(msgspec.Struct):
    questions: list[_Question]


class _Answer(msgspec.Struct):
    answer: str


class _Annotation(msgspec.Struct):
    question_id: Number
    image_id: Number
    question_type: str
    answer_type: str
    answers: Annotated[list[_Answer], msgspec.Meta(min_length=ANNOTATORS, max_length=ANNOTATORS)]


class _Annotations(msgspec.Struct):
    annotations: list[_Annotation]


def read_vqa(folder: str | os.PathLike[str], split: str) -> Annotations:
    """The questions of a split with their answers, as `VQAQuestion`, in the order of the questions file.

    Args:
        folder: the folder of both files.
        split: "train2014" or "val2014"; the answers of the test splits are not public.
    Raises:
        ValueError: a faulty file, questions without the file of their answers, two questions of one id, or questions
            and annotations that do not belong together.
        OSError: a file cannot be read.
    """
    file, other = (Path(folder) / name.format(split) for name in (QUESTIONS, ANNOTATIONS))
    questions = read_json(file, "VQA v2's questions", _Questions).questions
    if not other.exists():
        raise ValueError(
            f"expected the answers to {file} in {other}, got no such file; VQA's test splits have no public answers: "
            "take train2014 or val2014"
        )
    annotations = read_json(other, "VQA v2's annotations", _Annotations).annotations
    by_number = {annotation.question_id: annotation for annotation in annotations}
    for path, count, distinct in (
        (other, len(annotations), len(by_number)),
        (file, len(questions), len({question.question_id for question in questions})),
    ):
        if distinct < count:
            raise ValueError(
                f"expected one entry for each question_id, got {path} with {count} entries of "
                f"{quantity(distinct, 'question')}: get that file anew"
            )
    items = []
    for question in questions:
        annotation = by_number.pop(question.question_id, None)
        if annotation is None or annotation.image_id != question.image_id:
            actual = "without it" if annotation is None else f"with image {annotation.image_id}"
            raise ValueError(
                f"expected the answers to question {question.question_id} about image {question.image_id} of {file}, "
                f"got {other} {actual}: get both files anew"
            )
        answers = tuple(answer.answer for answer in annotation.answers)
        image = f"COCO_{split}_{question.image_id:012d}.jpg"
        items.append(
            VQAQuestion(
                question.question_id, image, question.question, answers, annotation.question_type,
                annotation.answer_type,
            )
        )  # fmt: skip
    if by_number:
        raise ValueError(
            f"expected questions for the answers in {other}, got {file} without question {min(by_number)}: get both "
            "files anew"
        )
    if not items:
        raise ValueError(f"expected VQA v2's questions, got {file} without any: get that file anew")
    return Annotations(tuple(items), ())
