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
import statistics
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
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import clipkernels as ck
from bench.result_files import deviation, header_of, resume, save, write
from bench.studies.questions import MASKED, NOISE, Question, QuestionSet, ask, masked, questions_of, shifted
from bench.studies.ranking import preprocess_photos
from bench.studies.tiny_clip import read
from clipkernels import support
from clipkernels.data.tokenizer import END, PAD, VOCABULARY
from clipkernels.learn.checkpoints import seeded
from clipkernels.learn.distill import TargetedDistillation, Teacher, TeacherCache, TeacherFeatures, align_grid
from clipkernels.measure.environment import environment

BATCH = 64
SHARES = (0.01, 0.05, 0.2, 1.0)
SPLITS = ("clean", "shifted")
LR, WARMUP = 1e-3, 0.05  # share of the steps
EPOCHS, FEWEST = 60, 300  # most epochs (with few labels), fewest steps
MISSING = 0.05  # share of letters masked in training, for every method, so that the student knows masked letters
SIDE = 4  # patches per side of the student, half the teacher's
WIDTH, LAYERS, HEADS, DROPOUT = 64, 2, 2, 0.1
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


class Student(nn.Module):
    """One transformer over patches and letters that answers (B,2) from a token before them."""

    def __init__(self, patch: int, length: int) -> None:
        super().__init__()
        self.patches = SIDE**2
        self.embed = nn.Conv2d(3, WIDTH, patch, patch)
        self.letters = nn.Embedding(VOCABULARY + 1, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(1 + self.patches + length, WIDTH))
        self.first = nn.Parameter(0.02 * torch.randn(WIDTH))
        self.drop = nn.Dropout(DROPOUT)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.answer = nn.Linear(WIDTH, 2)

    def forward(self, images: Tensor, tokens: Tensor) -> StudentOutput:
        patches = self.embed(images).flatten(2).mT
        first = self.first.expand(len(images), 1, -1)
        x = torch.cat([first, patches, self.letters(tokens)], 1) + self.places
        padding = pad(tokens == PAD, (1 + self.patches, 0))
        x = self.blocks(self.drop(x), src_key_padding_mask=padding)
        visual, text = x[:, 1 : 1 + self.patches], x[:, 1 + self.patches :]
        return StudentOutput(self.answer(x[:, 0]), x[:, 0], visual, text)


class StudentOutput(NamedTuple):
    """A student's logits (B,2), first token (B,C), patches (B,P,C) and letters (B,T,C)."""

    logits: Tensor
    pooled: Tensor
    visual: Tensor
    text: Tensor


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
    """

    training: QuestionSet
    evaluation: QuestionSet
    questions: list[Question]
    tokens: Tensor
    answers: Tensor


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
    """Return the module's constants that figures depend on."""
    names = ("BATCH", "LR", "WARMUP", "EPOCHS", "FEWEST", "MISSING", "SIDE", "WIDTH", "LAYERS", "HEADS", "DROPOUT")
    values = {name.lower(): globals()[name] for name in names}
    return {**values, "masked": MASKED, "noise": NOISE, "methods": repr(METHODS)}


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
    return StudyData(
        ask(training_photos.images, training_photos.labels, questions, seed=0),
        ask(evaluation_photos.images, evaluation_photos.labels, questions, seed=1),
        questions,
        tokens[:, : int((tokens != PAD).sum(1).max())],
        torch.stack(means),
    )


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


def train(run: Run, data: StudyData, cached: TeacherCache, steps: int) -> tuple[Student, float | None]:
    """Return a trained student, and the mean weight of the distances; None without distillation."""
    generator = torch.Generator().manual_seed(run.seed)
    training, tower = data.training, ck.tower_of(ck.bundled()[0])
    grid = tower.image_size[0] // tower.patch
    places = align_grid((SIDE, SIDE), (grid, grid))
    labelled = training.take(
        torch.randperm(len(training.labels), generator=generator)[: round(run.share * len(training.labels))]
    )
    steps = min(steps, max(FEWEST, EPOCHS * math.ceil(len(labelled.labels) / BATCH)))
    with seeded(run.seed):
        student = Student(tower.image_size[0] // SIDE, data.tokens.shape[1])
        options, weights = METHODS[run.method], []
        distil = None if options is None else TargetedDistillation(cached, text=WIDTH, visual=WIDTH, **options)
        torch.manual_seed(run.seed)  # the same dropout, whichever modules were created
        parts = [part for part in (student, distil) if part is not None]
        optimizer = torch.optim.AdamW(
            [parameter for part in parts for parameter in part.parameters()], LR, weight_decay=0.05
        )
        for step, index in zip(range(steps), batches(len(labelled.labels), generator), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = LR * min(1, (step + 1) / (WARMUP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
            batch = labelled.take(index)
            answered = student(batch.images, masked(data.tokens[batch.questions], MASK, LETTERS, MISSING, generator))
            loss = cross_entropy(answered.logits, batch.labels)
            if distil is not None:
                states = {"visual": answered.visual, "text": answered.text}
                states |= {"visual_pooled": answered.pooled, "text_pooled": answered.pooled, "logits": answered.logits}
                distilled = distil(teacher_features(cached, data, batch, places), **states, labels=batch.labels)
                weights.append(float(distilled.weight.mean()))
                loss = loss + distilled.loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return student.eval(), round(statistics.mean(weights), 3) if weights else None


def teacher_features(cached: TeacherCache, data: StudyData, batch: QuestionSet, places: Tensor) -> TeacherFeatures:
    """Return the teacher's features of a batch, aligned with the student's letters and patches."""
    features = cached(batch.images, [data.questions[at].text for at in batch.questions.tolist()])
    features = features.align(words=torch.arange(data.tokens.shape[1]), regions=places)
    return features._replace(answers=data.answers[batch.questions])


def batches(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches of indices below `count` forever, in a new random order for each pass."""
    while True:
        yield from torch.randperm(count, generator=generator).split(BATCH)


@torch.inference_mode()
def correct(student: Student, images: Tensor, tokens: Tensor, labels: Tensor) -> float:
    """Return the share of correctly answered questions."""
    parts = zip(images.split(500), tokens.split(500), strict=True)
    return float((torch.cat([student(*part).logits.argmax(1) for part in parts]) == labels).double().mean())


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with mean and standard deviation over seeds of the accuracy, and of its gain over no distillation."""
    rows = []
    accuracy = {(row["split"], row["share"], row["method"], row["seed"]): row["accuracy"] for row in records}
    for split, share, method in dict.fromkeys(key[:3] for key in accuracy):
        seeds = sorted(key[3] for key in accuracy if key[:3] == (split, share, method))
        values = [accuracy[split, share, method, seed] for seed in seeds]
        base = [accuracy.get((split, share, NONE, seed), math.nan) for seed in seeds]
        over = [a - b for a, b in zip(values, base, strict=True)]
        rows.append(
            {
                **{"split": split, "share": share, "method": method, "seeds": len(seeds)},
                **{"accuracy": statistics.mean(values), "accuracy_sd": deviation(values)},
                **{"over": statistics.mean(over), "over_sd": deviation(over)},
            }
        )
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
