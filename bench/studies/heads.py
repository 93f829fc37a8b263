"""Study heads on the same features: accuracy on the bundled CLIP, compared with zero-shot.

    python -m bench.studies.heads --images cifar10-val.tar.gz --pool cifar10-train.tar.gz --out heads.csv \\
        --plot heads.png
    python -m bench.studies.heads --images val_folder --pool train_folder --limit 500 --seeds 2

The folders have a sub-folder per class. Support sets are retrieved from the pool by the text of the class names only.
The pool's labels are used for rows named "labelled", and to count the correctly retrieved images. Each seed splits the
images in halves. The weights of "fitted" heads are searched on one half, and every accuracy is of the other half.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import clipkernels as ck
from bench.result_files import deviation, header_of, resume, save, write
from bench.studies.tiny_clip import read, sample_shots
from clipkernels import support
from clipkernels.learn.calip_fs import FewShotCALIP
from clipkernels.measure.environment import environment

BATCH = 256
ROUNDS = 9
SHOTS = (1, 4, 16)
PER_CLASS = 100
TEMPLATE = "a photo of a {}."
METHODS: dict[str, ck.Method | None] = {
    "CLIP": None,
    "EViT(keep=0.7)": ck.EViT(0.7),
    "EViT(keep=0.7, random)": ck.EViT(0.7, score="random"),
    "ToMe(r=6)": ck.ToMe(6),
    "TCA(rate=0.1)": ck.TCA(0.1),
}


# A function from the half to fit on and the seed to a head.
Maker = Callable[["Features", int], Any]


class Features(NamedTuple):
    """Images encoded by one tower, and their classes (n,)."""

    encoded: ck.Encoded
    labels: Tensor

    def take(self, index: Tensor) -> Features:
        tokens = None if self.encoded.tokens is None else self.encoded.tokens[index]
        return Features(
            self.encoded._replace(embedding=self.encoded.embedding[index], tokens=tokens), self.labels[index]
        )


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 160)
    header = header_of(arguments, "limit", "pool_limit", "seeds", "per_class", "threads")
    records = resume(arguments.out, header)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for rows in accuracies({row["tower"] for row in records}, arguments, bar):
            records += rows
            if arguments.out:  # an interrupted run keeps its rows
                write(records, header, arguments.out)
    console.print(draw(records))
    if arguments.plot:
        plot(records, arguments.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources: dict[str, Any] = {"type": Path, "required": True, "metavar": "DIR|FILE.tar.gz"}
    parser.add_argument("--images", **sources, help="images to report on: a sub-folder per class")
    parser.add_argument("--pool", **sources, help="images to retrieve from: a sub-folder per class")
    parser.add_argument(
        "--limit", type=int, default=5000, metavar="N", help="random images to report on; default %(default)s"
    )
    parser.add_argument(
        "--pool-limit", type=int, default=10000, metavar="N", help="random images of the pool; default %(default)s"
    )
    parser.add_argument(
        "--per-class", type=int, default=PER_CLASS, help="images retrieved for each class; default %(default)s"
    )
    parser.add_argument("--seeds", type=int, default=5, help="random splits into halves; default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="rows; FILE.json adds the environment")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot of the accuracies")
    return parser.parse_args()


def accuracies(done: set[str], arguments: argparse.Namespace, bar: Progress) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of every head, one list for each tower."""
    photos, classes = read(arguments.images)
    pool, pool_classes = read(arguments.pool)
    if pool_classes != classes:
        raise SystemExit(
            f"error: expected --pool with the classes of --images ({', '.join(classes)}), got {pool_classes}"
        )
    model, _, tokenizer = ck.bundled()
    text = support.class_embeddings(model, tokenizer, support.photo(classes, (TEMPLATE,)))
    task = bar.add_task("", total=None)
    for name, method in METHODS.items():
        if name in done:
            continue
        tower = ck.bundled()[0] if method is None else ck.patch(ck.bundled()[0], method)

        def encode(images: Any, limit: int, label: str, tower: Any = tower, name: str = name) -> Features:
            bar.update(task, description=f"{name}: {label}")
            return encoded(tower, images, limit, lambda n, of: bar.update(task, completed=n, total=of))

        features = encode(photos, arguments.limit, "images")
        if method is not None:
            yield rows(name, heads_of_patches(text), features, arguments.seeds)
            continue
        bar.update(task, description=f"{name}: support", total=None)
        support_set = retrieved(pool, classes, arguments)
        labelled = encode(pool, arguments.pool_limit, "labelled pool")
        makers = heads_of_patches(text) | heads_of_support(text, support_set, labelled)
        yield rows(name, makers, features, arguments.seeds)


@torch.inference_mode()
def encoded(tower: Any, images: Any, limit: int, progress: Callable[[int, int], None]) -> Features:
    """Return `limit` random photographs encoded by a tower, with all their tokens."""
    preprocess = ck.bundled()[1]
    selection = np.random.default_rng(0).permutation(len(images.labels))[:limit]
    parts = []
    for start in range(0, len(selection), BATCH):
        batch = torch.stack([preprocess(Image.fromarray(images.images[i])) for i in selection[start : start + BATCH]])
        parts.append(ck.encode_image(tower, batch, tokens=True))
        progress(start + len(batch), len(selection))
    embedding, tokens = (torch.cat([getattr(part, field) for part in parts]) for field in ("embedding", "tokens"))
    return Features(parts[0]._replace(embedding=embedding, tokens=tokens), torch.from_numpy(images.labels[selection]))


def retrieved(pool: Any, classes: Sequence[str], arguments: argparse.Namespace) -> support.SupportSet:
    """Return the support set that class names alone retrieve from a pool; print the share of correct images."""
    model, preprocess, tokenizer = ck.bundled()
    selection = np.random.default_rng(0).permutation(len(pool.labels))[: arguments.pool_limit]
    with TemporaryDirectory() as folder:
        for number in selection:
            Image.fromarray(pool.images[number]).save(Path(folder) / f"{number}.png")
        prompts = support.photo(classes, (TEMPLATE,))
        cache = Path(folder) / "features.safetensors"
        # An image may stand for several classes, as in SuS-X's code.
        options = {"per_class": arguments.per_class, "shared": True, "cache": cache, "batch_size": BATCH}
        support_set = support.retrieve(model, preprocess, tokenizer, prompts, folder, **options)
    truth = [pool.labels[int(Path(picture.path).stem)] for picture in support_set.images]
    right = np.mean(np.asarray(truth) == support_set.labels.numpy())
    print(f"{len(truth)} images retrieved by text, {100 * right:.1f} % with the correct class", file=sys.stderr)
    return support_set


def heads_of_patches(text: Tensor) -> dict[str, Maker]:
    """Return heads that need no support."""
    return {
        "zero-shot": lambda fit, seed: ck.ZeroShot(text),
        "CALIP, ImageNet's weights": lambda fit, seed: ck.CALIP(text),
        "CALIP, fitted": lambda fit, seed: fit_weights(ck.CALIP(text), fit),
    }


def heads_of_support(text: Tensor, support_set: support.SupportSet, labelled: Features) -> dict[str, Maker]:
    """Return heads with the support that text retrieved, and heads with a few labelled images of each class."""
    makers: dict[str, Maker] = {}

    def add(name: str, make: Maker) -> None:
        makers[name] = make
        makers[f"{name}, fitted"] = lambda fit, seed: fit_weights(make(fit, seed), fit)

    retrieved_images = support_set.features, support_set.labels
    add("Tip-Adapter, LC", lambda fit, seed: ck.TipAdapter(text, *retrieved_images))
    add("TIP-X, LC", lambda fit, seed: ck.TipX(text, *retrieved_images))
    add("TIP-X sum, LC", lambda fit, seed: ck.TipX(text, *retrieved_images, reduce="sum"))
    for shots in SHOTS:
        makers[f"CALIP-FS, {shots} labelled"] = partial(few_shot_calip, text, labelled, shots)
        add(f"Tip-Adapter, {shots} labelled", partial(tip_adapter, text, labelled, shots))
    return makers


def fit_weights(head: Any, fit: Features) -> Any:
    """Return a head with the weights that are best on `fit`."""
    head.fit(fit.encoded, fit.labels)
    return head


def tip_adapter(text: Tensor, labelled: Features, shots: int, fit: Features, seed: int) -> ck.TipAdapter:
    """Return a Tip-Adapter with `shots` random labelled images of each class."""
    sample = draw_shots(labelled, shots, seed)
    return ck.TipAdapter(text, sample.encoded.embedding, sample.labels)


def few_shot_calip(text: Tensor, labelled: Features, shots: int, fit: Features, seed: int) -> FewShotCALIP:
    """Return a CALIP-FS trained on `shots` random labelled images of each class."""
    head, sample = FewShotCALIP(text), draw_shots(labelled, shots, seed)
    head.fit(sample.encoded, sample.labels, seed=seed)
    return head


def draw_shots(labelled: Features, shots: int, seed: int) -> Features:
    """Return `shots` random images of each class."""
    return labelled.take(sample_shots(labelled.labels, shots, seed))


def rows(tower: str, heads: dict[str, Maker], features: Features, seeds: int) -> list[dict[str, Any]]:
    """Return rows with each head's accuracy in per cent over the splits, and its gain over zero-shot there."""
    shares: dict[str, list[float]] = {name: [] for name in heads}
    for seed in range(seeds):
        order = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(features.labels)))
        fit, report = (features.take(part) for part in order.chunk(2))
        for name, make in heads.items():
            with torch.no_grad():
                head = make(fit, seed)
                right = [
                    (head(part.encoded).argmax(1) == part.labels).sum().item()
                    for part in (report.take(index) for index in torch.arange(len(report.labels)).split(BATCH))
                ]
            shares[name].append(100 * sum(right) / len(report.labels))
    records = []
    for name, values in shares.items():
        gain = [value - base for value, base in zip(values, shares["zero-shot"], strict=True)]
        figures = {"tower": tower, "head": name, "accuracy": statistics.mean(values), "gain": statistics.mean(gain)}
        spread = {
            "accuracy_sd": deviation(values),
            "gain_sd": deviation(gain),
            "least": min(values),
            "most": max(values),
        }
        rounded = {
            key: round(value, 2) if isinstance(value, float) else value for key, value in (figures | spread).items()
        }
        records.append({**rounded, "seeds": seeds, "commit": environment()["commit"]})
    return records


def draw(records: Sequence[dict[str, Any]]) -> Table:
    """Return a terminal table of the rows."""
    table = Table("tower", "head", "accuracy, %", "over zero-shot", title="mean ± standard deviation over the splits")
    for row in records:
        accuracy, gain = (f"{row[key]:.2f} ± {row[key + '_sd']:.2f}" for key in ("accuracy", "gain"))
        table.add_row(row["tower"], row["head"], accuracy, gain if row["head"] != "zero-shot" else "")
    return table


def plot(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot the accuracy of every head, with the standard deviation over splits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.3 * len(records) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['tower']}: {row['head']}" if row["tower"] != "CLIP" else row["head"] for row in records]
    values, bars = ([row[key] for row in records] for key in ("accuracy", "accuracy_sd"))
    axes.errorbar(values, range(len(names)), xerr=bars, fmt="o", capsize=3)
    axes.axvline(records[0]["accuracy"], color="C0", linewidth=0.8, linestyle=":")
    axes.set(xlabel="accuracy, %; bars: standard deviation over the splits")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    save(figure, file)


if __name__ == "__main__":
    main()
