"""CLIP-TD's protocol: every method on every share of the labels and every seed, scored on the test split.

All methods of a seed share labels and order, and the students their first weights and dropout.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipkernels import adapters
from clipkernels.adapters import UnsupportedTower
from clipkernels.arguments import check_range
from clipkernels.data import Preprocess
from clipkernels.fingerprint import fingerprint
from clipkernels.images import Reader
from clipkernels.images.batches import Pictures, image_shape
from clipkernels.learn.checkpoints import seeded
from clipkernels.learn.distill import TargetedDistillation, Teacher, TeacherCache
from clipkernels.messages import quantity, skip_message
from clipkernels.questions.batches import ExampleBatches, TextTokens
from clipkernels.questions.examples import ExampleSet, kinds_of, score_examples
from clipkernels.questions.learners import ClipLearner, Learner, StudentLearner
from clipkernels.questions.plan import DISTILLED, Options, Plan, Training
from clipkernels.questions.preparation import count_cut, encode_images, encode_texts, files_digest
from clipkernels.questions.results import Progress, Results, Row
from clipkernels.questions.state import ImagesRecord, ScoreRecord, Settings, State
from clipkernels.questions.student import StudentTask, find_student, make_student, source_of
from clipkernels.questions.training import TrainingSettings, predict, steps_for, train
from clipkernels.support.features import encoder_of

FEATURES = "features"


class Stopped(Exception):
    """The caller stopped the run."""


def run_protocol(
    plan: Plan,
    model: nn.Module,
    preprocess: Preprocess,
    tokenizer: Any,
    options: Options,
    out: Path,
    progress: Callable[[Progress], bool] = lambda progress: False,
) -> Results:
    """Train and score every method, share and seed; go on from the state in a folder.

    Args:
        plan: the trainings and their data.
        model: the teacher, a whole CLIP in fp32 on its device, patched or not.
        preprocess, tokenizer: of the teacher.
        options: the settings.
        out: a folder, whose sub-folders `state` and `features` are the run's.
        progress: called after each batch; a true result stops the run.
    Raises:
        ValueError: no annotation is left to train on or to score, a student that does not fit, a state of other
            settings or data, or a loss that is not finite.
        UnsupportedTower: as in `Teacher`.
        OSError: an image, the features or the state cannot be read or written.
    Guarantees: the same bits, also if the run was killed and has gone on, on the same CPU with the same versions and
        number of threads. No generator of the caller is moved.
    """
    protocol = Protocol(plan, model, preprocess, tokenizer, options, progress)
    out.mkdir(parents=True, exist_ok=True)
    with State(out / "state", protocol.settings) as state:
        return protocol.run(state, TeacherCache(out / FEATURES, protocol.teacher, batch_size=options.batch_size))


class Protocol:
    """One run of the protocol; arguments as of `run_protocol`."""

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        preprocess: Preprocess,
        tokenizer: Any,
        options: Options,
        progress: Callable[[Progress], bool],
    ) -> None:
        self.plan, self.model, self.options, self.progress = plan, model, options, progress
        self.unread: dict[str, str] = {}
        self.teacher = Teacher(model, tokenizer)
        shape = image_shape(model, preprocess)
        self.pictures = Pictures((), preprocess, shape)
        self.size = (shape[1], shape[2])
        self.kinds = kinds_of(plan.train)
        for name, ends in (("lr", "()"), ("strength", "[)"), ("temperature", "()")):
            check_range(name, getattr(options, name), 0, math.inf, ends)
        self._check_left(plan.train, plan.test)
        self.student_class = find_student(options.student)
        self.task = self._task()
        with seeded(0):
            probe: Any = make_student(self.student_class, self.task)
        self.width, self.grid = probe.width, tuple(probe.grid)
        own = probe if hasattr(probe, "tokenize") else None
        reads, marks = self.teacher.reads, self.teacher.marks
        self.tokens = TextTokens(tokenizer, reads.context, marks.padding, own, self.teacher.pieces)
        self.clip_tokens = self.tokens._replace(student=None)
        encoder = encoder_of(model, preprocess, Reader())
        self.settings = Settings(
            task=plan.train.task, tower=fingerprint(model), text_tower=fingerprint(model, "text"),
            method=self.teacher.method, reader=encoder.reader, preprocess=encoder.preprocess,
            train=_digest_of(plan.train), test=_digest_of(plan.test), held_out=[plan.field, *plan.held_out],
            student=options.student or "", student_source=source_of(self.student_class), tuned=options.tuned,
            steps=options.steps, batch_size=options.batch_size, lr=options.lr, strength=options.strength,
            keep=options.keep, temperature=options.temperature,
        )  # fmt: skip

    def run(self, state: State, cached: TeacherCache) -> Results:
        """Train and score everything that the state does not have."""
        results = Results([], [*self.plan.notes()], self.unread)
        trainings = [
            Training(method, share, seed)
            for seed in range(self.plan.seeds)
            for share in self.plan.shares
            for method in self.plan.methods
        ]
        try:
            if any(state.score(training.name) is None for training in trainings):
                first, second = (self._batches(part, cached, self.tokens) for part in (self.plan.train, self.plan.test))
                encode_texts(self.plan, self.options, first, second, cached, self._report)
            train_set = self._readable(self.plan.train, "train", state, cached, results.notes)
            test_set = self._readable(self.plan.test, "test", state, cached, results.notes)
            self._check_left(train_set, test_set)
            absent = [name for name, side in self.plan.sides(test_set).items() if not side]
            results.notes.extend(f"test: no annotation is left for the split {name}" for name in absent)
            for number, training in enumerate(trainings, 1):
                record = state.score(training.name)
                if record is None:
                    label = f"training {number} of {len(trainings)}: {training.name}"
                    record = self._train(training, label, train_set, test_set, state, cached)
                results.rows.extend(_rows(training, record))
        except Stopped:
            return results._replace(stopped=True)
        return results

    def _task(self) -> StudentTask:
        shared = len(self.plan.train.classes)
        context = self.teacher.reads.context or self.teacher.probe.shape[1]
        try:
            tower = adapters.find_tower(self.model)
            grid = (self.size[0] // tower.patch, self.size[1] // tower.patch)
        except UnsupportedTower:  # a ResNet: the positions of its last feature map
            regions = self.teacher.see(torch.zeros(1, 3, *self.size)).regions
            assert regions is not None
            side = math.isqrt(regions.shape[1])
            grid = (side, side)
        embeddings = [module.num_embeddings for module in self.model.modules() if isinstance(module, nn.Embedding)]
        vocabulary = max([*embeddings, int(self.teacher.probe.max()) + 1])
        return StudentTask(shared or 1, self.size, grid, vocabulary, context, self.teacher.marks.padding)

    def _report(self, phase: str, done: int, total: int, item: str) -> None:
        if self.progress(Progress(phase, done, total, len(self.unread), item)):
            raise Stopped

    def _readable(
        self, examples: ExampleSet, split: str, state: State, cached: TeacherCache, notes: list[str]
    ) -> ExampleSet:
        """The examples whose images can be read; their features are in the cache.

        Raises:
            ValueError: images whose content is not that with which the run began.
        """
        regions = split == "train" and self.plan.distils
        paths = list(dict.fromkeys(example.image for example in examples.examples))
        files, record = files_digest(paths), state.images(split)
        if record is None or record.files != files or (regions and not record.regions):
            if record is None:
                batches = self._batches(examples, cached, self.clip_tokens)
                cut = count_cut(batches, self.clip_tokens, self.task.length, split, self._report)
            else:
                cut, regions = record.cut, regions or record.regions
            pictures = Pictures(paths, self.pictures.preprocess, self.pictures.shape)
            failed, content = encode_images(pictures, split, regions, self.options, cached, self.unread, self._report)
            if record is not None and record.content != content:
                raise ValueError(
                    f"expected the {split} images with which {state.folder} began, got other ones: put them back, or "
                    "choose another folder (--out)"
                )
            record = ImagesRecord(failed=failed, regions=regions, files=files, content=content, cut=cut)
            state.save_images(split, record)
        self.unread |= record.failed
        if record.cut:
            notes.append(f"{split}: {quantity(record.cut, 'text')} cut, because CLIP reads {self.task.length} tokens")
        unread = record.failed
        return examples._replace(examples=tuple(each for each in examples.examples if each.image not in unread))

    def _batches(self, examples: ExampleSet, cached: TeacherCache, tokens: TextTokens) -> ExampleBatches:
        grids = (self.grid, self.task.grid)
        return ExampleBatches(examples, self.pictures, tokens, cached, grids, self.options.workers, self.kinds)

    def _check_left(self, train_set: ExampleSet, test_set: ExampleSet) -> None:
        """Raise ValueError, with the counts, unless there are annotations to train on and to score."""
        for name, left in (("train on", self.plan.pool(train_set)), ("score", test_set.examples)):
            if not left:
                counts = [
                    *self.plan.notes(len(self.unread)),
                    *(skip_message(*item) for item in list(self.unread.items())[:1]),
                ]
                raise ValueError(f"expected annotations to {name}, got none that can be used: {'; '.join(counts)}")

    def _learner(self, training: Training) -> Learner:
        options, device = self.options, self.teacher.device
        with seeded(training.seed):
            if training.method == "finetune":
                clip = ClipLearner(
                    self.model, self.teacher.width, self.task.answers, options.tuned, self.task.length,
                    self.task.padding,
                )  # fmt: skip
                return clip.to(device)
            student: Any = self.student_class(self.task)
            objective = None
            if training.method in DISTILLED:
                plain: dict[str, Any] = {"keep": 1.0, "temperature": math.inf, "weight": None}
                targeted = {"keep": options.keep, "temperature": options.temperature}
                objective = TargetedDistillation(
                    self.teacher, self.width, self.width, strength=options.strength,
                    **(plain if training.method == "plain" else targeted),
                )  # fmt: skip
            return StudentLearner(student, objective).to(device)

    def _train(
        self,
        training: Training,
        label: str,
        train_set: ExampleSet,
        test_set: ExampleSet,
        state: State,
        cached: TeacherCache,
    ) -> ScoreRecord:
        """Train and score one learner."""
        options = self.options
        examples, classes = self.plan.subset(train_set, training)
        learner = self._learner(training)
        tokens = self.clip_tokens if isinstance(learner, ClipLearner) else self.tokens
        source = self._batches(examples, cached, tokens)
        count = len(examples.examples)
        full = isinstance(learner, ClipLearner) and options.tuned == "full"
        settings = TrainingSettings(
            steps_for(count, options.batch_size, options.steps), options.batch_size,
            options.full_lr if full else options.lr, seed=training.seed,
        )  # fmt: skip
        found = state.checkpoint(training.name)
        earlier, before = found or (None, 0.0)
        began = time.monotonic()

        def seconds() -> float:
            return before + time.monotonic() - began

        def report(step: int, loss: float) -> bool:
            return self.progress(Progress(label, step, settings.steps, len(self.unread), "step"))

        trained = train(
            learner, count,
            lambda indices: source.read(indices, features=learner.needs_features, texts=learner.needs_texts),
            settings, earlier=earlier, progress=report,
            save=lambda make, last: state.save_checkpoint(training.name, make, seconds(), last),
        )  # fmt: skip
        if trained.stopped:
            raise Stopped
        taken = seconds()
        scores, counts = self._score(learner, label, test_set, cached, tokens)
        record = ScoreRecord(
            scores=scores, counts=counts, train=len({example.item for example in examples.examples}),
            classes=classes, steps=trained.step, weight=trained.weight, seconds=taken,
        )  # fmt: skip
        state.save_score(training.name, record)
        return record

    def _score(
        self, learner: Learner, label: str, test_set: ExampleSet, cached: TeacherCache, tokens: TextTokens
    ) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
        """The scores of a learner by split, and the number of annotations of each."""
        count = len(test_set.examples)
        source = self._batches(test_set, cached, tokens)
        batches = source.read(torch.arange(count).split(self.options.batch_size), texts=learner.needs_texts)

        def report(done: int) -> bool:
            return self.progress(Progress(f"scoring {label}", done, count, len(self.unread), "example"))

        learner.eval()
        predictions = predict(learner, batches, report)
        if predictions is None:
            raise Stopped
        scores, counts = {}, {}
        for name, side in self.plan.sides(test_set).items():
            if not side:
                continue
            part = test_set._replace(examples=tuple(test_set.examples[index] for index in side))
            scores[name] = score_examples(part, [predictions[index] for index in side])
            counts[name] = len({example.item for example in part.examples})
        return scores, counts


def _rows(training: Training, record: ScoreRecord) -> list[Row]:
    return [
        Row(
            *training, split, metric, score, record.train, record.classes, record.counts[split], record.steps,
            record.weight, record.seconds,
        )
        for split, scores in record.scores.items()
        for metric, score in scores.items()
    ]  # fmt: skip


def _digest_of(examples: ExampleSet) -> str:
    """The SHA-256 of the annotations of a set and of its classes."""
    digest = sha256(repr((examples.task, examples.classes)).encode())
    for item in examples.items:
        digest.update(repr(tuple(item)).encode())
    return digest.hexdigest()
