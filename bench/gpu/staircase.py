"""Time a block's four matrix products by the number of tokens: token counts that tile badly, and gains of rounding.

    python -m bench.gpu.staircase --out staircase.csv --plot staircase.png
    python -m bench.gpu.staircase --models B-16 --batch 32 256 --multiples 8 16 --out staircase.csv

The products of B·N rows are timed for every N up to the tower's number of tokens. A count tiles badly if a larger count
takes less time. The times are then summed over every plan as published, and with its keep counts rounded up
(`EViT(…, multiple=8)`).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import clipkernels as ck
from bench.result_files import save, write
from bench.runners import CUDA, DEVICE, capture_calls
from clipkernels.measure.environment import environment
from clipkernels.measure.timing import measure
from clipkernels.testing.inputs import SHAPES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SETS = 12 if CUDA else 2
DEPTH = {"B-32": 12, "B-16": 12, "L-14": 24, "L-14-336": 24, "SO400M-14-384": 27}


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    records, gains = [], []
    for model in arguments.models:
        for batch in arguments.batch:
            times = staircase(model, batch, DTYPES[arguments.dtype], arguments)
            case = {"model": model, "batch": batch, "dtype": arguments.dtype}
            records += [
                {**case, "tokens": n, "microseconds": round(1e6 * seconds, 3), "excess": round(excess(times, n), 4)}
                for n, seconds in times.items()
            ]
            gains += [{**case, **gain} for gain in rounding_gains(model, times, arguments.multiples)]
            if arguments.out:  # an interrupted run keeps its rows
                write(records, {"environment": environment(), "step": arguments.step, "rounding": gains}, arguments.out)
    Console(width=None if sys.stdout.isatty() else 160).print(draw(gains))
    if arguments.plot:
        plot(records, arguments.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        nargs="+",
        choices=SHAPES,
        default=["B-16", "L-14"],
        metavar="SHAPE",
        help="towers; default: B-16 L-14",
    )
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[1, 32, 256], metavar="B", help="images per batch; default: 1 32 256"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument(
        "--multiples",
        nargs="+",
        type=int,
        default=[8, 16],
        metavar="M",
        help="multiples to round keep counts up to; default: 8 16",
    )
    parser.add_argument(
        "--step", type=int, default=1, metavar="N", help="difference between timed token counts; default 1"
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; default %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="rows; FILE.json adds the gains of rounding")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot of the staircases")
    return parser.parse_args()


@torch.inference_mode()
def staircase(model: str, batch: int, dtype: torch.dtype, arguments: argparse.Namespace) -> dict[int, float]:
    """Return the median seconds of a block's products by the number of tokens, from 8 to all."""
    tokens, width = SHAPES[model].tokens, SHAPES[model].width
    sides = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    # Several sets, because in a tower every block reads weights that have left the caches.
    weights = [[torch.randn(side, device=DEVICE).to(dtype) for side in sides] for _ in range(SETS)]
    rows = {side: torch.randn(batch * tokens, side, device=DEVICE).to(dtype) for side in (width, 4 * width)}
    counts = [*range(8, tokens, arguments.step), tokens]
    random.Random(0).shuffle(counts)  # so that clock drift does not look like a slope
    bar = track(counts, f"{model} b{batch}", console=Console(stderr=True), transient=True)
    times = {n: seconds_of([rows[side][: batch * n] for _, side in sides], weights, arguments.rounds) for n in bar}
    return dict(sorted(times.items()))


def seconds_of(inputs: Sequence[Tensor], weights: Sequence[Sequence[Tensor]], rounds: int) -> float:
    """Return the median seconds of a block's products; on a GPU one CUDA graph runs several blocks."""

    def multiply() -> None:
        for block in weights:
            for x, weight in zip(inputs, block, strict=True):
                x @ weight.T

    multiply()
    run = capture_calls(multiply, [()])[0] if CUDA else multiply
    return measure({"": run}, rounds).of("").median / len(weights)


def excess(times: dict[int, float], tokens: int) -> float:
    """Return the excess time of a token count over the fastest count at least as large, as a fraction; 0 tiles well."""
    return times[tokens] / min(seconds for n, seconds in times.items() if n >= tokens) - 1


def rounding_gains(model: str, times: dict[int, float], multiples: Sequence[int]) -> list[dict[str, Any]]:
    """Return rows with the time of each method's products in all blocks, as published and with counts rounded up."""
    shape, counts = SHAPES[model], sorted(times)

    def total(method: Any) -> float:
        plan = method.plan(shape.tokens, DEPTH[model], shape.prefix)
        # An untimed count is assumed to take as long as the next larger timed one.
        seconds = [times[next(n for n in counts if n >= tokens)] for tokens in plan.tokens]
        # A third of a block's operations are the attention's, on entering tokens; the MLP's are on leaving tokens.
        return sum(before / 3 + after * 2 / 3 for before, after in pairwise(seconds))

    rows = []
    for name, make in (
        ("EViT(keep=0.7)", lambda multiple: ck.EViT(0.7, multiple=multiple)),
        ("EViT(keep=0.5)", lambda multiple: ck.EViT(0.5, multiple=multiple)),
        ("TCA(rate=0.1)", lambda multiple: ck.TCA(0.1, multiple=multiple)),
    ):
        published = total(make(1))
        for multiple in multiples:
            seconds = total(make(multiple))
            gain = {"method": name, "multiple": multiple, "speedup": round(published / seconds, 4)}
            rows.append({**gain, "milliseconds": round(1e3 * published, 4), "rounded": round(1e3 * seconds, 4)})
    return rows


def draw(gains: Sequence[dict[str, Any]]) -> Table:
    """Return a table of the gains of rounding."""
    title = "all blocks' products, as published and with keep counts rounded up"
    table = Table("model", "batch", "method", "multiple", "ms", "rounded", "speed-up", title=title)
    for gain in gains:
        names = ("model", "batch", "method", "multiple", "milliseconds", "rounded", "speedup")
        table.add_row(*(str(gain[name]) for name in names))
    return table


def plot(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot microseconds per token against the number of tokens, one panel for each batch."""
    from matplotlib.figure import Figure

    batches = sorted({row["batch"] for row in records})
    figure = Figure(figsize=(5 * len(batches), 4.5), layout="constrained")
    for panel, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        for model in dict.fromkeys(row["model"] for row in records):
            line = [row for row in records if (row["model"], row["batch"]) == (model, batch)]
            per_token = [row["microseconds"] / row["tokens"] / batch for row in line]
            panel.plot([row["tokens"] for row in line], per_token, linewidth=0.8, label=model)
        panel.set(xlabel="tokens", ylabel="µs per token", title=f"batch {batch}")
        panel.legend()
    save(figure, file)


if __name__ == "__main__":
    main()
