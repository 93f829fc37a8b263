"""The trainings of CLIP-TD's protocol, their annotations and their settings.

none      the student alone
finetune  CLIP with a head, on frozen features or trained whole
plain     naive distillation: all tokens, of equal relevance, weight 1
targeted  CLIP-TD: the relevant tokens, weighted by the teacher's confidence against the student's
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from clipkernels.messages import quantity
from clipkernels.questions.examples import ExampleSet
from clipkernels.questions.learners import Tuned
from clipkernels.questions.results import NONE
from clipkernels.questions.subsets import low_shot, split_by_value

METHODS = (NONE, "finetune", "plain", "targeted")
DISTILLED = ("plain", "targeted")
SAME, SHIFTED, TEST = "same", "shifted", "test"
"""The splits that are scored: beside a domain that is held out the first two, otherwise the last."""


class Plan(NamedTuple):
    """The trainings of a run and their data.

    train, test: the examples.
    methods, shares: names and shares of the labels.
    seeds: number of seeds.
    field, held_out: a field of the annotations, and the values of it that are not trained on; "" and () for no shift.
    """

    train: ExampleSet
    test: ExampleSet
    methods: Sequence[str]
    shares: Sequence[float]
    seeds: int
    field: str = ""
    held_out: Sequence[str] = ()

    @property
    def distils(self) -> bool:
        """True if a method needs the teacher's words and regions."""
        return any(method in DISTILLED for method in self.methods)

    def pool(self, examples: ExampleSet) -> list[int]:
        """The annotations that have a label and are outside of the domain that is held out, as indices."""
        pool = sorted({example.item for example in examples.examples if example.label >= 0})
        if self.held_out:
            values = examples.values(self.field)
            outside, _ = split_by_value([values[item] for item in pool], self.held_out)
            pool = [pool[index] for index in outside]
        return pool

    def subset(self, examples: ExampleSet, training: Training) -> tuple[ExampleSet, int]:
        """The examples of a share of the labels outside of the domain that is held out, and their classes."""
        pool, labels = self.pool(examples), examples.labels
        chosen = low_shot([labels[item] for item in pool], training.share, training.seed).tolist()
        items = [pool[index] for index in chosen]
        return examples.take(items), len({labels[item] for item in items})

    def sides(self, examples: ExampleSet) -> dict[str, list[int]]:
        """The examples of each split that is scored, as indices: one, or two beside a domain that is held out."""
        if not self.held_out:
            return {TEST: list(range(len(examples.examples)))}
        values = examples.values(self.field)
        sides = split_by_value([values[example.item] for example in examples.examples], self.held_out)
        return dict(zip((SAME, SHIFTED), sides, strict=True))

    def notes(self, unread: int = 0) -> Iterator[str]:
        """The counts of annotations, classes and unreadable images, and the domain that is held out, for people."""
        for name, examples in (("train", self.train), ("test", self.test)):
            classes = f" of {quantity(len(examples.classes), 'class')}" if examples.classes else ""
            yield f"{name}: {quantity(len(examples.items), 'annotation')}{classes}"
            yield from (f"{name}: {note}" for note in examples.notes)
            outside = sum(example.label < 0 for example in examples.examples)
            if outside:
                how = "left out" if name == "train" else "scored by the votes of their annotators"
                yield f"{name}: {quantity(outside, 'annotation')} whose answer is no class, {how}"
        if unread:
            yield f"{quantity(unread, 'image')} cannot be read"
        if self.held_out:
            yield f"held out by {self.field}: {', '.join(self.held_out)}"


class Options(NamedTuple):
    """The settings of the trainings.

    student: import path "module:Class"; None is the student that ships.
    tuned: how CLIP is fine-tuned.
    steps, batch_size, lr: most steps, examples per step, largest learning rate.
    full_lr: of CLIP trained whole.
    strength, keep, temperature: λ, κ and t of the objective.
    workers: loader processes.
    """

    student: str | None = None
    tuned: Tuned = "mlp"
    steps: int = 600
    batch_size: int = 64
    lr: float = 1e-3
    full_lr: float = 1e-5
    strength: float = 1.0
    keep: float = 0.4
    temperature: float = 0.07
    workers: int = 0


class Training(NamedTuple):
    """One training: its method, its share of the labels and its seed."""

    method: str
    share: float
    seed: int

    @property
    def name(self) -> str:
        """The name in progress and in the state."""
        # Ten digits, because the name identifies the training in the state; %g rounds to six.
        return f"{self.method}, {100 * self.share:.10g} %, seed {self.seed}"
