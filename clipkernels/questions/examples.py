"""The three tasks as choices among answers: of one list that all examples share, or of four texts of an example.

vqa      classification: the most frequent answers of the training split after normalisation
snli-ve  classification: entailment, neutral, contradiction
vcr      two choices of a question: its answer, and the reason for the right answer, read after both
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from clipkernels.messages import quantity
from clipkernels.questions import snli_ve, vcr, vqa
from clipkernels.questions.annotation_files import Annotations, find_images
from clipkernels.questions.scores import score_classes, score_vcr, score_vqa
from clipkernels.questions.vqa_answers import normalize_answer

Task = Literal["vqa", "snli-ve", "vcr"]
TASKS: tuple[str, ...] = get_args(Task)
SPLITS = {"vqa": ("train2014", "val2014"), "snli-ve": ("train", "test"), "vcr": ("train", "val")}
"""The splits of each task to train on and to score, by default; VQA's and VCR's test splits have no public answers."""
FIELDS: Mapping[str, tuple[str, ...]] = {
    "vqa": ("question_type", "answer_type"),
    "snli-ve": (),
    "vcr": ("movie", "source"),
}
"""The fields of each task by which a domain can be held out; SNLI-VE's files have none."""
READERS: Mapping[str, tuple[Callable[[str | os.PathLike[str], str], Annotations], tuple[str, ...]]] = {
    "vqa": (vqa.read_vqa, vqa.FOLDERS),
    "snli-ve": (snli_ve.read_snli_ve, snli_ve.FOLDERS),
    "vcr": (vcr.read_vcr, vcr.FOLDERS),
}
CANDIDATES = 4
"""Answers among which the confidences of teacher and student in VQA are compared, as many as VCR has."""


class Example(NamedTuple):
    """One choice among answers.

    item: index of its annotation.
    image: path of the image.
    text: a question, a hypothesis, or VCR's question with its right answer.
    choices: the answers of this example alone; () if the classes are its answers.
    label: index of the right answer; -1 for an answer of VQA that is no class.
    votes: of VQA, the number of annotators by class.
    """

    item: int
    image: str
    text: str
    choices: tuple[str, ...]
    label: int
    votes: Mapping[int, int]


class ExampleSet(NamedTuple):
    """The examples of a split.

    task: the task.
    items: its annotations, of which all images exist.
    examples: one of each annotation, two of VCR's, in the order of the annotations.
    classes: the answers that examples without choices share.
    notes: sentences for a report.
    """

    task: str
    items: tuple[Any, ...]
    examples: tuple[Example, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def labels(self) -> list[int]:
        """The class of each annotation, by which subsets are stratified; -1 for one without an example."""
        labels = [-1] * len(self.items)
        for example in reversed(self.examples):  # of VCR's two examples, the first one counts
            labels[example.item] = example.label
        return labels

    def values(self, field: str) -> list[str]:
        """The value of a field of each annotation."""
        return [str(getattr(item, field)) for item in self.items]

    def take(self, items: Collection[int]) -> ExampleSet:
        """The examples of some annotations, whose indices stay those of this set."""
        chosen = set(items)
        return self._replace(examples=tuple(example for example in self.examples if example.item in chosen))


def read_examples(
    task: str,
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str],
    split: str,
    classes: Sequence[str] = (),
) -> ExampleSet:
    """The examples of a split of a task; annotations whose image is missing are left out and counted.

    Args:
        task: "vqa", "snli-ve" or "vcr".
        annotations: the folder of the annotation files.
        images: the folder of the images.
        split: the name of the split in the names of the files.
        classes: of VQA: the answers that are classes, as `vqa_classes` gives them.
    Raises:
        ValueError: a faulty file, or no image at all.
        OSError: a file cannot be read.
    """
    reader, folders = READERS[task]
    items, notes = reader(annotations, split)
    paths, missing = find_images(
        (item.image for item in items), images, [folder.format(split) for folder in folders], split
    )
    present = tuple(item for item in items if item.image in paths)
    if missing:
        notes = (*notes, f"{missing}: left out {quantity(len(items) - len(present), 'annotation')}")
    make = {"vqa": _of_vqa, "snli-ve": _of_snli_ve, "vcr": _of_vcr}[task]
    index = {name: place for place, name in enumerate(classes)}
    examples = tuple(
        example for place, item in enumerate(present) for example in make(place, item, paths[item.image], index)
    )
    return ExampleSet(task, present, examples, snli_ve.CLASSES if task == "snli-ve" else tuple(classes), notes)


def vqa_classes(annotations: Annotations, count: int) -> tuple[str, ...]:
    """The most frequent answers of questions after normalisation, at most `count`; ties in alphabetical order.

    The answer to a question is the one that most annotators gave, ties to the first.
    """
    counts = Counter(_majority(item.answers) for item in annotations.items)
    return tuple(sorted(counts, key=lambda answer: (-counts[answer], answer))[:count])


def score_examples(examples: ExampleSet, predictions: Sequence[int]) -> dict[str, float]:
    """The scores of a task, by name, given the index of the chosen answer of each example.

    Raises:
        ValueError: no example, or another number of predictions.
    """
    pairs = list(zip(examples.examples, predictions, strict=True))
    if examples.task == "vqa":
        items = [examples.items[example.item] for example, _ in pairs]
        answers = [examples.classes[prediction] for _, prediction in pairs]
        return score_vqa(answers, [item.answers for item in items], [item.answer_type for item in items])
    right = [prediction == example.label for example, prediction in pairs]
    if examples.task == "vcr":
        return score_vcr(right[0::2], right[1::2])
    return score_classes(list(predictions), [example.label for example, _ in pairs], examples.classes)


class AnswerKinds(NamedTuple):
    """The types of VQA's classes: that of each class, and the classes of each type; empty for the other tasks."""

    kind_of: Mapping[int, str]
    members: Mapping[str, Sequence[int]]


def kinds_of(examples: ExampleSet) -> AnswerKinds:
    """The type of each class of VQA: the most frequent one of its questions; "" without a question."""
    if examples.task != "vqa":
        return AnswerKinds({}, {})
    counts: dict[int, Counter[str]] = {index: Counter() for index in range(len(examples.classes))}
    for example in examples.examples:
        if example.label >= 0:
            counts[example.label][examples.items[example.item].answer_type] += 1
    kind_of = {index: count.most_common(1)[0][0] if count else "" for index, count in counts.items()}
    members: dict[str, list[int]] = {}
    for index, kind in kind_of.items():
        members.setdefault(kind, []).append(index)
    return AnswerKinds(kind_of, members)


def candidates_of(examples: ExampleSet, example: Example, kinds: AnswerKinds) -> tuple[list[int], int]:
    """The answers among which confidences are compared, as indices, and the place of the right one among them.

    All of them, but of VQA's thousands of classes the right one and three others, drawn by the question's number: of
    the same type of answer, and of another one if these are too few [ours].

    Args:
        examples: the set of the example.
        example: an example with a label.
        kinds: of the classes.
    """
    count, label = len(example.choices) or len(examples.classes), example.label
    if examples.task != "vqa" or count <= CANDIDATES:
        return list(range(count)), label
    generator = random.Random(examples.items[example.item].number)
    alike = kinds.members[kinds.kind_of[label]]
    chosen: list[int] = []
    for pool in (alike, range(count)):
        drawn = generator.sample(pool, min(2 * CANDIDATES, len(pool)))
        chosen += [index for index in drawn if index != label and index not in chosen]
    answers = sorted([label, *chosen[: CANDIDATES - 1]])
    return answers, answers.index(label)


def _majority(answers: Sequence[str]) -> str:
    return Counter(map(normalize_answer, answers)).most_common(1)[0][0]


def _of_vqa(place: int, item: Any, image: str, index: Mapping[str, int]) -> list[Example]:
    votes = Counter(index[answer] for answer in map(normalize_answer, item.answers) if answer in index)
    label = index.get(_majority(item.answers), -1)
    return [Example(place, image, item.text, (), label, votes)]


def _of_snli_ve(place: int, item: Any, image: str, index: Mapping[str, int]) -> list[Example]:
    return [Example(place, image, item.text, (), item.label, {})]


def _of_vcr(place: int, item: Any, image: str, index: Mapping[str, int]) -> list[Example]:
    known = f"{item.text} {item.answers[item.answer]}"
    return [
        Example(place, image, item.text, item.answers, item.answer, {}),
        Example(place, image, known, item.reasons, item.reason, {}),
    ]
