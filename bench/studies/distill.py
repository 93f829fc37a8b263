"""What distilling the bundled CLIP is worth to a student that answers questions about photographs, by its labels.

    python -m bench.studies.distill --images cifar10-val.tar.gz --pool cifar10-train.tar.gz --work features \\
        --out distill.csv
    python -m bench.studies.distill --images val_folder --pool train_folder --limit 300 --labelled 600 \\
        --seeds 2 --steps 100 \\
        --work quick --plot quick.png

The student, a small transformer over patches and letters, starts from nothing. It is taught on questions about images
of the pool and reported on others, as they are and shifted: letters masked, images blurred and noisy. All methods of a
seed share labels, order, first weights and dropout; nothing is chosen by the images that are reported on. The teacher
says what an answer means by the captions of the classes that it leaves, for it has never read an answer. It was itself
trained on CIFAR-10's training photographs with captions of their classes: where these are the pool, it has seen all
labels.
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
from bench.studies.questions import MASKED, NOISE, Asked, Question, ask, masked, questions_of, shifted
from bench.studies.ranking import prepared
from bench.studies.tiny_clip import read
from clipkernels import support
from clipkernels.data.tokenizer import END, PAD, VOCABULARY
from clipkernels.learn.checkpoints import seeded
from clipkernels.learn.distill import TargetedDistillation, Teacher, TeacherCache, TeacherFeatures, align_grid
from clipkernels.measure.environment import environment

BATCH = 64
SHARES = (0.01, 0.05, 0.2, 1.0)
SPLITS = ("clean", "shifted")
LR, WARMUP = 1e-3, 0.05  # of the steps
EPOCHS, FEWEST = 60, 300  # passes over few labels at most, but so many steps at least
MISSING = 0.05  # of the letters, in training, whatever the method: a student has to know what a gap is
SIDE = 4  # patches of the student, half as many as the teacher has
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
    """Patches and letters in one transformer, and an answer (B,2) from the token that stands before them."""

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

    def forward(self, images: Tensor, tokens: Tensor) -> Answered:
        patches = self.embed(images).flatten(2).mT
        first = self.first.expand(len(images), 1, -1)
        x = torch.cat([first, patches, self.letters(tokens)], 1) + self.places
        padding = pad(tokens == PAD, (1 + self.patches, 0))
        x = self.blocks(self.drop(x), src_key_padding_mask=padding)
        visual, text = x[:, 1 : 1 + self.patches], x[:, 1 + self.patches :]
        return Answered(self.answer(x[:, 0]), x[:, 0], visual, text)


class Answered(NamedTuple):
    """Logits (B,2), the first token (B,C), the patches (B,P,C) and the letters (B,T,C)."""

    logits: Tensor
    pooled: Tensor
    visual: Tensor
    text: Tensor


class Run(NamedTuple):
    """One training: the share of the labels, the method, the seed."""

    share: float
    method: str
    seed: int


class School(NamedTuple):
    """What all runs share: what is taught and asked, the questions, their letters (q,T), and what the teacher takes
    their answers for, (q,2,E)."""

    taught: Asked
    asked: Asked
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
    left = [run for run in every if run not in done]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("the teacher", total=None)
        remember(arguments, lambda n: bar.update(task, completed=n, total=arguments.labelled))
        bar.update(task, description="students", completed=0, total=len(left))
        for rows in trained(left, arguments):
            records += rows
            bar.update(task, advance=1)
            if arguments.out:  # a long run that is cut short keeps what it has
                write(records, header, arguments.out)
    found = summary(records)
    console.print(draw(found))
    if arguments.plot:
        plot(found, arguments.plot)


def settings() -> dict[str, Any]:
    """What else a figure depends on."""
    names = ("BATCH", "LR", "WARMUP", "EPOCHS", "FEWEST", "MISSING", "SIDE", "WIDTH", "LAYERS", "HEADS", "DROPOUT")
    found = {name.lower(): globals()[name] for name in names}
    return {**found, "masked": MASKED, "noise": NOISE, "methods": repr(METHODS)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources: dict[str, Any] = {"type": Path, "required": True, "metavar": "DIR|FILE.tar.gz"}
    parser.add_argument("--images", **sources, help="to report on: a sub-folder per class")
    parser.add_argument("--pool", **sources, help="to learn from: likewise")
    parser.add_argument("--limit", type=int, default=3000, metavar="N", help="images to report on, drawn at random")
    parser.add_argument("--labelled", type=int, default=8000, metavar="N", help="images of the pool with an answer")
    parser.add_argument("--seeds", type=int, default=5, help="sets of labels, orders and first weights")
    parser.add_argument("--steps", type=int, default=600, help="of a training with all labels")
    parser.add_argument("--threads", type=int, default=1, help="of each training")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where the teacher's features are kept")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="a row per training and split; a .json beside it")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="a picture of the accuracies")
    return parser.parse_args()


@cache
def school_of(images: Path, pool: Path, limit: int, labelled: int) -> School:
    """Images, questions and answers; the same in every process."""
    photos, classes = read(images)
    others, same = read(pool)
    if same != classes:
        raise SystemExit(f"error: expected --pool with the classes of --images ({', '.join(classes)}), got {same}")
    model, _, tokenizer = ck.bundled()
    questions = questions_of(classes)
    taught, asked = prepared(others, labelled), prepared(photos, limit)
    tokens = tokenizer([question.text for question in questions])
    captions = support.class_embeddings(model, tokenizer, support.photo(classes, (TEMPLATE,)))
    means = [torch.stack([captions[list(says)].mean(0) for says in question.says]) for question in questions]
    return School(
        ask(taught.images, taught.labels, questions, seed=0),
        ask(asked.images, asked.labels, questions, seed=1),
        questions,
        tokens[:, : int((tokens != PAD).sum(1).max())],
        torch.stack(means),
    )


@cache
def cache_of(work: Path) -> TeacherCache:
    """What the teacher said."""
    model, _, tokenizer = ck.bundled()
    return TeacherCache(work, Teacher(model, tokenizer))


def here(arguments: argparse.Namespace) -> School:
    return school_of(arguments.images, arguments.pool, arguments.limit, arguments.labelled)


def remember(arguments: argparse.Namespace, progress: Callable[[int], None]) -> None:
    """Has the teacher look at every image and read every question, once for all runs."""
    school, kept = here(arguments), cache_of(arguments.work)
    kept.add(texts=[question.text for question in school.questions])
    kept.add(images=school.taught.images.split(256), progress=lambda _, came, __: progress(came))


def trained(runs: Sequence[Run], arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The rows of every run, as they come."""
    if arguments.jobs == 1:
        yield from (rows_of(run, arguments) for run in runs)
        return
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(rows_of, run, arguments) for run in runs]):
            yield done.result()


def rows_of(run: Run, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One student taught, and how many questions of either split it answers."""
    torch.set_num_threads(arguments.threads)
    school, kept = here(arguments), cache_of(arguments.work)
    start = time.process_time()
    student, weight = taught(run, school, kept, arguments.steps)
    seconds = time.process_time() - start
    images, tokens = school.asked.images, school.tokens[school.asked.questions]
    splits = {"clean": (images, tokens), "shifted": shifted(images, tokens, MASK, LETTERS, seed=0)}
    rows = []
    for split, seen in splits.items():
        right = round(100 * correct(student, *seen, school.asked.labels), 2)
        row = {**run._asdict(), "split": split, "accuracy": right, "weight": weight}
        rows.append({**row, "images": len(images), "seconds": round(seconds, 1), "commit": environment()["commit"]})
    return rows


def taught(run: Run, school: School, kept: TeacherCache, steps: int) -> tuple[Student, float | None]:
    """A student after its training, and the mean weight of the distances in it."""
    generator = torch.Generator().manual_seed(run.seed)
    every, tower = school.taught, ck.tower_of(ck.bundled()[0])
    grid = tower.image_size[0] // tower.patch
    places = align_grid((SIDE, SIDE), (grid, grid))
    some = every.take(torch.randperm(len(every.labels), generator=generator)[: round(run.share * len(every.labels))])
    steps = min(steps, max(FEWEST, EPOCHS * math.ceil(len(some.labels) / BATCH)))
    with seeded(run.seed):
        student = Student(tower.image_size[0] // SIDE, school.tokens.shape[1])
        options, weights = METHODS[run.method], []
        distil = None if options is None else TargetedDistillation(kept, text=WIDTH, visual=WIDTH, **options)
        torch.manual_seed(run.seed)  # whatever was made, dropout is the same
        parts = [part for part in (student, distil) if part is not None]
        optimizer = torch.optim.AdamW([each for part in parts for each in part.parameters()], LR, weight_decay=0.05)
        for step, index in zip(range(steps), batches(len(some.labels), generator), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = LR * min(1, (step + 1) / (WARMUP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
            batch = some.take(index)
            answered = student(batch.images, masked(school.tokens[batch.questions], MASK, LETTERS, MISSING, generator))
            loss = cross_entropy(answered.logits, batch.labels)
            if distil is not None:
                states = {"visual": answered.visual, "text": answered.text}
                states |= {"visual_pooled": answered.pooled, "text_pooled": answered.pooled, "logits": answered.logits}
                found = distil(said(kept, school, batch, places), **states, labels=batch.labels)
                weights.append(float(found.weight.mean()))
                loss = loss + found.loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return student.eval(), round(statistics.mean(weights), 3) if weights else None


def said(kept: TeacherCache, school: School, batch: Asked, places: Tensor) -> TeacherFeatures:
    """What the teacher says of a batch: of as many letters as the student has, and of each of its patches."""
    found = kept(batch.images, [school.questions[at].text for at in batch.questions.tolist()])
    found = found.align(words=torch.arange(school.tokens.shape[1]), regions=places)
    return found._replace(answers=school.answers[batch.questions])


def batches(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of so many instances in ever new orders, without end."""
    while True:
        yield from torch.randperm(count, generator=generator).split(BATCH)


@torch.inference_mode()
def correct(student: Student, images: Tensor, tokens: Tensor, labels: Tensor) -> float:
    """The share of the questions that are answered right."""
    parts = zip(images.split(500), tokens.split(500), strict=True)
    return float((torch.cat([student(*part).logits.argmax(1) for part in parts]) == labels).double().mean())


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, of the accuracy and of what it is above that without distillation."""
    found = []
    accuracy = {(row["split"], row["share"], row["method"], row["seed"]): row["accuracy"] for row in records}
    for split, share, method in dict.fromkeys(key[:3] for key in accuracy):
        seeds = sorted(key[3] for key in accuracy if key[:3] == (split, share, method))
        own = [accuracy[split, share, method, seed] for seed in seeds]
        base = [accuracy.get((split, share, NONE, seed), math.nan) for seed in seeds]
        over = [a - b for a, b in zip(own, base, strict=True)]
        found.append(
            {
                **{"split": split, "share": share, "method": method, "seeds": len(seeds)},
                **{"accuracy": statistics.mean(own), "accuracy_sd": deviation(own)},
                **{"over": statistics.mean(over), "over_sd": deviation(over)},
            }
        )
    return sorted(found, key=lambda row: (SPLITS.index(row["split"]), row["share"], list(METHODS).index(row["method"])))


def draw(found: Sequence[dict[str, Any]]) -> Table:
    """The summary for people."""
    title = "questions answered right in %, and above the student that was not distilled: mean ± sd over seeds"
    table = Table("images", "labels", "method", "seeds", "accuracy", "above", title=title)
    for row in found:
        accuracy, over = (f"{row[key]:.2f} ± {row[key + '_sd']:.2f}" for key in ("accuracy", "over"))
        table.add_row(row["split"], f"{row['share']:.0%}", row["method"], str(row["seeds"]), accuracy, over)
    return table


def plot(found: Sequence[dict[str, Any]], file: Path) -> None:
    """Accuracy by the share of the labels, one panel for images as they are, one for shifted ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    for axes, split in zip(figure.subplots(1, len(SPLITS), sharey=True), SPLITS, strict=True):
        for method in METHODS:
            line = [row for row in found if (row["split"], row["method"]) == (split, method)]
            values, bars = ([row[key] for row in line] for key in ("accuracy", "accuracy_sd"))
            axes.errorbar([100 * row["share"] for row in line], values, yerr=bars, fmt="o-", capsize=3, label=method)
        axes.set(xlabel="labels, %", ylabel="questions answered right, %", title=split, xscale="log")
        axes.set_xticks([100 * share for share in SHARES], [f"{share:.0%}" for share in SHARES])
        axes.grid(alpha=0.3)
        axes.legend()
    save(figure, file)


if __name__ == "__main__":
    main()
