"""Questions about photographs, generated only from their classes, and shifted versions of words and images.

    is this a cat?                     yes, no
    is this a cat or a dog?            the first, the second
    is this an animal or a vehicle?    the first, the second; asked only if the classes contain both

Every question has two answers. An answer stands for a set of classes: "no" to a cat stands for all other classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

VEHICLES = ("airplane", "automobile", "ship", "truck")
MASKED = 0.25  # share of the letters
NOISE = 0.5  # standard deviations of the pixels


class Question(NamedTuple):
    """A question: its kind, its text, and the classes that each of its two answers stands for."""

    kind: int
    text: str
    says: tuple[tuple[int, ...], tuple[int, ...]]


class QuestionSet(NamedTuple):
    """Images (n,3,S,S), the index of a question about each (n,), and the correct answers (n,), 0 or 1."""

    images: Tensor
    questions: Tensor
    labels: Tensor

    def take(self, index: Tensor | slice) -> QuestionSet:
        return QuestionSet(*(part[index] for part in self))


def questions_of(classes: Sequence[str]) -> list[Question]:
    """Return every question about the classes."""
    everything = range(len(classes))
    names = [f"an {name}" if name[0] in "aeiou" else f"a {name}" for name in classes]
    animals, vehicles = (
        tuple(k for k in everything if (classes[k] in VEHICLES) == is_vehicle) for is_vehicle in (False, True)
    )
    questions = [
        Question(0, f"is this {names[k]}?", ((k,), (*everything[:k], *everything[k + 1 :]))) for k in everything
    ]
    pairs = [(one, two) for one in everything for two in everything if one != two]
    questions += [Question(1, f"is this {names[one]} or {names[two]}?", ((one,), (two,))) for one, two in pairs]
    if animals and vehicles:
        questions.append(Question(2, "is this an animal or a vehicle?", (animals, vehicles)))
    return questions


def ask(images: Tensor, labels: Tensor, questions: Sequence[Question], seed: int) -> QuestionSet:
    """Return a random question about each image with class labels (n,), with equal counts of every kind.

    Each answer is correct half the time, except for questions whose answer the label determines.
    """
    rng = np.random.default_rng(seed)
    kinds = sorted({question.kind for question in questions})
    indices, answers = [], []
    for position, label in enumerate(labels.tolist()):
        kind = [(q, question) for q, question in enumerate(questions) if question.kind == kinds[position % len(kinds)]]
        answer = int(rng.integers(2))
        if not any(label in question.says[answer] for _, question in kind):
            answer = 1 - answer
        fitting = [q for q, question in kind if label in question.says[answer]]
        indices.append(fitting[int(rng.integers(len(fitting)))])
        answers.append(answer)
    return QuestionSet(images, torch.tensor(indices), torch.tensor(answers))


def shifted(images: Tensor, tokens: Tensor, mask: int, letters: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Return images blurred to half resolution plus noise, and token ids with a share MASKED of the letters masked."""
    generator = torch.Generator().manual_seed(seed)
    small = interpolate(avg_pool2d(images, 2), scale_factor=2.0)
    noise = torch.randn(images.shape, generator=generator) * (NOISE * images.std())
    return small + noise, masked(tokens, mask, letters, MASKED, generator)


def masked(tokens: Tensor, mask: int, letters: tuple[int, int], share: float, generator: torch.Generator) -> Tensor:
    """Return token ids with a random share of the letters, the ids of an inclusive range, replaced by `mask`."""
    selected = torch.rand(tokens.shape, generator=generator) < share
    return torch.where(selected & (tokens >= letters[0]) & (tokens <= letters[1]), mask, tokens)
