"""VCR: a question about a film still with four answers, and four reasons for the right one.

{split}.jsonl    a question in each line: img_fn, objects, question, answer_choices, answer_label,
                 rationale_choices, rationale_label
{img_fn}         the images

Questions, answers and reasons are lists of words and of lists of indices into `objects`. Here an index becomes the
class of the object and its number from 1, "person 2", because a CLIP reads plain text [ours].

Source: VCR, arXiv 1811.10830; the layout is that of the files of visualcommonsense.com.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from clipkernels.evaluation.file_tree import relative_path
from clipkernels.questions.annotation_files import Annotations, line_error, read_json_lines

FILE = "{}.jsonl"
FOLDERS = ("vcr1images", "")
"""Folders in which the images may be."""
CHOICES = 4
EXPECTED = "VCR's questions (JSON Lines)"
BEFORE_MARK = re.compile(r" (?=[.,;:?!)\]]|'(?:s|re|ve|ll|d|m|t)\b|n't\b)")
"""A blank that text has not."""

Words = list[str | list[int]]
Label = Annotated[int, msgspec.Meta(ge=0, lt=CHOICES)]
Choices = Annotated[list[Words], msgspec.Meta(min_length=CHOICES, max_length=CHOICES)]


class VCRQuestion(NamedTuple):
    """A question with four answers and four reasons.

    name: its id.
    image: path of the image below the folder of images.
    text: the question.
    answers: four.
    answer: index of the right one.
    reasons: four, for the right answer.
    reason: index of the right one.
    movie: the film.
    source: the collection that the film is from: the part of the image's folder before "_", such as "lsmdc".
    """

    name: str
    image: str
    text: str
    answers: tuple[str, ...]
    answer: int
    reasons: tuple[str, ...]
    reason: int
    movie: str
    source: str


class _Question(msgspec.Struct):
    img_fn: str
    objects: list[str]
    question: Words
    answer_choices: Choices
    rationale_choices: Choices
    answer_label: Label | None = None
    rationale_label: Label | None = None
    annot_id: str = ""
    movie: str = ""


def read_vcr(folder: str | os.PathLike[str], split: str) -> Annotations:
    """The questions of a split, as `VCRQuestion`.

    Args:
        folder: the folder of the file.
        split: "train" or "val"; the labels of the test split are not public.
    Raises:
        ValueError: a faulty line, such as a reference to an object that is not there, or one without a label; the
            message names the file and the line.
        OSError: the file cannot be read.
    """
    file = Path(folder) / FILE.format(split)
    items = []
    for number, line in read_json_lines(file, EXPECTED, _Question):
        if line.answer_label is None or line.rationale_label is None:
            missing = "answer_label" if line.answer_label is None else "rationale_label"
            raise ValueError(
                f"expected {EXPECTED} with their labels, got line {number} of {file} without {missing}; VCR's test "
                "split has no public labels: take train or val"
            )
        try:
            image = relative_path(line.img_fn)
            question = plain_text(line.question, line.objects)
            answers = tuple(plain_text(words, line.objects) for words in line.answer_choices)
            reasons = tuple(plain_text(words, line.objects) for words in line.rationale_choices)
        except ValueError as error:
            raise line_error(file, EXPECTED, number, str(error)) from error
        items.append(
            VCRQuestion(
                line.annot_id or str(number), image, question, answers, line.answer_label, reasons,
                line.rationale_label, line.movie, image.partition("_")[0],
            )
        )  # fmt: skip
    if not items:
        raise ValueError(f"expected {EXPECTED}, got {file} without any: get that file anew")
    return Annotations(tuple(items), ())


def plain_text(words: Words, objects: Sequence[str]) -> str:
    """Words and references to objects as text: "Is person 2 happy?"; several references are joined by "and".

    Raises:
        ValueError: a reference to an object that is not there.
    """
    parts = []
    for word in words:
        if isinstance(word, str):
            parts.append(word)
            continue
        for index in word:
            if not 0 <= index < len(objects):
                raise ValueError(f"a reference to object {index} of {len(objects)}")
        parts.append(" and ".join(f"{objects[index]} {index + 1}" for index in word))
    return BEFORE_MARK.sub("", " ".join(" ".join(parts).split()))
