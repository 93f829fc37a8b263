"""Study distillation of the bundled CLIP into a student that answers questions about photographs, by share of labels.

    python -m bench.studies.distill --images cifar10-val.tar.gz --pool cifar10-train.tar.gz --work features \\
        --out distill.csv
    python -m bench.studies.distill --images val_folder --pool train_folder --limit 300 --labelled 600 \\
        --seeds 2 --steps 100 --work quick --plot quick.png

The student is a small transformer over patches and letters with random initial weights. It is trained on questions
about images of the pool and evaluated on other images, clean and shifted: letters masked, images blurred and noisy. All
methods of a seed share labels, order, initial weights and dropout. Nothing is chosen on the evaluated images. The
teacher represents an answer by the captions of the classes that the answer stands for, because it has never read an
answer. The teacher itself was trained on CIFAR-10's training photographs with captions of their classes. If these are
the pool, it has seen all labels.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn.functional import one_hot

import clipkernels as ck
from bench.result_files import header_of, resume, save, write
from bench.studies.questions import MASKED, NOISE, Question, QuestionSet, ask, masked, questions_of, shifted
from bench.studies.ranking import preprocess_photos
from bench.studies.tiny_clip import read
from clipkernels import support
from clipkernels.data.tokenizer import END, PAD, VOCABULARY
from clipkernels.learn.checkpoints import seeded
from clipkernels.learn.distill import TargetedDistillation, Teacher, TeacherCache, TeacherFeatures, align_grid
from clipkernels.measure.environment import environment
from clipkernels.questions.batches import Batch
from clipkernels.questions.learners import StudentLearner
from clipkernels.questions.results import summarize
from clipkernels.questions.scores import ACCURACY, score_classes
from clipkernels.questions.student import DROPOUT, HEADS, LAYERS, WIDTH, Student, StudentTask
from clipkernels.questions.subsets import low_shot
from clipkernels.questions.training import EPOCHS, FEWEST_STEPS, TrainingSettings, predict, steps_for
from clipkernels.questions.training import train as train_learner

BATCH = 64
SHARES = (0.01, 0.05, 0.2, 1.0)
SPLITS = ("clean", "shifted")
MISSING = 0.05  # share of letters masked in training, for every method, so that the student knows masked letters
LETTERS = (1 + ord("a"), 1 + ord("z"))
MASK = END + 1
TEMPLATE = "a photo of a {}."
STRENGTH = 3.0  # the best of .1, .3, 1, 3 and 10 on 3000 other photographs of the pool, with another seed
NONE = "no distillation"
METHODS: dict[str, dict[str, Any] | None] = {
    NONE: None,
    "plain": {"strength": STRENGTH, "keep": 1.0, "temperature": math.inf, "weight": None},
    "targeted, weight 1": {"strength": STRENGTH, "weight": None},
    "targeted": {"strength": STRENGTH},
}


class Run(NamedTuple):
    """One training: its share of the labels, method and seed."""

    share: float
    method: str
    seed: int


class StudyData(NamedTuple):
    """Data shared by all runs.

    training: the images, questions and answers of the training set.
    evaluation: those of the evaluation set.
    questions: all questions.
    tokens: (q,T) letters of the questions.
    answers: (q,2,E) the teacher's embeddings of their answers.
    task: the shape of the student's task.
    """

    training: QuestionSet
    evaluation: QuestionSet
    questions: list[Question]
    tokens: Tensor
    answers: Tensor
    task: StudentTask


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 160)
    header = {**header_of(arguments, "limit", "labelled", "seeds", "steps", "threads"), "settings": settings()}
    records = resume(arguments.out, header)
    done = {(row["share"], row["method"], row["seed"]) for row in records}
    every = [Run(share, method, seed) for seed in range(arguments.seeds) for share in SHARES for method in METHODS]
    remaining_runs = [run for run in every if run not in done]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("teacher", total=None)
        cache_features(arguments, lambda n: bar.update(task, completed=n, total=arguments.labelled))
        bar.update(task, description="students", completed=0, total=len(remaining_runs))
        for rows in train_all(remaining_runs, arguments):
            records += rows
            bar.update(task, advance=1)
            if arguments.out:  # an interrupted run keeps its rows
                write(records, header, arguments.out)
    figures = summary(records)
    console.print(draw(figures))
    if arguments.plot:
        plot(figures, arguments.plot)


def settings() -> dict[str, Any]:
    """Return the constants that figures depend on, the package's included."""
    training = {name: value for name, value in TrainingSettings(0)._asdict().items() if name not in ("steps", "seed")}
    values = {**training, "batch_size": BATCH, "epochs": EPOCHS, "fewest_steps": FEWEST_STEPS, "missing": MISSING}
    shape = {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "dropout": DROPOUT}
    return {**values, **shape, "masked": MASKED, "noise": NOISE, "methods": repr(METHODS)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources: dict[str, Any] = {"type": Path, "required": True, "metavar": "DIR|FILE.tar.gz"}
    parser.add_argument("--images", **sources, help="images to report on: a sub-folder per class")
    parser.add_argument("--pool", **sources, help="images to learn from: a sub-folder per class")
    parser.add_argument(
        "--limit", type=int, default=3000, metavar="N", help="random images to report on; default %(default)s"
    )
    parser.add_argument(
        "--labelled",
        type=int,
        default=8000,
        metavar="N",
        help="random images of the pool with an answer; default %(default)s",
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="sets of labels, orders and initial weights; default %(default)s"
    )
    parser.add_argument(
        "--steps", type=int, default=600, help="steps of a training with all labels; default %(default)s"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each training; default %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="parallel trainings; default %(default)s")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the teacher's features")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.csv", help="a row per training and split; FILE.json adds the environment"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot of the accuracies")
    return parser.parse_args()


@cache
def load_data(images: Path, pool: Path, limit: int, labelled: int) -> StudyData:
    """Return images, questions and answers; the same in every process."""
    photos, classes = read(images)
    pool_photos, pool_classes = read(pool)
    if pool_classes != classes:
        raise SystemExit(
            f"error: expected --pool with the classes of --images ({', '.join(classes)}), got {pool_classes}"
        )
    model, _, tokenizer = ck.bundled()
    questions = questions_of(classes)
    training_photos, evaluation_photos = preprocess_photos(pool_photos, labelled), preprocess_photos(photos, limit)
    tokens = tokenizer([question.text for question in questions])
    captions = support.class_embeddings(model, tokenizer, support.photo(classes, (TEMPLATE,)))
    means = [torch.stack([captions[list(answer)].mean(0) for answer in question.says]) for question in questions]
    tokens = tokens[:, : int((tokens != PAD).sum(1).max())]
    return StudyData(
        ask(training_photos.images, training_photos.labels, questions, seed=0),
        ask(evaluation_photos.images, evaluation_photos.labels, questions, seed=1),
        questions,
        tokens,
        torch.stack(means),
        task_of(tokens),
    )


def task_of(tokens: Tensor) -> StudentTask:
    """Return the shape of the student's task: two answers to the letters (q,T) of a question, one of them masked."""
    tower = ck.tower_of(ck.bundled()[0])
    grid = (tower.image_size[0] // tower.patch, tower.image_size[1] // tower.patch)
    return StudentTask(2, tower.image_size, grid, VOCABULARY + 1, tokens.shape[1], PAD)


@cache
def cache_of(work: Path) -> TeacherCache:
    """Return the cache of the teacher's features in a folder."""
    model, _, tokenizer = ck.bundled()
    return TeacherCache(work, Teacher(model, tokenizer))


def data_from(arguments: argparse.Namespace) -> StudyData:
    """Return the data that the options select."""
    return load_data(arguments.images, arguments.pool, arguments.limit, arguments.labelled)


def cache_features(arguments: argparse.Namespace, progress: Callable[[int], None]) -> None:
    """Compute the teacher's features of every training image and every question, once for all runs."""
    data, cached = data_from(arguments), cache_of(arguments.work)
    cached.add(texts=[question.text for question in data.questions])
    cached.add(images=data.training.images.split(256), progress=lambda _, done, __: progress(done))


def train_all(runs: Sequence[Run], arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of every run as it finishes."""
    if arguments.jobs == 1:
        yield from (rows_of(run, arguments) for run in runs)
        return
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(rows_of, run, arguments) for run in runs]):
            yield done.result()


def rows_of(run: Run, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train one student; return a row with its accuracy for each split."""
    torch.set_num_threads(arguments.threads)
    data, cached = data_from(arguments), cache_of(arguments.work)
    start = time.process_time()
    student, weight = train(run, data, cached, arguments.steps)
    seconds = time.process_time() - start
    images, tokens = data.evaluation.images, data.tokens[data.evaluation.questions]
    splits = {"clean": (images, tokens), "shifted": shifted(images, tokens, MASK, LETTERS, seed=0)}
    rows = []
    for split, inputs in splits.items():
        right = round(100 * correct(student, *inputs, data.evaluation.labels), 2)
        row = {**run._asdict(), "split": split, "accuracy": right, "weight": weight}
        rows.append({**row, "images": len(images), "seconds": round(seconds, 1), "commit": environment()["commit"]})
    return rows


def train(run: Run, data: StudyData, cached: TeacherCache, steps: int) -> tuple[StudentLearner, float | None]:
    """Return a trained student, and the mean weight of the distances; None without distillation."""
    labels = data.training.labels
    labelled = data.training.take(low_shot(labels.tolist(), run.share, run.seed))
    with seeded(run.seed):
        student = Student(data.task)
        options = METHODS[run.method]
        objective = None if options is None else TargetedDistillation(cached, student.width, student.width, **options)
    learner = StudentLearner(student, objective)
    places, generator = align_grid(student.grid, data.task.grid), torch.Generator().manual_seed(run.seed)

    def batches(indices: Sequence[Tensor]) -> Iterator[Batch]:
        for index in indices:
            part = labelled.take(index)
            tokens = masked(data.tokens[part.questions], MASK, LETTERS, MISSING, generator)
            features = None if objective is None else teacher_features(cached, data, part, places)
            yield batch_of(part, tokens, features)

    count = len(labelled.labels)
    settings = TrainingSettings(steps_for(count, BATCH, steps), BATCH, seed=run.seed)
    trained = train_learner(learner, count, batches, settings)
    return learner, None if trained.weight is None else round(trained.weight, 3)


def batch_of(part: QuestionSet, tokens: Tensor, features: TeacherFeatures | None = None) -> Batch:
    """Return questions with two answers as a batch."""
    targets, candidates = one_hot(part.labels, 2).float(), torch.arange(2).expand(len(tokens), 2)
    return Batch(
        part.images, tokens[:, None], targets, part.labels, candidates, part.labels, features or TeacherFeatures()
    )


def teacher_features(cached: TeacherCache, data: StudyData, part: QuestionSet, places: Tensor) -> TeacherFeatures:
    """Return the teacher's features of a batch, aligned with the student's letters and patches."""
    features = cached(part.images, [data.questions[at].text for at in part.questions.tolist()])
    features = features.align(words=torch.arange(data.tokens.shape[1]), regions=places)
    return features._replace(answers=data.answers[part.questions])


def correct(learner: StudentLearner, images: Tensor, tokens: Tensor, labels: Tensor) -> float:
    """Return the share of correctly answered questions."""
    parts = zip(images.split(500), tokens.split(500), labels.split(500), strict=True)
    batches = (batch_of(QuestionSet(each, answers, answers), ids) for each, ids, answers in parts)
    predictions = predict(learner, batches)
    assert predictions is not None
    return score_classes(predictions, labels.tolist(), ())[ACCURACY]


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with mean and standard deviation over seeds of the accuracy, and of its gain over no distillation."""
    scores = [{**row, "metric": ACCURACY, "score": row["accuracy"]} for row in records]
    rows = [
        {
            **{name: row[name] for name in ("split", "share", "method", "seeds")},
            **{"accuracy": row["score"], "accuracy_sd": row["sd"] or 0.0},
            **{"over": math.nan if row["gain"] is None else row["gain"], "over_sd": row["gain_sd"] or 0.0},
        }
        for row in summarize(scores, NONE)
    ]
    return sorted(rows, key=lambda row: (SPLITS.index(row["split"]), row["share"], list(METHODS).index(row["method"])))


def draw(figures: Sequence[dict[str, Any]]) -> Table:
    """Return a terminal table of the summary."""
    title = "correct answers in %, and gain over the student without distillation: mean ± sd over seeds"
    table = Table("images", "labels", "method", "seeds", "accuracy", "gain", title=title)
    for row in figures:
        accuracy, over = (f"{row[key]:.2f} ± {row[key + '_sd']:.2f}" for key in ("accuracy", "over"))
        table.add_row(row["split"], f"{row['share']:.0%}", row["method"], str(row["seeds"]), accuracy, over)
    return table


def plot(figures: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot accuracy against the share of the labels, one panel for clean and one for shifted images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    for axes, split in zip(figure.subplots(1, len(SPLITS), sharey=True), SPLITS, strict=True):
        for method in METHODS:
            line = [row for row in figures if (row["split"], row["method"]) == (split, method)]
            values, bars = ([row[key] for row in line] for key in ("accuracy", "accuracy_sd"))
            axes.errorbar([100 * row["share"] for row in line], values, yerr=bars, fmt="o-", capsize=3, label=method)
        axes.set(xlabel="labels, %", ylabel="correct answers, %", title=split, xscale="log")
        axes.set_xticks([100 * share for share in SHARES], [f"{share:.0%}" for share in SHARES])
        axes.grid(alpha=0.3)
        axes.legend()
    save(figure, file)


if __name__ == "__main__":
    main()
