"""What Patch Ranking is worth on the bundled CLIP: whom its predictor agrees with, and what is left when patches go.

    python -m bench.studies.ranking --images cifar10-val.tar.gz --pool cifar10-train.tar.gz --work rankings \\
        --out ranking.csv
    python -m bench.studies.ranking --images val_folder --pool train_folder --limit 500 --ranked 200 \\
        --golden 100 --seeds 2 \\
        --work quick --plot quick.png

Rankings and training see the pool alone; everything is reported on the images, and nothing is chosen by them. Rows that
say "golden" rank each image by trying, "label" with its true class: they show what a ranking can be worth, not what can
be had. All rows of a block prune once, before its attention; EViT and ToMe do inside the block before, sparing its MLP,
too.
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
from bench.studies.tiny_clip import few, read
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

BATCH = 50  # what fits the cache is faster
GONE = (0.0, 0.2, 0.4, 0.6)
SHOTS = 16
TEMPLATE = "a photo of a {}."
COLORS = [*(f"C{at}" for at in range(10)), "black"]
SHOWN = 3  # points above dense up to which the picture goes
SCORES = ("label", "confidence", "feature")


class Photos(NamedTuple):
    """Preprocessed images (n,3,S,S) and their classes (n,)."""

    images: Tensor
    labels: Tensor

    def take(self, index: Tensor | slice) -> Photos:
        return Photos(self.images[index], self.labels[index])


class Given(nn.Module):
    """A predictor that has been told the scores of the batch that comes next, (B,P), or of all, (1,P)."""

    macs, about = 0, None
    scores: Tensor

    def __init__(self, tokens: int, block: int) -> None:
        super().__init__()
        self.tokens, self.prefix, self.block = tokens, 1, block

    def check_tower(self, tower: Any) -> None:
        """Serves any."""

    def forward(self, x: Tensor, prefix: int) -> Tensor:
        return self.scores.expand(x.shape[0], -1)


@dataclass(frozen=True)
class Study:
    """What every row of a block shares: the images, the classes, the golden rankings, who learns from what."""

    block: int
    images: Photos
    pool: Photos
    classes: Sequence[str]
    text: Tensor
    ranked: Rankings
    golden: dict[str, Rankings]
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
            if arguments.out:  # a long run that is cut short keeps what it has
                write(records, header, arguments.out)
    console.print(draw(records))
    if arguments.plot:
        plot(records, arguments.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources: dict[str, Any] = {"type": Path, "required": True, "metavar": "DIR|FILE.tar.gz"}
    parser.add_argument("--images", **sources, help="to report on: a sub-folder per class")
    parser.add_argument("--pool", **sources, help="to rank and to learn from: likewise")
    parser.add_argument("--blocks", default="3", metavar="B,…", help="blocks before which patches go")
    parser.add_argument("--limit", type=int, default=5000, metavar="N", help="images to report on, drawn at random")
    parser.add_argument("--golden", type=int, default=1000, metavar="N", help="of these, how many are ranked by trying")
    parser.add_argument("--ranked", type=int, default=4000, metavar="N", help="images of the pool that are ranked")
    parser.add_argument("--score", choices=SCORES, default="label", help="of the rankings that are learnt from")
    parser.add_argument("--seeds", type=int, default=5, help="predictors, sets of few shots and random rankings")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="keeps rankings and predictors")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="rows; a .json beside it adds the environment")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="a picture of the accuracies")
    return parser.parse_args()


def rows(done: set[tuple[int, float, str]], arguments: argparse.Namespace, bar: Progress) -> Iterator[dict[str, Any]]:
    """Every row that is not done."""
    photos, classes = read(arguments.images)
    others, same = read(arguments.pool)
    if same != classes:
        raise SystemExit(f"error: expected --pool with the classes of --images ({', '.join(classes)}), got {same}")
    images, pool = prepared(photos, arguments.limit), prepared(others, arguments.ranked)
    model, _, tokenizer = ck.bundled()
    text = support.class_embeddings(model, tokenizer, support.photo(classes, (TEMPLATE,)))
    task = bar.add_task("", total=None)

    def rank(what: str, photos: Photos, score: str, block: int) -> Rankings:
        bar.update(task, description=f"block {block}: ranking {what} by {score}")
        extra: dict[str, Any] = {} if score == "feature" else {"text": text}
        extra |= {"labels": photos.labels} if score == "label" else {}
        file = arguments.work / f"{what}-{score}-{block}.safetensors"
        show: Callable[[int, int], None] = lambda n, of: bar.update(task, completed=n, total=of)  # noqa: E731
        return golden_ranking(model, photos.images, score=score, block=block, path=file, progress=show, **extra)

    for block in (int(block) for block in arguments.blocks.split(",")):
        tried = images.take(slice(0, arguments.golden))
        ranked = rank("pool", pool, arguments.score, block)
        golden = {score: rank("images", tried, score, block) for score in SCORES}
        dense = right(text, images, ck.Dense())
        study = Study(block, images, pool, classes, text, ranked, golden, arguments.score, arguments.seeds, dense)
        predictors = []
        for seed in range(arguments.seeds):
            bar.update(task, description=f"block {block}: predictor {seed}", total=None)
            file = arguments.work / f"predictor-{arguments.score}-{block}-{arguments.ranked}-{seed}.safetensors"
            if not file.exists():
                fit_predictor(study.ranked, seed=seed, held_out=0).predictor.save(file)
            predictors.append(RankPredictor.load(file))
        for gone in GONE:
            for name, make in makers(study, gone, predictors).items():
                if (block, gone, name) not in done:
                    bar.update(task, description=f"block {block}, {gone:.0%} gone: {name}", total=None)
                    yield row(study, gone, name, make())


def prepared(photos: Any, limit: int) -> Photos:
    """So many of some photographs, drawn at random."""
    preprocess = ck.bundled()[1]
    pick = np.random.default_rng(0).permutation(len(photos.labels))[:limit]
    images = torch.stack([preprocess(Image.fromarray(photos.images[index])) for index in pick])
    return Photos(images, torch.from_numpy(photos.labels[pick]))


class Outcome(NamedTuple):
    """Which of the first n images are named right, (n,) for every seed; the share of the patches that go which the
    golden ranking lets go, too, where that is asked; the method."""

    right: list[Tensor]
    overlaps: list[float]
    method: Any


def makers(study: Study, gone: float, predictors: list[RankPredictor]) -> dict[str, Callable[[], Outcome]]:
    """Every row of a block and a share, and what makes it."""
    if not gone:
        return {"learnt tokens": partial(with_tokens, study, [ck.PatchRanking(predictors[0], 1.0)] * study.seeds)}
    patches = study.ranked.ranks.shape[1]
    spare = round(gone * patches)
    keep, before = (patches - spare) / patches, study.block - 1
    merged = [*[0] * before, min(spare, patches // 2), spare - min(spare, patches // 2)]
    learnt = [ck.PatchRanking(predictor, keep) for predictor in predictors]
    chance = [ck.PatchRanking(at_random(study, seed), keep) for seed in range(study.seeds)]
    made: dict[str, Callable[[], Outcome]] = {
        f"golden, {score}": partial(given, study, keep, rankings) for score, rankings in study.golden.items()
    }
    return made | {
        "predictor": partial(plain, study, learnt),
        "predictor + learnt tokens": partial(with_tokens, study, learnt),
        "random": partial(plain, study, chance),
        "random + learnt tokens": partial(with_tokens, study, chance),
        "EViT without fusing": partial(plain, study, [ck.EViT(keep, (before,), fuse=False)]),
        "EViT": partial(plain, study, [ck.EViT(keep, (before,))]),
        "ToMe": partial(plain, study, [ck.ToMe(merged)]),
    }


def at_random(study: Study, seed: int) -> Given:
    """A predictor that knows nothing: one order for all images."""
    chosen = Given(study.ranked.features.shape[1], study.block)
    chosen.scores = torch.rand(1, study.ranked.ranks.shape[1], generator=torch.Generator().manual_seed(seed))
    return chosen


def given(study: Study, keep: float, rankings: Rankings) -> Outcome:
    """Pruned as golden rankings of the first images say."""
    told = Given(study.ranked.features.shape[1], study.block)
    method = ck.PatchRanking(told, keep)  # type: ignore[arg-type]
    images, scores = study.images.take(slice(0, len(rankings.ranks))), -rankings.ranks.double()

    def tell(batch: slice) -> None:
        told.scores = scores[batch]

    return Outcome([right(study.text, images, method, tell)], [agreement(study, scores, keep)], method)


def plain(study: Study, methods: Sequence[Any]) -> Outcome:
    """Methods as they are."""
    scores = [scores_of(study, method) for method in methods]
    overlaps = [agreement(study, each, methods[0].keep) for each in scores if each is not None]
    return Outcome([right(study.text, study.images, method) for method in methods], overlaps, methods[0])


def with_tokens(study: Study, methods: Sequence[ck.PatchRanking]) -> Outcome:
    """Methods with tokens learnt from a few images of each class, others for every seed."""
    _, _, tokenizer = ck.bundled()
    made = []
    for seed, method in enumerate(methods):
        some = study.pool.take(few(study.pool.labels, SHOTS, seed))
        prompts = support.photo(study.classes, (TEMPLATE,))
        fitted = fit_tokens(ck.bundled()[0], tokenizer, prompts, some.images, some.labels, method, seed=seed)
        made.append(replace(method, tokens=fitted.tokens))
    return Outcome([right(study.text, study.images, method) for method in made], [], made[0])


@torch.inference_mode()
def right(text: Tensor, images: Photos, method: Any, tell: Callable[[slice], None] | None = None) -> Tensor:
    """Which images a patched tower names right, (n,)."""
    model = ck.patch(ck.bundled()[0], method)
    found = []
    for start in range(0, len(images.labels), BATCH):
        batch = slice(start, start + BATCH)
        if tell is not None:
            tell(batch)
        logits = ck.ZeroShot(text)(model.encode_image(images.images[batch]))
        found.append(logits.argmax(1) == images.labels[batch])
    return torch.cat(found)


@torch.inference_mode()
def scores_of(study: Study, method: Any) -> Tensor | None:
    """How a method that keeps patches as they are ranks those of the images that are ranked by trying."""
    tried, model = study.images.images[: len(study.golden["label"].ranks)], ck.bundled()[0]
    tower = ck.tower_of(model)
    if isinstance(method, ck.PatchRanking):
        return torch.cat([method.predictor(entering(tower, x, study.block), 1) for x in tried.split(BATCH)])
    if not isinstance(method, ck.EViT) or method.fuse:
        return None
    parts = tower.parts(tower.blocks[study.block - 1])
    found = []
    for x in tried.split(BATCH):
        q, k, _ = parts.qkv(entering(tower, x, study.block - 1), None, None, None)
        found.append(ck.ops.rank_tokens(q, k))
    return torch.cat(found)


def entering(tower: Any, images: Tensor, block: int) -> Tensor:
    """The tokens (B,N,C) of images that enter a block."""
    x, _ = tower.embed(images)
    return run(tower, TowerInput(x), ck.Dense().plan(x.shape[1], len(tower.blocks), tower.prefix), blocks=block).x


def agreement(study: Study, scores: Tensor, keep: float) -> float:
    """The overlap with the golden ranking of the kind that predictors learn from."""
    ranks = study.golden[study.score].ranks
    return overlap(scores, ranks, ranks.shape[1] - math.ceil(keep * ranks.shape[1]))


def row(study: Study, gone: float, name: str, outcome: Outcome) -> dict[str, Any]:
    """Accuracy in per cent, and by how much it is above the dense tower's on the same images."""
    images = len(outcome.right[0])
    dense = study.dense[:images].double()
    accuracies = [100 * each.double().mean().item() for each in outcome.right]
    deltas = [100 * (each.double() - dense).mean().item() for each in outcome.right]
    tower = ck.tower_of(ck.bundled()[0])
    cost = plan_for(tower, outcome.method).gmacs(tower.width, tower.patch, tower.out, exact=True)
    found = {
        **{"accuracy": statistics.mean(accuracies), "accuracy_sd": deviation(accuracies)},
        **{"over_dense": statistics.mean(deltas), "over_dense_sd": deviation(deltas)},
        "overlap": 100 * statistics.mean(outcome.overlaps) if outcome.overlaps else None,
    }
    rounded = {key: None if value is None else round(value, 2) for key, value in found.items()}
    return {
        **{"block": study.block, "gone": gone, "method": name, **rounded, "images": images},
        **{"seeds": len(accuracies), "mmacs": round(1000 * cost, 2), "commit": environment()["commit"]},
    }


def draw(records: Sequence[dict[str, Any]]) -> Table:
    """The rows for people."""
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
    """What every method loses against the dense tower, by how much is gone."""
    from matplotlib.figure import Figure

    blocks = sorted({row["block"] for row in records})
    figure = Figure(figsize=(7.5 * len(blocks), 5), layout="constrained")
    for axes, block in zip(figure.subplots(1, len(blocks), squeeze=False)[0], blocks, strict=True):
        own = [row for row in records if row["block"] == block]
        names = list(dict.fromkeys(row["method"] for row in own))
        for at, name in enumerate(names):
            line = [row for row in own if row["method"] == name]
            values, bars = ([row[key] for row in line] for key in ("over_dense", "over_dense_sd"))
            style = ":" if name.startswith("golden") else "-"
            if min(values) > SHOWN:  # an oracle, which would flatten all others
                name += f" ({min(values):+.0f} to {max(values):+.0f})"
            axes.errorbar(
                [100 * row["gone"] for row in line],
                values,
                yerr=bars,
                fmt=f"o{style}",
                capsize=3,
                label=name,
                color=COLORS[at],
            )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(
            xlabel="patches gone, %", ylabel="accuracy above the dense tower, points", title=f"before block {block}"
        )
        axes.set_ylim(top=SHOWN)
        axes.set_xticks([100 * gone for gone in GONE])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, file)


if __name__ == "__main__":
    main()
