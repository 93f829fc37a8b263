"""A process that embeds synthetic items by a model that costs nothing, and prints its figures as JSON.

python -m tests.collection.synthetic OUT ITEMS WORKERS
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

import clipkernels as ck
from clipkernels.collection import encoder, run
from clipkernels.collection.sources.items import BATCH_ROWS, Answers, Item, make_batch
from clipkernels.collection.store import folders
from clipkernels.encode import Encoded
from clipkernels.images import Reader

IMAGE = Image.new("RGB", (32, 32))
PIXELS = torch.zeros(3, 32, 32)


class Synthetic:
    """A source of items without files.

    Args:
        items: number of them.
    """

    name, note = "synthetic", None

    def __init__(self, items: int) -> None:
        self.items = items

    def list(self, columns: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        """Yield the listing; ids have 33 characters, as paths have."""
        for start in range(0, self.items, BATCH_ROWS):
            places = np.arange(start, min(start + BATCH_ROWS, self.items))
            ids = [f"photographs/{place // 1000:06d}/{place:010d}.jpg" for place in places.tolist()]
            yield make_batch(pa.array(ids), places, np.full(len(places), 64), places)

    def columns(self) -> dict[str, pa.DataType]:
        """No columns."""
        return {}

    def fetch(self, ids: Sequence[str], places: Sequence[int], columns: Sequence[str]) -> Answers:
        """Each item's number as its content; one of a thousand cannot be read."""
        return [
            Item(place.to_bytes(8, "little"), 64, place, {}) if place % 1000 else "a reason" for place in places
        ]  # fmt: skip


def encode_image(model: Any, images: torch.Tensor) -> Encoded:
    """Embeddings of ones."""
    return Encoded(torch.ones(len(images), 64))


def peak(process: int | str) -> int:
    """The most memory that a process has had, in bytes."""
    [line] = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def main(out: str, items: int, workers: int) -> None:
    """Embed and print: what `embed` returns; peak and workers_peak, in bytes; process times in seconds, from the start
    and from reading the manifest until the first unit is written."""
    times: dict[str, float] = {}
    workers_peak = 0

    def progress(state: run.Progress) -> None:
        nonlocal workers_peak
        times.setdefault("first_batch", time.process_time())
        if state.done % 64 == 0:
            workers_peak = max([workers_peak, *(peak(child.pid) for child in multiprocessing.active_children())])

    def timed(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            times.setdefault(name, time.process_time())
            result = function(*arguments)
            times.setdefault(f"{name} done", time.process_time())
            return result

        return call

    Reader.decode = lambda self, content: IMAGE  # type: ignore[method-assign]
    run.find_sources = lambda *_, **__: [Synthetic(items)]
    run.encode_image = encoder.encode_image = encode_image  # type: ignore[attr-defined]
    folders.read_manifest, run.list_items = timed("manifest", folders.read_manifest), timed("list", run.list_items)
    run.write_unit = timed("unit", run.write_unit)
    model, _, _ = ck.bundled()
    started = time.process_time()
    result = run.embed(
        model, ["synthetic"], out, preprocess=lambda image: PIXELS, batch_size=512, workers=workers, progress=progress
    )
    ended = time.process_time()
    figures = {
        **result._asdict(),
        "peak": peak("self"),
        "workers_peak": workers_peak,
        "seconds_to_first_unit": times["unit done"] - times.get("manifest", started),
        "seconds_of_listing": times["list done"] - times["list"],
        "seconds": ended - started,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
