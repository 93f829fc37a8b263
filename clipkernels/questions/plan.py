"""The trainings of CLIP-TD's protocol and their settings.

none      the student alone
finetune  CLIP with a head, on frozen features or trained whole
plain     naive distillation: all tokens, of equal relevance, weight 1
targeted  CLIP-TD: the relevant tokens, weighted by the teacher's confidence against the student's
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from clipkernels.questions.examples import ExampleSet
from clipkernels.questions.learners import Tuned
from clipkernels.questions.results import NONE

METHODS = (NONE, "finetune", "plain", "targeted")
DISTILLED = ("plain", "targeted")


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
