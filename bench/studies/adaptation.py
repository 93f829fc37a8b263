"""Study TCA on streams of shifted images: accuracy and images/s of the bundled CLIP, with and without adaptation.

    python -m bench.studies.adaptation --images cifar10-val.tar.gz --out adaptation.csv --plot adaptation.png
    python -m bench.studies.adaptation --images photos --limit 200 --shuffles 1    # a sub-folder per class
    python -m bench.studies.adaptation --images cifar10-val.tar.gz --study presets --out presets.csv
    python -m bench.studies.adaptation --images cifar10-val.tar.gz --study speed --out speed.csv

A stream holds the images of one kind in random order: clean, or corrupted with a severity from 1 to 5 drawn for each
image. The strengths are those of CIFAR-10-C where it has the corruption. A reservoir starts empty with each stream, or
continues through all streams one after another ("continual"). Variants without adaptation give the same results in
every order. EViT, random pruning and ToMe have the schedules whose GMACs are closest to TCA's. Nothing is chosen on
these images: settings are the published ones, and the study of presets measures all of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import clipkernels as ck
from bench.naive.tca import Reservoir as LiteralReservoir
from bench.naive.tca import stream
from bench.result_files import header_of, resume, save, write
from bench.studies.corruptions import STREAMS, STRENGTHS, Stream, corrupt
from bench.studies.tiny_clip import read
from clipkernels.heads.presets import RESERVOIR_PRESETS
from clipkernels.measure.environment import environment
from clipkernels.measure.timing import Clock, gmacs_for, measure, plan_for

BATCH = 32
ROUNDS = 15
RATES = (0.035, 0.1)  # the paper's "R=0.9" and "R=0.7"
TEMPLATES = ("a photo of a {}.",)


class Variant(NamedTuple):
    """A method, and the constructor of its head from the class embeddings."""

    method: ck.Method | None
    head: Callable[..., Any] = ck.ZeroShot


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 160)
    header = header_of(arguments, "study", "limit", "shuffles", "seed", "threads")
    records = resume(arguments.out, header)
    photos, classes = read(arguments.images)
    if arguments.study == "speed":
        records = speeds(photos.images, classes, arguments, console)
    else:
        streams = corrupt(photos.images, photos.labels, arguments.limit, arguments.seed)
        study = shift if arguments.study == "shift" else presets
        with Progress(console=Console(stderr=True), transient=True) as bar:
            for rows in study(streams, classes, {row["variant"] for row in records}, arguments, bar):
                records += rows
                if arguments.out:  # an interrupted run keeps its rows
                    write(records, header, arguments.out)
        console.print(draw(records))
    if arguments.out:
        write(records, header, arguments.out)
    if arguments.plot:
        plot(records, arguments.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR|FILE.tar.gz", help="a sub-folder per class")
    parser.add_argument("--study", choices=["shift", "presets", "speed"], default="shift", help="default: %(default)s")
    parser.add_argument(
        "--limit", type=int, default=2000, metavar="N", help="random images per stream; default %(default)s"
    )
    parser.add_argument("--shuffles", type=int, default=3, help="random orders of the streams; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="draw, corruptions and orders; default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="rows; FILE.json adds the environment")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot of the shift study")
    arguments = parser.parse_args()
    if arguments.plot and arguments.study != "shift":
        parser.error(f"expected --study shift with --plot, got {arguments.study}")
    return arguments


def variants() -> dict[str, Variant]:
    """Return the compared variants by name. Adapting ones have ImageNet's settings, as for unknown data."""
    tower = ck.tower_of(ck.bundled()[0])

    def gmacs(method: ck.Method) -> float:
        return gmacs_for(tower, plan_for(tower, method))

    patches, result = tower.num_tokens - tower.prefix, {"CLIP": Variant(None)}
    for rate in RATES:
        target = gmacs(ck.TCA(rate))
        keep = min((n / patches for n in range(1, patches)), key=lambda keep: abs(gmacs(ck.EViT(keep)) - target))
        r = min(range(1, tower.num_tokens), key=lambda r: abs(gmacs(ck.ToMe(r)) - target))
        result |= {
            f"EViT(keep={keep:.3f})": Variant(ck.EViT(keep)),
            f"EViT(keep={keep:.3f}, random)": Variant(ck.EViT(keep, score="random")),
            f"ToMe(r={r})": Variant(ck.ToMe(r)),
            f"TCA(rate={rate})": Variant(ck.TCA(rate)),
        }
    result["CLIP + reservoir"] = Variant(None, ck.Reservoir)
    return result | {f"TCA(rate={rate}) + reservoir": Variant(ck.TCA(rate), ck.Reservoir) for rate in RATES}


def shift(
    streams: dict[str, Stream], classes: Sequence[str], done: set[str], arguments: argparse.Namespace, bar: Progress
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each variant: one per stream and severity, and their means.

    Adapting variants run twice, with a fresh start for each stream and continually.
    """
    task = bar.add_task("", total=None)
    for name, variant in variants().items():
        adapts = variant.head is not ck.ZeroShot
        for continual in (False, True) if adapts else (False,):
            label = f"{name}, continual" if continual else name
            if label in done:
                continue
            bar.update(task, description=label)
            right = [
                run(variant, streams, classes, seed, continual) for seed in range(arguments.shuffles if adapts else 1)
            ]
            yield summarize(label, variant.method, right, streams)


def presets(
    streams: dict[str, Stream], classes: Sequence[str], done: set[str], arguments: argparse.Namespace, bar: Progress
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of the milder TCA with every published preset, and with single changes to ImageNet's preset."""
    choices: dict[str, dict[str, Any]] = {name: {"preset": name} for name in RESERVOIR_PRESETS}
    choices |= {f"evict={rule}": {"evict": rule} for rule in ("similarity", "uncertainty", "fifo")}
    choices |= {"correction=linear": {"correction": "linear"}, "self_vote=False": {"self_vote": False}}
    choices |= {"anchors=all": {"anchors": "all"}}
    method = ck.TCA(0.035)
    task = bar.add_task("", total=len(choices) + 1)
    for name, settings in {"no reservoir": None, **choices}.items():
        bar.update(task, description=name, advance=1)
        if name not in done:
            variant = Variant(method) if settings is None else Variant(method, partial(ck.Reservoir, **settings))
            count = arguments.shuffles if settings is not None else 1
            right = [run(variant, streams, classes, seed, False) for seed in range(count)]
            yield [row for row in summarize(name, method, right, streams) if row["severity"] == "all"]


@torch.inference_mode()
def run(
    variant: Variant, streams: dict[str, Stream], classes: Sequence[str], seed: int, continual: bool
) -> dict[str, Tensor]:
    """Return a boolean per image of each stream, true if its class is correct, for one order of images and streams."""
    model, _, tokenizer = ck.bundled()
    classifier = ck.Classifier(model, tokenizer, classes, TEMPLATES, variant.method, variant.head)
    rng = np.random.default_rng([seed, 1])
    right = {}
    for kind in rng.permutation(STREAMS):
        if not continual:
            classifier.reset()
        stream_images = streams[kind]
        order = torch.from_numpy(rng.permutation(len(stream_images.labels)))
        predictions = torch.cat([classifier(stream_images.images[part]).argmax(1) for part in order.split(BATCH)])
        right[kind] = torch.empty(len(order), dtype=torch.bool)
        right[kind][order] = predictions == stream_images.labels[order]
    return right


def summarize(
    label: str, method: ck.Method | None, right: Sequence[dict[str, Tensor]], streams: dict[str, Stream]
) -> list[dict[str, Any]]:
    """Return rows of accuracy in per cent: mean, minimum and maximum over the orders.

    Severity "all" includes every severity; stream "shifted" is the mean over the corrupted streams.
    """
    tower = ck.tower_of(ck.bundled()[0])
    gmacs = gmacs_for(tower, plan_for(tower, method or ck.Dense()))
    rows = []

    def add(kind: str, severity: object, shares: list[float]) -> None:
        low, high = round(min(shares), 2), round(max(shares), 2)
        accuracy = {"accuracy": round(statistics.mean(shares), 2), "least": low, "most": high, "orders": len(shares)}
        row = {"variant": label, "gmacs": round(gmacs, 5), "stream": kind, "severity": severity}
        rows.append({**row, **accuracy, "commit": environment()["commit"]})

    def share(outcomes: dict[str, Tensor], kind: str, severity: int | None = None) -> float:
        selection = outcomes[kind] if severity is None else outcomes[kind][streams[kind].severity == severity]
        return 100 * selection.double().mean().item()

    for kind in STREAMS:
        add(kind, "all", [share(outcomes, kind) for outcomes in right])
    shifted = tuple(STRENGTHS)
    add("shifted", "all", [statistics.mean(share(outcomes, kind) for kind in shifted) for outcomes in right])
    for severity in range(1, 6):
        add(
            "shifted",
            severity,
            [statistics.mean(share(outcomes, kind, severity) for kind in shifted) for outcomes in right],
        )
    return rows


def speeds(
    images: np.ndarray, classes: Sequence[str], arguments: argparse.Namespace, console: Console
) -> list[dict[str, Any]]:
    """Return rows with images/s of whole streams, all interleaved, and ratios within rounds.

    Times are CPU time of one thread, or wall time of several.
    """
    clock: Clock = "process" if arguments.threads == 1 else "wall"
    _, preprocess, tokenizer = ck.bundled()
    count = min(arguments.limit, 128)
    batch = torch.stack([preprocess(Image.fromarray(image)) for image in images[:count]])
    calls: dict[str, Callable[[], object]] = {}
    for name, variant in variants().items():
        classifier = ck.Classifier(ck.bundled()[0], tokenizer, classes, TEMPLATES, variant.method, variant.head)
        for size in (BATCH, 1) if "TCA" in name and variant.head is ck.Reservoir else (BATCH,):
            calls[f"{name}, batch {size}"] = partial(run_stream, classifier, batch, size)
    text = ck.Classifier(ck.bundled()[0], tokenizer, classes, TEMPLATES).head.text
    for rate in RATES:
        model = ck.bundled()[0]
        calls[f"TCA(rate={rate}) + reservoir, literal loop"] = partial(run_literally, model, batch, ck.TCA(rate), text)
    with torch.inference_mode(), Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("timing", total=(ROUNDS + 1) * len(calls))
        times = measure(calls, ROUNDS, seed=arguments.seed, clock=clock, progress=lambda: bar.advance(task))
    rows = []
    evits = [name for name in calls if name.startswith("EViT") and "random" not in name]
    for name in calls:
        rate = next((rate for rate in RATES if f"TCA(rate={rate})" in name), None)
        row: dict[str, Any] = {"variant": name, "images_per_second": round(count / times.of(name).median, 2)}
        for against in ("literal", "evit"):
            loop, peer = f"TCA(rate={rate}) + reservoir, literal loop", evits[RATES.index(rate)] if rate else ""
            ratio = times.ratio(name, loop if against == "literal" else peer) if rate else (None,) * 3
            names = (f"over_{against}", f"over_{against}_p10", f"over_{against}_p90")
            row |= {key: value and round(value, 3) for key, value in zip(names, ratio, strict=True)}
        rows.append({**row, "threads": torch.get_num_threads(), "commit": environment()["commit"]})
    table = Table("variant", "images/s", "× the literal loop", "× EViT of equal GMACs", title=f"{clock} time")
    for row in rows:
        cells = [f"{row[key]:.2f}" if row[key] else "" for key in ("over_literal", "over_evit")]
        table.add_row(row["variant"], f"{row['images_per_second']:.1f}", *cells)
    console.print(table)
    return rows


def run_stream(classifier: ck.Classifier, images: Tensor, size: int) -> None:
    """Classify a stream in batches, with an empty reservoir at its start."""
    classifier.reset()
    for part in images.split(size):
        classifier(part)


def run_literally(model: Any, images: Tensor, method: ck.TCA, text: Tensor) -> None:
    """Classify a stream by the literal loop, with an empty reservoir at its start."""
    stream(model, images, method, LiteralReservoir(text, *RESERVOIR_PRESETS["imagenet"]))


def draw(records: Sequence[dict[str, Any]]) -> Table:
    """Return a terminal table of accuracy per stream, with half the range over orders."""
    table = Table("variant", "GMACs", *STREAMS, "shifted", title="accuracy, %: mean over orders ± half their range")
    for name in dict.fromkeys(row["variant"] for row in records):
        rows = [row for row in records if row["variant"] == name and row["severity"] == "all"]
        cells = [
            f"{row['accuracy']:.1f}" + (f" ± {(row['most'] - row['least']) / 2:.1f}" if row["orders"] > 1 else "")
            for row in rows
        ]
        table.add_row(name, f"{rows[0]['gmacs']:.4f}", *cells)
    return table


def plot(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot the accuracy of each variant on clean and shifted images, and its difference from CLIP's on every stream."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["variant"] for row in records))
    by_key = {(row["variant"], row["stream"], row["severity"]): row for row in records}
    columns = [(kind, "all") for kind in (*STREAMS, "shifted")] + [("shifted", severity) for severity in range(1, 6)]
    figure = Figure(figsize=(13, 0.42 * len(names) + 1.6), layout="constrained")
    accuracy_axes, difference_axes = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.6))
    for kind, colour in (("clean", "C0"), ("shifted", "C1")):
        rows = [by_key[name, kind, "all"] for name in names]
        means = [row["accuracy"] for row in rows]
        bars = [[row["accuracy"] - row["least"] for row in rows], [row["most"] - row["accuracy"] for row in rows]]
        accuracy_axes.errorbar(means, range(len(names)), xerr=bars, fmt="o", color=colour, capsize=3, label=kind)
        accuracy_axes.axvline(by_key["CLIP", kind, "all"]["accuracy"], color=colour, linewidth=0.8, linestyle=":")
    accuracy_axes.set(xlabel="accuracy, %; bars: all orders of the stream")
    accuracy_axes.set_yticks(range(len(names)), names)
    accuracy_axes.invert_yaxis()
    accuracy_axes.grid(alpha=0.3)
    accuracy_axes.legend(loc="lower left")
    differences = [
        [by_key[(name, *at)]["accuracy"] - by_key[("CLIP", *at)]["accuracy"] for at in columns] for name in names
    ]
    difference_axes.imshow(differences, cmap="RdBu", vmin=-8, vmax=8, aspect="auto")
    for y, line in enumerate(differences):
        for x, value in enumerate(line):
            difference_axes.text(x, y, f"{value:+.1f}", ha="center", va="center", fontsize="small")
    labels = [kind if severity == "all" else f"severity {severity}" for kind, severity in columns]
    difference_axes.set_xticks(range(len(columns)), labels, rotation=40, ha="right")
    difference_axes.set(title="points above or below CLIP")
    save(figure, file)


if __name__ == "__main__":
    main()
