"""Study Patch Ranking on the bundled CLIP: agreement of its predictor with golden rankings, and accuracy after pruning.

    python -m bench.studies.ranking --images cifar10-val.tar.gz --pool cifar10-train.tar.gz --work rankings \\
        --out ranking.csv
    python -m bench.studies.ranking --images val_folder --pool train_folder --limit 500 --ranked 200 \\
        --golden 100 --seeds 2 --work quick --plot quick.png

Rankings and training use only the pool. Every figure is reported on the images, and nothing is chosen on them. "golden"
rows rank each image by exhaustive search, "label" with the true class; they are upper bounds and no usable methods. All
rows of a block prune once, before its attention. EViT and ToMe prune inside the block before it, which saves that
block's MLP, too.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import clipkernels as ck
from bench.result_files import deviation, header_of, resume, save, write
from bench.studies.tiny_clip import read, sample_shots
from clipkernels import support
from clipkernels.learn.patch_ranking import (
    Rankings,
    RankPredictor,
    fit_predictor,
    fit_tokens,
    golden_ranking,
    overlap,
)
from clipkernels.measure.environment import environment
from clipkernels.measure.timing import plan_for
from clipkernels.tower import TowerInput, run

BATCH = 50  # small enough for the CPU's caches, which is faster
REMOVED_SHARES = (0.0, 0.2, 0.4, 0.6)
SHOTS = 16
TEMPLATE = "a photo of a {}."
COLORS = [*(f"C{at}" for at in range(10)), "black"]
PLOT_TOP = 3  # upper limit of the plot, in points above dense
SCORES = ("label", "confidence", "feature")


class Photos(NamedTuple):
    """Preprocessed images (n,3,S,S) and their classes (n,)."""

    images: Tensor
    labels: Tensor

    def take(self, index: Tensor | slice) -> Photos:
        return Photos(self.images[index], self.labels[index])


class FixedScores(nn.Module):
    """A predictor that returns preset scores: of the next batch, (B,P), or of every image, (1,P)."""

    macs, about = 0, None
    scores: Tensor

    def __init__(self, tokens: int, block: int) -> None:
        super().__init__()
        self.tokens, self.prefix, self.block = tokens, 1, block

    def check_tower(self, tower: Any) -> None:
        """Accept any tower."""

    def forward(self, x: Tensor, prefix: int) -> Tensor:
        return self.scores.expand(x.shape[0], -1)


@dataclass(frozen=True)
class Study:
    """Inputs shared by all rows of a block: images, classes, golden rankings, and the options of training."""

    block: int
    images: Photos
    pool: Photos
    classes: Sequence[str]
    text: Tensor
    pool_rankings: Rankings
    golden_rankings: dict[str, Rankings]
    score: str
    seeds: int
    dense: Tensor


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 160)
    header = header_of(arguments, "limit", "golden", "ranked", "score", "seeds", "threads")
    records = resume(arguments.out, header)
    arguments.work.mkdir(parents=True, exist_ok=True)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for row in rows({(row["block"], row["gone"], row["method"]) for row in records}, arguments, bar):
            records.append(row)
            if arguments.out:  # an interrupted run keeps its rows
                write(records, header, arguments.out)
    console.print(draw(records))
    if arguments.plot:
        plot(records, arguments.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources: dict[str, Any] = {"type": Path, "required": True, "metavar": "DIR|FILE.tar.gz"}
    parser.add_argument("--images", **sources, help="images to report on: a sub-folder per class")
    parser.add_argument("--pool", **sources, help="images to rank and to learn from: a sub-folder per class")
    parser.add_argument(
        "--blocks", default="3", metavar="B,…", help="blocks before which patches are removed; default %(default)s"
    )
    parser.add_argument(
        "--limit", type=int, default=5000, metavar="N", help="random images to report on; default %(default)s"
    )
    parser.add_argument(
        "--golden",
        type=int,
        default=1000,
        metavar="N",
        help="images of these with a golden ranking; default %(default)s",
    )
    parser.add_argument(
        "--ranked",
        type=int,
        default=4000,
        metavar="N",
        help="images of the pool with a golden ranking; default %(default)s",
    )
    parser.add_argument(
        "--score", choices=SCORES, default="label", help="score of the training rankings; default %(default)s"
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="predictors, few-shot sets and random rankings; default %(default)s"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default %(default)s")
    parser.add_argument(
        "--work", type=Path, required=True, metavar="DIR", help="folder of rankings and predictors, which are reused"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="rows; FILE.json adds the environment")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot of the accuracies")
    return parser.parse_args()


def rows(done: set[tuple[int, float, str]], arguments: argparse.Namespace, bar: Progress) -> Iterator[dict[str, Any]]:
    """Yield every row that is not done."""
    photos, classes = read(arguments.images)
    pool_photos, pool_classes = read(arguments.pool)
    if pool_classes != classes:
        raise SystemExit(
            f"error: expected --pool with the classes of --images ({', '.join(classes)}), got {pool_classes}"
        )
    images, pool = preprocess_photos(photos, arguments.limit), preprocess_photos(pool_photos, arguments.ranked)
    model, _, tokenizer = ck.bundled()
    text = support.class_embeddings(model, tokenizer, support.photo(classes, (TEMPLATE,)))
    task = bar.add_task("", total=None)

    def rank(source: str, photos: Photos, score: str, block: int) -> Rankings:
        bar.update(task, description=f"block {block}: ranking {source} by {score}")
        extra: dict[str, Any] = {} if score == "feature" else {"text": text}
        extra |= {"labels": photos.labels} if score == "label" else {}
        file = arguments.work / f"{source}-{score}-{block}.safetensors"
        show: Callable[[int, int], None] = lambda n, of: bar.update(task, completed=n, total=of)  # noqa: E731
        return golden_ranking(model, photos.images, score=score, block=block, path=file, progress=show, **extra)

    for block in (int(block) for block in arguments.blocks.split(",")):
        golden_images = images.take(slice(0, arguments.golden))
        pool_rankings = rank("pool", pool, arguments.score, block)
        golden_rankings = {score: rank("images", golden_images, score, block) for score in SCORES}
        dense = correct_images(text, images, ck.Dense())
        study = Study(
            block, images, pool, classes, text, pool_rankings, golden_rankings, arguments.score, arguments.seeds, dense
        )
        predictors = []
        for seed in range(arguments.seeds):
            bar.update(task, description=f"block {block}: predictor {seed}", total=None)
            file = arguments.work / f"predictor-{arguments.score}-{block}-{arguments.ranked}-{seed}.safetensors"
            if not file.exists():
                fit_predictor(study.pool_rankings, seed=seed, held_out=0).predictor.save(file)
            predictors.append(RankPredictor.load(file))
        for share in REMOVED_SHARES:
            for name, make in makers(study, share, predictors).items():
                if (block, share, name) not in done:
                    bar.update(task, description=f"block {block}, {share:.0%} removed: {name}", total=None)
                    yield row(study, share, name, make())


def preprocess_photos(photos: Any, limit: int) -> Photos:
    """Return `limit` random photographs, preprocessed, and their classes."""
    preprocess = ck.bundled()[1]
    selection = np.random.default_rng(0).permutation(len(photos.labels))[:limit]
    images = torch.stack([preprocess(Image.fromarray(photos.images[index])) for index in selection])
    return Photos(images, torch.from_numpy(photos.labels[selection]))


class Outcome(NamedTuple):
    """The result of a method.

    correct: for every seed, booleans (n,) of the first n images, true if the class is correct.
    overlaps: shares of the removed patches that the golden ranking also removes; empty if not measured.
    method: the method of the first seed.
    """

    correct: list[Tensor]
    overlaps: list[float]
    method: Any


def makers(study: Study, share: float, predictors: list[RankPredictor]) -> dict[str, Callable[[], Outcome]]:
    """Return a function for every row of a block and a share of removed patches, by the row's name."""
    if not share:
        return {"learnt tokens": partial(with_tokens, study, [ck.PatchRanking(predictors[0], 1.0)] * study.seeds)}
    patches = study.pool_rankings.ranks.shape[1]
    num_removed = round(share * patches)
    keep, before = (patches - num_removed) / patches, study.block - 1
    merged = [*[0] * before, min(num_removed, patches // 2), num_removed - min(num_removed, patches // 2)]
    learnt = [ck.PatchRanking(predictor, keep) for predictor in predictors]
    chance = [ck.PatchRanking(at_random(study, seed), keep) for seed in range(study.seeds)]
    result: dict[str, Callable[[], Outcome]] = {
        f"golden, {score}": partial(with_rankings, study, keep, rankings)
        for score, rankings in study.golden_rankings.items()
    }
    return result | {
        "predictor": partial(plain, study, learnt),
        "predictor + learnt tokens": partial(with_tokens, study, learnt),
        "random": partial(plain, study, chance),
        "random + learnt tokens": partial(with_tokens, study, chance),
        "EViT without fusing": partial(plain, study, [ck.EViT(keep, (before,), fuse=False)]),
        "EViT": partial(plain, study, [ck.EViT(keep, (before,))]),
        "ToMe": partial(plain, study, [ck.ToMe(merged)]),
    }


def at_random(study: Study, seed: int) -> FixedScores:
    """Return a predictor with one random order for all images."""
    predictor = FixedScores(study.pool_rankings.features.shape[1], study.block)
    predictor.scores = torch.rand(1, study.pool_rankings.ranks.shape[1], generator=torch.Generator().manual_seed(seed))
    return predictor


def with_rankings(study: Study, keep: float, rankings: Rankings) -> Outcome:
    """Return the result of pruning the first images by their golden rankings."""
    predictor = FixedScores(study.pool_rankings.features.shape[1], study.block)
    method = ck.PatchRanking(predictor, keep)  # type: ignore[arg-type]
    images, scores = study.images.take(slice(0, len(rankings.ranks))), -rankings.ranks.double()

    def set_scores(batch: slice) -> None:
        predictor.scores = scores[batch]

    return Outcome([correct_images(study.text, images, method, set_scores)], [agreement(study, scores, keep)], method)


def plain(study: Study, methods: Sequence[Any]) -> Outcome:
    """Return the result of methods as they are, one for each seed."""
    scores = [scores_of(study, method) for method in methods]
    overlaps = [
        agreement(study, method_scores, methods[0].keep) for method_scores in scores if method_scores is not None
    ]
    return Outcome([correct_images(study.text, study.images, method) for method in methods], overlaps, methods[0])


def with_tokens(study: Study, methods: Sequence[ck.PatchRanking]) -> Outcome:
    """Return the result of methods with tokens learnt from a few images per class, different ones for each seed."""
    _, _, tokenizer = ck.bundled()
    fitted_methods = []
    for seed, method in enumerate(methods):
        sample = study.pool.take(sample_shots(study.pool.labels, SHOTS, seed))
        prompts = support.photo(study.classes, (TEMPLATE,))
        fitted = fit_tokens(ck.bundled()[0], tokenizer, prompts, sample.images, sample.labels, method, seed=seed)
        fitted_methods.append(replace(method, tokens=fitted.tokens))
    return Outcome(
        [correct_images(study.text, study.images, method) for method in fitted_methods], [], fitted_methods[0]
    )


@torch.inference_mode()
def correct_images(
    text: Tensor, images: Photos, method: Any, before_batch: Callable[[slice], None] | None = None
) -> Tensor:
    """Return booleans (n,), true for an image whose class a patched tower predicts correctly."""
    model = ck.patch(ck.bundled()[0], method)
    results = []
    for start in range(0, len(images.labels), BATCH):
        batch = slice(start, start + BATCH)
        if before_batch is not None:
            before_batch(batch)
        logits = ck.ZeroShot(text)(model.encode_image(images.images[batch]))
        results.append(logits.argmax(1) == images.labels[batch])
    return torch.cat(results)


@torch.inference_mode()
def scores_of(study: Study, method: Any) -> Tensor | None:
    """Return the patch scores (n,P) of the images with golden rankings, or None if a method changes its patches."""
    golden_images, model = study.images.images[: len(study.golden_rankings["label"].ranks)], ck.bundled()[0]
    tower = ck.tower_of(model)
    if isinstance(method, ck.PatchRanking):
        return torch.cat(
            [method.predictor(tokens_entering(tower, x, study.block), 1) for x in golden_images.split(BATCH)]
        )
    if not isinstance(method, ck.EViT) or method.fuse:
        return None
    parts = tower.parts(tower.blocks[study.block - 1])
    scores = []
    for x in golden_images.split(BATCH):
        q, k, _ = parts.qkv(tokens_entering(tower, x, study.block - 1), None, None, None)
        scores.append(ck.ops.rank_tokens(q, k))
    return torch.cat(scores)


def tokens_entering(tower: Any, images: Tensor, block: int) -> Tensor:
    """Return the tokens (B,N,C) of images that enter a block."""
    x, _ = tower.embed(images)
    return run(tower, TowerInput(x), ck.Dense().plan(x.shape[1], len(tower.blocks), tower.prefix), blocks=block).x


def agreement(study: Study, scores: Tensor, keep: float) -> float:
    """Return the overlap of scores with the golden ranking by the score that predictors learn from."""
    ranks = study.golden_rankings[study.score].ranks
    return overlap(scores, ranks, ranks.shape[1] - math.ceil(keep * ranks.shape[1]))


def row(study: Study, share: float, name: str, outcome: Outcome) -> dict[str, Any]:
    """Return a row with accuracy in per cent, and its difference from the dense tower's on the same images."""
    images = len(outcome.correct[0])
    dense = study.dense[:images].double()
    accuracies = [100 * correct.double().mean().item() for correct in outcome.correct]
    deltas = [100 * (correct.double() - dense).mean().item() for correct in outcome.correct]
    tower = ck.tower_of(ck.bundled()[0])
    cost = plan_for(tower, outcome.method).gmacs(tower.width, tower.patch, tower.out, exact=True)
    figures = {
        **{"accuracy": statistics.mean(accuracies), "accuracy_sd": deviation(accuracies)},
        **{"over_dense": statistics.mean(deltas), "over_dense_sd": deviation(deltas)},
        "overlap": 100 * statistics.mean(outcome.overlaps) if outcome.overlaps else None,
    }
    rounded = {key: None if value is None else round(value, 2) for key, value in figures.items()}
    return {
        **{"block": study.block, "gone": share, "method": name, **rounded, "images": images},
        **{"seeds": len(accuracies), "mmacs": round(1000 * cost, 2), "commit": environment()["commit"]},
    }


def draw(records: Sequence[dict[str, Any]]) -> Table:
    """Return a terminal table of the rows."""
    title = "accuracy in %, and above the dense tower on the same images: mean ± standard deviation over seeds"
    table = Table("block", "gone", "method", "images", "accuracy", "over dense", "overlap", "MMACs", title=title)
    for row in records:
        accuracy, over = (f"{row[key]:.2f} ± {row[key + '_sd']:.2f}" for key in ("accuracy", "over_dense"))
        agreed = "" if row["overlap"] is None else f"{row['overlap']:.1f}"
        table.add_row(
            str(row["block"]), f"{row['gone']:.0%}", row["method"], str(row["images"]), accuracy, over, agreed,
            f"{row['mmacs']:.1f}",
        )  # fmt: skip
    return table


def plot(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot accuracy above the dense tower against the share of removed patches, one panel for each block."""
    from matplotlib.figure import Figure

    blocks = sorted({row["block"] for row in records})
    figure = Figure(figsize=(7.5 * len(blocks), 5), layout="constrained")
    for axes, block in zip(figure.subplots(1, len(blocks), squeeze=False)[0], blocks, strict=True):
        block_rows = [row for row in records if row["block"] == block]
        names = list(dict.fromkeys(row["method"] for row in block_rows))
        for index, name in enumerate(names):
            line = [row for row in block_rows if row["method"] == name]
            values, bars = ([row[key] for row in line] for key in ("over_dense", "over_dense_sd"))
            style = ":" if name.startswith("golden") else "-"
            if min(values) > PLOT_TOP:  # an oracle, whose scale would flatten all other lines
                name += f" ({min(values):+.0f} to {max(values):+.0f})"
            axes.errorbar(
                [100 * row["gone"] for row in line],
                values,
                yerr=bars,
                fmt=f"o{style}",
                capsize=3,
                label=name,
                color=COLORS[index],
            )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(
            xlabel="patches removed, %", ylabel="accuracy above the dense tower, points", title=f"before block {block}"
        )
        axes.set_ylim(top=PLOT_TOP)
        axes.set_xticks([100 * share for share in REMOVED_SHARES])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, file)


if __name__ == "__main__":
    main()
