"""Towers in every runtime of a CPU: parity with PyTorch, fidelity of INT8, sizes, memory, and speed with --rounds.

    python -m bench.export --photos cifar10-val.tar.gz --out export-parity.csv
    python -m bench.export --towers open_clip --batch 1 8 --rounds 15 --out runtimes.csv
    python -m bench.export --towers clip --layers 2 --limit 16

The towers are the bundled one, and a random-weight B/16 of each library, unpatched and patched, as `ck.export` writes
them: one file for every batch size, in fp32, bf16 and INT8. Photographs are compared in batches of 1, 3 and 8; others
give the scales of INT8. Without --photos both are noise. Each row has

    cosine_p1, cosine_min, near   with the same method in PyTorch's fp32; `near` is the share of at least .9999
    accuracy                      of the bundled tower, zero-shot, with the sub-folders' names as classes
    products, float               in INT8: products with a weight that are quantised, and those that stay float
    megabytes, peak_megabytes     of the graph's files, and of a process that encodes a batch of eight

A patched graph with a scatter, a NonZero or a loop stops the run, and so does a fp32 graph with other embeddings. One
image in ten of a reduced tower may differ by more than rounding, because two of its tokens may be nearly tied.

Speed-ups and η are against the fastest dense variant of the same runtime and precision; those of the columns best_… are
against the fastest dense variant of any runtime in the precision. All variants of a tower are interleaved and timed by
the CPU time of one thread; "Dense() again" is Dense() a second time.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import clipkernels as ck
from bench.exported_graphs import RUNTIMES, Graph, Images, export_all
from bench.result_files import draw, resume, write
from bench.studies.tiny_clip import read
from clipkernels.exporting.files import installed_versions
from clipkernels.exporting.images import noise
from clipkernels.exporting.parity import BATCHES
from clipkernels.measure.environment import environment
from clipkernels.measure.timing import Speed, Times, measure, tabulate
from clipkernels.testing import open_clip_tower, openai_tower, randomized, timm_tower, transformers_tower

BUNDLED, AGAIN = "bundled", "Dense() again"
TOWERS: dict[str, Callable[[int | None], nn.Module]] = {
    BUNDLED: lambda layers: ck.bundled()[0],
    "open_clip": lambda layers: open_clip_tower("ViT-B-16", layers),
    "transformers": lambda layers: transformers_tower("CLIPModel", layers or 12),
    "timm": lambda layers: timm_tower("vit_base_patch16_siglip_224", layers),
    "clip": lambda layers: openai_tower(layers or 12).float(),
}
NAMES = {
    BUNDLED: "tiny CLIP",
    "open_clip": "ViT-B-16",
    "transformers": "CLIPModel B/16",
    "timm": "vit_base_patch16_siglip_224",
    "clip": "ViT-B/16",
}
METHODS: dict[str, Mapping[str, ck.Method | None]] = {
    "B/16": {
        "dense (host)": None,
        "Dense()": ck.Dense(),
        "EViT(keep=0.7)": ck.EViT(0.7),
        "ToMe(r=13)": ck.ToMe(13),
        "TCA(rate=0.035)": ck.TCA(0.035),
    },
    BUNDLED: {
        "dense (host)": None,
        "Dense()": ck.Dense(),
        "EViT(keep=0.7)": ck.EViT(0.7),
        "ToMe(r=4)": ck.ToMe(4),
        "TCA(rate=0.035)": ck.TCA(0.035),
    },
}
DEFAULT_RUNTIMES = tuple(name for name in RUNTIMES if name != "torch.export")
BEST = ("baseline", "speedup", "speedup_p10", "speedup_p90", "efficiency", "efficiency_p10", "efficiency_p90")
"""Columns that a row has against the fastest dense variant of any runtime, too."""
WARMUP = 2
CALIBRATION = {"photographs": 300, "noise": 64}
"""Images that give the scales of INT8."""


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    header = header_of(arguments)
    records = resume(arguments.out, header)
    console = Console(width=None if sys.stdout.isatty() else 160)
    batches: list[int | None] = [*arguments.batch] if arguments.rounds else [None]
    for name in arguments.towers:
        done = {(row["library"], row["batch"]) for row in records}
        pending = [batch for batch in batches if (name, batch) not in done]
        if not pending:
            console.print(f"{name}: skipped, the file has all its rows")
            continue
        if name != BUNDLED and importlib.util.find_spec(name) is None:
            console.print(f"{name}: skipped, it is not installed")
            continue
        torch.manual_seed(arguments.seed)
        model = TOWERS[name](arguments.layers)
        model = model if name == BUNDLED else randomized(model, arguments.seed)
        with torch.no_grad(), TemporaryDirectory() as folder:
            images, methods = read_images(model, name, arguments), METHODS[BUNDLED if name == BUNDLED else "B/16"]
            sizes = [batch for batch in batches if batch is not None] or [BATCHES[-1]]
            graphs = export_all(model, methods, arguments.runtimes, images, Path(folder), sizes, console.print)
            console.print(draw_parity(name, graphs))
            for batch in pending:
                case = {"library": name, "tower": NAMES[name], "batch": batch}
                records += rows_of(model, case, graphs, arguments, console, header["environment"]["commit"])
                if arguments.out:  # an interrupted run keeps its rows
                    write(records, header, arguments.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=list(TOWERS), help="default: all")
    parser.add_argument(
        "--runtimes", nargs="+", choices=RUNTIMES, default=list(DEFAULT_RUNTIMES), help="default: all but torch.export"
    )
    parser.add_argument("--photos", type=Path, metavar="DIR|FILE.tar.gz", help="a sub-folder per class")
    parser.add_argument(
        "--limit", type=int, default=1000, help="images of the bundled tower's comparison; default %(default)s"
    )
    parser.add_argument(
        "--random-limit", type=int, default=100, help="images of a random tower's comparison; default %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=0, help="timed rounds; default %(default)s, which times nothing")
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[1, 8], metavar="B", help="images per timed batch; default: 1 8"
    )
    parser.add_argument("--layers", type=int, metavar="L", help="cut every random tower to its first L blocks")
    parser.add_argument("--seed", type=int, default=0, help="random weights and images; default %(default)s")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.csv",
        help="rows; FILE.json adds the environment; existing rows are not measured again",
    )
    return parser.parse_args()


def header_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the header of the rows: environment, package versions and options."""
    options = {name: getattr(arguments, name) for name in ("layers", "rounds", "seed", "limit", "random_limit")}
    photos = arguments.photos and arguments.photos.name
    return {"environment": environment() | installed_versions(), "clock": "process", "photos": photos, **options}


def read_images(model: nn.Module, name: str, arguments: argparse.Namespace) -> Images:
    """Return photographs, or noise without them."""
    shape = (3, *ck.tower_of(model).image_size)
    limit = arguments.limit if name == BUNDLED else arguments.random_limit
    if arguments.photos is None:
        images = noise(limit + CALIBRATION["noise"], shape)
        return Images(images[:limit], images[limit:])
    photos, classes = read(arguments.photos)
    order = torch.randperm(len(photos.labels), generator=torch.Generator().manual_seed(arguments.seed))
    order = order[: limit + (CALIBRATION["photographs"] if name == BUNDLED else CALIBRATION["noise"])]
    preprocess = preprocess_for(shape)
    images = torch.stack([preprocess(photos.images[index]) for index in order.tolist()])
    labels = torch.from_numpy(photos.labels)[order[:limit]] if name == BUNDLED else None
    return Images(images[:limit], images[limit:], labels, classes)


def preprocess_for(shape: tuple[int, ...]) -> Callable[[Any], Tensor]:
    """Return open_clip's preprocessing of pixels (H,W,3) uint8 for images of a shape."""
    from open_clip.transform import image_transform
    from PIL import Image

    transform = ck.bundled()[1] if shape[1] == 32 else image_transform(shape[1], is_train=False)
    return lambda pixels: transform(Image.fromarray(pixels))


def draw_parity(name: str, graphs: Mapping[str, Mapping[str, Graph]]) -> Table:
    """Return a terminal table of parity, sizes and memory."""
    columns = ("near", "cosine_p1", "cosine_min", "accuracy", "products", "megabytes", "peak_megabytes")
    table = Table("runtime", "variant", *columns, title=f"{name} {NAMES[name]}", title_justify="left")
    for runtime, variants in graphs.items():
        for variant, graph in variants.items():
            cells = (graph.figures[column] for column in columns)
            table.add_row(runtime, variant, *("" if cell is None else f"{cell:.5g}" for cell in cells))
    return table


def rows_of(
    model: nn.Module,
    case: Mapping[str, Any],
    graphs: Mapping[str, Mapping[str, Graph]],
    arguments: argparse.Namespace,
    console: Console,
    commit: str | None,
) -> list[dict[str, Any]]:
    """Return the rows of a tower, timed at a batch size, or with parity alone if the batch size is None."""
    if case["batch"] is None:
        return [
            {**case, "runtime": runtime, "variant": variant, **graph.figures, "commit": commit}
            for runtime, variants in graphs.items()
            for variant, graph in variants.items()
        ]
    records = []
    speeds, best = paired(model, graphs, case["batch"], arguments)
    for runtime, table in speeds.items():
        console.print(draw(f"{case['library']} {case['tower']}, {runtime}, batch {case['batch']}", table))
        for speed in table:
            figures = graphs[runtime][speed.name.removesuffix(" again")].figures
            overall = best[f"{runtime}: {speed.name}"].record()
            against = {f"best_{name}": overall[name] for name in BEST}
            precision = RUNTIMES[runtime][1]
            row = {"runtime": runtime, "precision": precision, **speed.record(), **against, **figures}
            records.append({**case, **row, "commit": commit})
    console.print(draw_best(best, graphs, f"{case['library']} {case['tower']}, batch {case['batch']}"))
    return records


def draw_best(best: Mapping[str, Speed], graphs: Mapping[str, Mapping[str, Graph]], title: str) -> Table:
    """Return a terminal table of the fastest runtime of every variant, by precision."""
    columns = ("precision", "variant", "fastest in", "ms", "speed-up", "η", "against")
    table = Table(*columns, title=f"{title}: the fastest runtimes", title_justify="left")
    for precision in dict.fromkeys(RUNTIMES[runtime][1] for runtime in graphs):
        runtimes = [runtime for runtime in graphs if RUNTIMES[runtime][1] == precision]
        for name in graphs[runtimes[0]]:
            runtime = min(runtimes, key=lambda each: best[f"{each}: {name}"].seconds.median)
            row = best[f"{runtime}: {name}"]
            figures = (f"{1e3 * row.seconds.median:.1f}", f"×{row.speedup.median:.2f}", f"{row.efficiency.median:.2f}")
            table.add_row(precision, name, runtime, *figures, row.baseline)
    return table


def paired(
    model: nn.Module, graphs: Mapping[str, Mapping[str, Graph]], batch: int, arguments: argparse.Namespace
) -> tuple[dict[str, list[Speed]], dict[str, Speed]]:
    """Return the speeds at one batch size, with the variants of all runtimes interleaved.

    Returns:
        The speeds of each runtime, against its fastest dense variant; and those of each "runtime: variant", against the
        fastest dense variant of any runtime in its precision.
    """
    tower = ck.tower_of(model)
    generator = torch.Generator().manual_seed(arguments.seed + 2)
    sets = torch.randn(3, batch, 3, *tower.image_size, generator=generator).unbind()

    def runner(encode: Callable[[Tensor], Any]) -> Callable[[], Any]:
        turn = cycle(sets)
        return lambda: encode(next(turn))

    variants = {
        runtime: {name: graph.variant for name, graph in named.items()}
        | ({AGAIN: named["Dense()"].variant} if "Dense()" in named else {})
        for runtime, named in graphs.items()
    }
    calls = {
        f"{runtime}: {name}": runner(variant.encode)
        for runtime, named in variants.items()
        for name, variant in named.items()
    }
    with Progress(console=Console(stderr=True), transient=True) as bar, torch.inference_mode():
        task = bar.add_task(f"batch {batch}", total=(arguments.rounds + WARMUP) * len(calls))
        advance = lambda: bar.advance(task)  # noqa: E731
        times = measure(calls, arguments.rounds, WARMUP, arguments.seed, "process", advance)
    speeds = {
        runtime: tabulate(Times({name: times.seconds[f"{runtime}: {name}"] for name in named}), named, tower, batch)
        for runtime, named in variants.items()
    }
    best = {}
    for precision in {RUNTIMES[runtime][1] for runtime in variants}:
        same = {
            f"{runtime}: {name}": variant
            for runtime, named in variants.items()
            if RUNTIMES[runtime][1] == precision
            for name, variant in named.items()
        }
        best |= {row.name: row for row in tabulate(times, same, tower, batch)}
    return speeds, best


if __name__ == "__main__":
    main()
