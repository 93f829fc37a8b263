"""A teacher's features, fresh or cached, computed with each distinct text encoded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from clipkernels.arguments import check_flags, describe
from clipkernels.learn.distill.align import align_rows
from clipkernels.messages import quantity

Answers = Sequence[str] | Sequence[Sequence[str]]


class TeacherFeatures(NamedTuple):
    """A frozen CLIP's features of B pairs of an image and a text, not normalised; None for absent ones.

    image (B,E): embeddings of the images.
    text (B,E): embeddings of the texts.
    regions (B,P,E): each patch after the final norm and the projection.
    words (B,T,E): each token of the text after the final norm and the projection.
    regions_mask (B,P): bool, False for removed patches; None if all are present.
    words_mask (B,T): bool, True for words, False for padding, start and end; None if all are words.
    answers (B,a,E): embeddings of the text joined with each of a answers.
    """

    image: Tensor | None = None
    text: Tensor | None = None
    regions: Tensor | None = None
    words: Tensor | None = None
    regions_mask: Tensor | None = None
    words_mask: Tensor | None = None
    answers: Tensor | None = None

    def align(self, words: Tensor | None = None, regions: Tensor | None = None) -> TeacherFeatures:
        """These features with one word for each of a student's n tokens, and one region for each of its m patches.

        Args:
            words: (B,n) or (n,) int64, the teacher's token for each of the student's, -1 for none, as from
                `align_words`; None leaves the words unchanged.
            regions: (B,m) or (m,) int64, the teacher's patch for each of the student's, -1 for none, as from
                `align_grid`; None leaves the regions unchanged.
        Returns:
            TeacherFeatures with words (B,n,E) and regions (B,m,E), zeros at -1, and masks that are False there.
        Raises:
            ValueError: an index of another shape or dtype or out of range, or features without the words or regions
                to be aligned.
        """
        result = self
        if words is not None:
            rows, mask = align_rows("words", self.words, self.words_mask, words)
            result = result._replace(words=rows, words_mask=mask)
        if regions is not None:
            rows, mask = align_rows("regions", self.regions, self.regions_mask, regions)
            result = result._replace(regions=rows, regions_mask=mask)
        return result


class Source(Protocol):
    """A source of features: a teacher or its cache."""

    def see(self, images: Tensor, regions: bool = True) -> TeacherFeatures:
        """`image` of images (B,3,S,S), and optionally `regions` with their mask."""

    def read(self, texts: Sequence[str], words: bool = True) -> TeacherFeatures:
        """`text` of distinct texts, and optionally `words` with their mask."""

    def joined(self, sentence: str, answer: str) -> str:
        """A text joined with one of its answers."""


def features_of(
    source: Source,
    images: Tensor | None,
    texts: Sequence[str] | None,
    answers: Answers | None,
    regions: bool,
    words: bool,
) -> TeacherFeatures:
    """The features that a source computes, each distinct text once; arguments and errors as in `Teacher`."""
    check_flags(regions=regions, words=words)
    if images is None and texts is None:
        raise ValueError("expected images or texts, got neither")
    if images is not None and (not isinstance(images, Tensor) or images.ndim != 4):
        raise ValueError(f"images must be (B,3,S,S), got {describe(images)}")
    texts = None if texts is None else check_strings("texts must be a list of strings", texts)
    if images is not None and texts is not None and len(images) != len(texts):
        raise ValueError(
            f"expected one text for each image, got {quantity(len(images), 'image')} and {quantity(len(texts), 'text')}"
        )
    answer_lists, count = ([], 0) if answers is None else _answers_per_text(texts, answers)
    features = TeacherFeatures() if images is None else source.see(images, regions)
    if texts is None:
        return features
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    text_features = source.read(list(row_of), words)
    rows = torch.tensor([row_of[text] for text in texts], dtype=torch.int64)
    for name, tensor in text_features._asdict().items():
        if tensor is not None:
            features = features._replace(**{name: tensor[rows.to(tensor.device)]})
    if answers is None:
        return features
    joined = [
        source.joined(text, answer) for text, of_text in zip(texts, answer_lists, strict=True) for answer in of_text
    ]
    row_of = {text: row for row, text in enumerate(dict.fromkeys(joined))}
    embeddings = source.read(list(row_of), False).text
    assert embeddings is not None
    index = torch.tensor([row_of[text] for text in joined], dtype=torch.int64, device=embeddings.device)
    return features._replace(answers=embeddings[index.view(len(texts), count)])


def _answers_per_text(texts: Sequence[str] | None, answers: Answers) -> tuple[list[list[str]], int]:
    """The answers of each text, and their number per text.

    Raises:
        ValueError: no texts, answers that are not lists of strings, no answers, or different numbers of answers.
    """
    if texts is None:
        raise ValueError("expected texts with the answers, got none")
    expected = "answers must be a list of strings, or one list for each text"
    if isinstance(answers, (str, Tensor)) or not isinstance(answers, Iterable):
        raise ValueError(f"{expected}, got {describe(answers)}")
    items = list(answers)
    if texts and not items:
        raise ValueError(f"{expected}, got []")
    if all(isinstance(item, str) for item in items):
        return [check_strings(expected, items)] * len(texts), len(items)
    for index, item in enumerate(items):
        if isinstance(item, str) or not isinstance(item, Iterable):
            raise ValueError(f"{expected}, got {describe(item)} at {index}")
    if len(items) != len(texts):
        raise ValueError(f"expected answers for {quantity(len(texts), 'text')}, got answers for {len(items)}")
    lists = [check_strings(expected, item) for item in items]
    if not lists[0]:
        raise ValueError(f"expected answers for each text, got {lists!r:.100}")
    wrong = [of_text for of_text in lists if len(of_text) != len(lists[0])]
    if wrong:
        raise ValueError(f"expected {quantity(len(lists[0]), 'answer')} for each text, got {wrong[0]!r:.100}")
    return lists, len(lists[0])


def check_strings(expected: str, value: Any) -> list[str]:
    """The value as a list of strings; raise ValueError, with the text `expected`, for anything else."""
    if isinstance(value, str):
        raise ValueError(f"{expected}, got the string {describe(value)}")
    if not isinstance(value, Iterable) or isinstance(value, Tensor):
        raise ValueError(f"{expected}, got {describe(value)}")
    items = list(value)
    for index, item in enumerate(items):
        if not isinstance(item, str):
            raise ValueError(f"{expected}, got {describe(item)} at {index}")
    return items
