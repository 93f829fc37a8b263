"""Questions about photographs, made of nothing but their classes, and the shift that words and images can undergo.

    is this a cat?                     yes, no
    is this a cat or a dog?            the first, the second
    is this an animal or a vehicle?    the first, the second; where there are both

Each has two answers. What an answer says of an image is a set of classes: "no" to a cat is any of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

VEHICLES = ("airplane", "automobile", "ship", "truck")
MASKED = 0.25  # of the letters
NOISE = 0.5  # of a standard deviation of the pixels


class Question(NamedTuple):
    """A question of a kind, and the classes that either answer stands for."""

    kind: int
    text: str
    says: tuple[tuple[int, ...], tuple[int, ...]]


class Asked(NamedTuple):
    """Images (n,3,S,S), a question about each by its number, and the right answers (n,), 0 or 1."""

    images: Tensor
    questions: Tensor
    labels: Tensor

    def take(self, index: Tensor | slice) -> Asked:
        return Asked(*(part[index] for part in self))


def questions_of(classes: Sequence[str]) -> list[Question]:
    """Every question that can be asked of so many classes."""
    everything = range(len(classes))
    names = [f"an {name}" if name[0] in "aeiou" else f"a {name}" for name in classes]
    lives, moves = (tuple(k for k in everything if (classes[k] in VEHICLES) == moving) for moving in (False, True))
    found = [Question(0, f"is this {names[k]}?", ((k,), (*everything[:k], *everything[k + 1 :]))) for k in everything]
    pairs = [(one, two) for one in everything for two in everything if one != two]
    found += [Question(1, f"is this {names[one]} or {names[two]}?", ((one,), (two,))) for one, two in pairs]
    return found + [Question(2, "is this an animal or a vehicle?", (lives, moves))] * bool(lives and moves)


def ask(images: Tensor, labels: Tensor, questions: Sequence[Question], seed: int) -> Asked:
    """A question about each image of class labels (n,), of every kind alike often; either answer is right half the time
    where that is up to the one who asks."""
    rng = np.random.default_rng(seed)
    kinds = sorted({question.kind for question in questions})
    asked, right = [], []
    for at, label in enumerate(labels.tolist()):
        kind = [(q, question) for q, question in enumerate(questions) if question.kind == kinds[at % len(kinds)]]
        answer = int(rng.integers(2))
        if not any(label in question.says[answer] for _, question in kind):
            answer = 1 - answer
        fit = [q for q, question in kind if label in question.says[answer]]
        asked.append(fit[int(rng.integers(len(fit)))])
        right.append(answer)
    return Asked(images, torch.tensor(asked), torch.tensor(right))


def shifted(images: Tensor, tokens: Tensor, mask: int, letters: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Images blurred to half their size, with noise, and token ids of which some letters are masked."""
    generator = torch.Generator().manual_seed(seed)
    small = interpolate(avg_pool2d(images, 2), scale_factor=2.0)
    noise = torch.randn(images.shape, generator=generator) * (NOISE * images.std())
    return small + noise, masked(tokens, mask, letters, MASKED, generator)


def masked(tokens: Tensor, mask: int, letters: tuple[int, int], share: float, generator: torch.Generator) -> Tensor:
    """Token ids of which a share of the letters, ids from the first to the last, is another id."""
    gone = torch.rand(tokens.shape, generator=generator) < share
    return torch.where(gone & (tokens >= letters[0]) & (tokens <= letters[1]), mask, tokens)
