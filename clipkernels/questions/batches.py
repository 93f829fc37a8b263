"""Batches of examples: images that loader processes decode, token ids, and the features of the teacher's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from clipkernels.adapters.tokenizers import ids_of
from clipkernels.images.batches import Pictures
from clipkernels.images.loaders import Loader
from clipkernels.learn.distill import TeacherCache, TeacherFeatures, align_grid, align_words
from clipkernels.questions.examples import AnswerKinds, Example, ExampleSet, candidates_of


class Batch(NamedTuple):
    """B examples.

    images (B,3,S,S): preprocessed.
    tokens (B,c,T): token ids of the text, or of the text with each of its c choices.
    targets (B,a): shares of the answers, which sum to 1.
    labels (B,): int64, the right answers.
    candidates (B,k): int64, the answers among which confidences are compared.
    right (B,): int64, the place of the right answer among them.
    features: the teacher's, of the image and of the text with its right choice, one word and one region for each of the
        student's; `answers` (B,k,E) are the candidates'. Empty unless they are asked for.
    texts (B,c,E): the teacher's embeddings of the texts of the tokens; None unless they are asked for.
    """

    images: Tensor
    tokens: Tensor
    targets: Tensor
    labels: Tensor
    candidates: Tensor
    right: Tensor
    features: TeacherFeatures = TeacherFeatures()
    texts: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """This batch on a device."""
        moved = {name: part.to(device) for name, part in self._asdict().items() if isinstance(part, Tensor)}
        features = TeacherFeatures(*(None if part is None else part.to(device) for part in self.features))
        return self._replace(**moved, features=features)


class TextTokens(NamedTuple):
    """The token ids of texts, and the teacher's word for each token.

    tokenizer: the teacher's.
    context: as in `ids_of`.
    padding: the id of padding.
    student: a student with a tokenizer of its own, or None.
    pieces: the teacher's pieces of a text.
    """

    tokenizer: Any
    context: int | None
    padding: int
    student: Any = None
    pieces: Callable[[str], list[str]] = str.split

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids (n,T), cut to the longest text."""
        if self.student is not None:
            ids: Tensor = self.student.tokenize(list(texts))
            return ids
        every = ids_of(self.tokenizer, list(texts), self.context)
        length = torch.where(every != self.padding, torch.arange(1, every.shape[1] + 1), 0).amax()
        return every[:, : int(length)]

    def words(self, texts: Sequence[str], length: int) -> Tensor:
        """The teacher's word for each of `length` tokens, (length,) or (n,length); -1 for none."""
        if self.student is None:
            return torch.arange(length)
        rows = [align_words(self.student.pieces(text), self.pieces(text))[:length] for text in texts]
        return torch.tensor([row + [-1] * (length - len(row)) for row in rows])


class ExampleImages(Dataset[tuple[int, Tensor | str]]):
    """The images of examples by index; the reason for one that cannot be read."""

    def __init__(self, examples: Sequence[Example], pictures: Pictures) -> None:
        self.examples, self.pictures = examples, pictures

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        path = self.examples[index].image
        return index, self.pictures.reader.prepare(path, self.pictures.preprocess, self.pictures.shape)


class ExampleBatches:
    """Batches of the examples of a set.

    Args:
        examples: the set.
        pictures: the preprocessing of an image, and its shape.
        tokens: of texts.
        cached: the teacher's features.
        grids: rows and columns of the student's patches, and of the teacher's.
        workers: loader processes; 0 reads in this process.
        kinds: of VQA's classes.
    """

    def __init__(
        self,
        examples: ExampleSet,
        pictures: Pictures,
        tokens: TextTokens,
        cached: TeacherCache,
        grids: tuple[tuple[int, int], tuple[int, int]],
        workers: int,
        kinds: AnswerKinds,
    ) -> None:
        self.examples, self.pictures, self.tokens, self.cached = examples, pictures, tokens, cached
        self.regions, self.workers, self.kinds = align_grid(*grids), workers, kinds

    def read(self, indices: Sequence[Tensor], features: bool = False, texts: bool = False) -> Iterator[Batch]:
        """Yield the batches at indices.

        Args:
            indices: (B,) indices of the examples of each batch.
            features: with the teacher's features for the student's words and patches.
            texts: with the teacher's embeddings of images and texts.
        Raises:
            ValueError: an image that cannot be read.
        """
        every = self.examples.examples
        images = ExampleImages(every, self.pictures)
        loader: Loader[Any] = Loader(
            images, self.workers, batch_sampler=[part.tolist() for part in indices], collate_fn=list
        )
        for items in loader:
            for index, image in items:
                if isinstance(image, str):
                    raise ValueError(f"expected the image {every[index].image} as it was, got an error: {image}")
            chosen = [every[index] for index, _ in items]
            yield self._batch(chosen, torch.stack([image for _, image in items]), features, texts)

    def texts_of(self, example: Example) -> list[str]:
        """The texts of an example's tokens."""
        return [self.cached.joined(example.text, choice) for choice in example.choices] or [example.text]

    def distilled_text(self, example: Example) -> str:
        """The text of which the student learns the words."""
        return self.texts_of(example)[example.label if example.choices else 0]

    def candidate_texts(self, example: Example) -> list[str]:
        """The texts with each of the answers among which confidences are compared."""
        answers = example.choices or self.examples.classes
        return [
            self.cached.joined(example.text, answers[index])
            for index in candidates_of(self.examples, example, self.kinds)[0]
        ]

    def _batch(self, examples: Sequence[Example], images: Tensor, features: bool, texts: bool) -> Batch:
        count, choices = len(examples), len(examples[0].choices) or 1
        answers = len(examples[0].choices) or len(self.examples.classes)
        every = [text for example in examples for text in self.texts_of(example)]
        tokens = self.tokens.ids(every).view(count, choices, -1)
        targets = torch.zeros(count, answers)
        for row, example in enumerate(examples):
            for label, votes in (example.votes or {example.label: 1}).items():
                targets[row, label] = max(0, votes) if label >= 0 else 0.0
        targets = targets / targets.sum(1, keepdim=True).clamp(min=1)
        chosen = [candidates_of(self.examples, each, self.kinds) if each.label >= 0 else ([0], 0) for each in examples]
        batch = Batch(
            images, tokens, targets, torch.tensor([example.label for example in examples]),
            torch.tensor([row for row, _ in chosen]) if features else torch.zeros(count, 0, dtype=torch.int64),
            torch.tensor([place for _, place in chosen]),
        )  # fmt: skip
        if features:
            distilled = [self.distilled_text(example) for example in examples]
            found = self.cached(images, distilled)
            found = found.align(words=self.tokens.words(distilled, tokens.shape[2]), regions=self.regions)
            wanted = [text for example in examples for text in self.candidate_texts(example)]
            answered = self._embed(wanted).view(count, -1, self.cached.width)
            batch = batch._replace(features=found._replace(answers=answered))
        if texts:
            embedding = self.cached(images, regions=False).image
            assert embedding is not None
            batch = batch._replace(
                features=batch.features._replace(image=embedding), texts=self._embed(every).view(count, choices, -1)
            )
        return batch

    def _embed(self, texts: Sequence[str]) -> Tensor:
        """The teacher's embeddings (n,E) of texts, fp32 on the CPU."""
        row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        embeddings = self.cached.read(list(row_of), False).text
        assert embeddings is not None
        return embeddings.float().cpu()[[row_of[text] for text in texts]]
