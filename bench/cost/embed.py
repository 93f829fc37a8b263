"""Measure what `ck.embed` adds to reading and encoding: process time, and what decoding takes of it.

    python -m bench.cost.embed --out embed-cost.csv
    python -m bench.cost.embed --model ViT-B-32 --count 32 --rounds 3

Random JPEGs of two sizes are embedded by open_clip's tower with random weights, in fp32. In each round, in random
order: the whole of `ck.embed` without loader processes, reading and preprocessing of the same files alone, and the
tower alone on prepared tensors. `overhead` is (embed - reading) / tower, the median over the rounds. Times are process
time per image. The wall clock of `ck.embed` with two loader processes shows how far decoding and the tower overlap.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from rich import print

import clipkernels as ck
from bench.result_files import header_of, write
from clipkernels.images import Reader
from clipkernels.images.reader import read_bytes

SIZES = {"500×375": (500, 375), "12 megapixels": (4000, 3000)}


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(arguments.model)
    model.eval()
    rows = []
    with TemporaryDirectory() as folder:
        for name, size in SIZES.items():
            files = draw_files(Path(folder, name.replace(" ", "-")), size, arguments.count)
            rows.append({"images": name, **measure(model, preprocess, files, arguments)})
            print(rows[-1])
    if arguments.out:
        write(rows, header_of(arguments, "model", "count", "batch", "rounds", "threads"), arguments.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="open_clip's name; default %(default)s")
    parser.add_argument("--count", type=int, default=32, help="images of each size; default %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="images per forward; default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="the rows; FILE.json adds the environment")
    return parser.parse_args()


def draw_files(folder: Path, size: tuple[int, int], count: int) -> list[Path]:
    """Write JPEGs of smooth random colours, and return their paths."""
    folder.mkdir(parents=True)
    generator, files = np.random.default_rng(0), []
    for index in range(count):
        small = Image.fromarray(generator.integers(0, 256, (48, 64, 3), np.uint8))
        files.append(folder / f"{index:04}.jpg")
        small.resize(size, Image.Resampling.BICUBIC).save(files[-1], quality=90)
    return files


def measure(model: Any, preprocess: Any, files: list[Path], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds per image of the parts, and the overhead."""
    reader, shape, folder = Reader(), (3, *model.visual.image_size), files[0].parent
    prepared = torch.stack([reader.prepare(read_bytes(path), preprocess, shape) for path in files])

    def whole(workers: int = 0) -> None:
        with TemporaryDirectory() as out:
            ck.embed(model, [folder], out, preprocess=preprocess, batch_size=arguments.batch, workers=workers)

    def reading() -> None:
        for path in files:
            reader.prepare(read_bytes(path), preprocess, shape)

    @torch.inference_mode()
    def tower() -> None:
        for part in prepared.split(arguments.batch):
            ck.encode_image(model, part)

    parts: dict[str, Callable[[], None]] = {"embed": whole, "reading": reading, "tower": tower, "tower_again": tower}
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    walls: dict[str, list[float]] = {"embed": [], "loaders": []}
    order = list(parts)
    for _ in range(arguments.rounds):
        random.shuffle(order)
        for name in order:
            wall, start = time.perf_counter(), time.process_time()
            parts[name]()
            seconds[name].append((time.process_time() - start) / len(files))
            if name in walls:
                walls[name].append((time.perf_counter() - wall) / len(files))
        wall = time.perf_counter()
        whole(workers=2)
        walls["loaders"].append((time.perf_counter() - wall) / len(files))
    rounds = zip(seconds["embed"], seconds["reading"], seconds["tower"], strict=True)
    gains = [(total - read) / run for total, read, run in rounds]
    noise = [a / b for a, b in zip(seconds["tower_again"], seconds["tower"], strict=True)]
    return {
        **{f"{name}_ms": round(1e3 * statistics.median(values), 2) for name, values in seconds.items()},
        "overhead": round(statistics.median(gains), 3),
        "overhead_low": round(min(gains), 3),
        "overhead_high": round(max(gains), 3),
        "tower_twice": round(statistics.median(noise), 3),
        **{f"{name}_wall_ms": round(1e3 * statistics.median(values), 2) for name, values in walls.items()},
    }


if __name__ == "__main__":
    main()
