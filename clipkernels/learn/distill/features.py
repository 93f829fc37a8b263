"""What a teacher says, whether it says it now or said it before, and how it is asked: each different text once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from clipkernels.learn.distill.align import align_rows

Answers = Sequence[str] | Sequence[Sequence[str]]


class TeacherFeatures(NamedTuple):
    """What a frozen CLIP says of B pairs of an image and a text, nothing normalised; what is not known is None.

    image (B,E): embeddings.
    text (B,E): likewise.
    regions (B,P,E): each patch after the final norm and the projection.
    words (B,T,E): each token of the text, likewise.
    regions_mask (B,P): bool, False where a patch is gone; None where all are there.
    words_mask (B,T): bool, True for words: no padding, no start and no end; None where all are.
    answers (B,a,E): embeddings of the text with each of a answers.
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
            words: (B,n) or (n,) int64 the teacher's token for each of the student's, -1 for none, such as `align_words`
                gives; None leaves the words as they are.
            regions: (B,m) or (m,) int64 the teacher's patch for each of the student's, likewise, such as `align_grid`
                gives.
        Returns:
            TeacherFeatures with words (B,n,E) and regions (B,m,E), zeros at -1, and masks that are False there.
        Raises:
            ValueError: an index of another shape or dtype or out of range, or features without what is aligned.
        """
        made = self
        if words is not None:
            rows, mask = align_rows("words", self.words, self.words_mask, words)
            made = made._replace(words=rows, words_mask=mask)
        if regions is not None:
            rows, mask = align_rows("regions", self.regions, self.regions_mask, regions)
            made = made._replace(regions=rows, regions_mask=mask)
        return made


class Source(Protocol):
    """What sees and reads: a teacher, or what it said before."""

    def see(self, images: Tensor, regions: bool = True) -> TeacherFeatures:
        """`image`, and `regions` with their mask."""

    def read(self, texts: Sequence[str], words: bool = True) -> TeacherFeatures:
        """`text`, and `words` with their mask, of different texts."""

    def joined(self, sentence: str, answer: str) -> str:
        """A text with one of its answers."""


def features_of(
    source: Source,
    images: Tensor | None,
    texts: Sequence[str] | None,
    answers: Answers | None,
    regions: bool,
    words: bool,
) -> TeacherFeatures:
    """What a source says, which reads each different text once; arguments and errors as of `Teacher`."""
    if images is None and texts is None:
        raise ValueError("expected images or texts, got neither")
    if images is not None and (not isinstance(images, Tensor) or images.ndim != 4):
        came: Any = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be (B,3,S,S), got {came}")
    texts = None if texts is None else check_strings("texts must be a list of strings", texts)
    if images is not None and texts is not None and len(images) != len(texts):
        raise ValueError(f"expected one text for each image, got {len(images)} images and {len(texts)} texts")
    together, count = ([], 0) if answers is None else _answers_per_text(texts, answers)
    made = TeacherFeatures() if images is None else source.see(images, regions)
    if texts is None:
        return made
    once = {sentence: row for row, sentence in enumerate(dict.fromkeys(texts))}
    read, rows = source.read(list(once), words), torch.tensor([once[each] for each in texts], dtype=torch.int64)
    for name, found in read._asdict().items():
        if found is not None:
            made = made._replace(**{name: found[rows.to(found.device)]})
    if answers is None:
        return made
    joined = [
        source.joined(sentence, answer) for sentence, each in zip(texts, together, strict=True) for answer in each
    ]
    once = {sentence: row for row, sentence in enumerate(dict.fromkeys(joined))}
    embedded = source.read(list(once), False).text
    assert embedded is not None
    index = torch.tensor([once[each] for each in joined], dtype=torch.int64, device=embedded.device)
    return made._replace(answers=embedded[index.view(len(texts), count)])


def _answers_per_text(texts: Sequence[str] | None, answers: Answers) -> tuple[list[list[str]], int]:
    """The answers of each text, and how many each has.

    Raises:
        ValueError: no texts, something else than lists of strings, no answers, or more for one text than for another.
    """
    if texts is None:
        raise ValueError("expected texts with the answers, got none")
    wanted = "answers must be a list of strings, or one for each text"
    if isinstance(answers, str) or not isinstance(answers, Iterable):
        raise ValueError(f"{wanted}, got {answers!r:.100}")
    given = list(answers)
    if texts and not given:
        raise ValueError(f"{wanted}, got []")
    if all(isinstance(each, str) for each in given):
        return [check_strings(wanted, given)] * len(texts), len(given)
    for place, each in enumerate(given):
        if isinstance(each, str) or not isinstance(each, Iterable):
            raise ValueError(f"{wanted}, got {each!r:.100} at {place}")
    if len(given) != len(texts):
        raise ValueError(f"expected answers for {len(texts)} texts, got them for {len(given)}")
    lists = [check_strings(wanted, each) for each in given]
    if not lists[0]:
        raise ValueError(f"expected answers for each text, got {lists!r:.100}")
    wrong = [each for each in lists if len(each) != len(lists[0])]
    if wrong:
        raise ValueError(f"expected {len(lists[0])} answers for each text, got {wrong[0]!r:.100}")
    return lists, len(lists[0])


def check_strings(wanted: str, given: Any) -> list[str]:
    """A list of strings as such; raises ValueError, which says what is wanted, for anything else."""
    if isinstance(given, str):
        raise ValueError(f"{wanted}, got the string {given!r:.100}")
    if not isinstance(given, Iterable):
        raise ValueError(f"{wanted}, got {given!r:.100}")
    found = list(given)
    for place, each in enumerate(found):
        if not isinstance(each, str):
            raise ValueError(f"{wanted}, got {each!r:.100} at {place}")
    return found
