"""Draw docs/speedup.png: measured speed-up against the share of tokens left, with the ideal line.

    python -m bench.speed_picture
    python -m bench.speed_picture --rows bench/results/DEVICE/FILE.csv --batch 32 --out picture.png

Each dot is one row of a table that `bench/towers.py` wrote, with its 10-90 % band. The share of tokens is the mean over
the blocks of the tokens that a block processes, divided by the tokens that enter the tower. The work of a block is
nearly proportional to its tokens, so the ideal speed-up is one over that share.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from bench.result_files import read_csv, save

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "bench" / "results" / "amd-epyc-2-cores" / "towers-B16-fp32-methods.csv"
PICTURE = ROOT / "docs" / "speedup.png"
DEVICE = "one thread of an AMD EPYC (Zen 3)"
HOST = "dense (host)"
COLORS = {"EViT": "#d1495b", "ToMe": "#2e6f95", "TCA": "#3a7d44", "PatchRanking": "#8e6bbf"}
DENSE_COLOR = "#333333"
# Labels that would cover a neighbour next to their dot: a place in % and ×, joined to the dot by a line.
LABELS = {
    "TCA(rate=0.1)": (105, 1.72),
    "EViT(keep=0.7)": (105, 1.50),
    "PatchRanking(keep=0.6)": (66.5, 1.17),
    "TCA(rate=0.035)": (86, 0.99),
    "Dense()": (105.5, 1.12),
    "EViT(keep=0.5)": (76, 2.02),
}
LEFT_OF_DOT = {"TCA(rate=0.1)", "EViT(keep=0.7)", "EViT(keep=0.5)"}


class Dot(NamedTuple):
    """One method: tokens that enter and leave the tower, mean share of tokens per block, speed-up with its band."""

    method: str
    entering: int
    leaving: int
    share: float
    speedup: float
    low: float
    high: float


def main() -> None:
    arguments = parse()
    rows = [row for row in read_csv(arguments.rows) if int(row["batch"]) == arguments.batch]
    if not rows:
        raise SystemExit(f"error: expected rows of batch {arguments.batch} in {arguments.rows}, found none")
    draw([dot_of(row) for row in rows if not row["variant"].endswith("again")], caption(rows[0]), arguments.out)
    print(arguments.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS, metavar="FILE.csv", help="a table of bench/towers.py")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="batch size of the rows (default: 8)")
    parser.add_argument("--out", type=Path, default=PICTURE, metavar="FILE.png", help="default: docs/speedup.png")
    return parser.parse_args()


def dot_of(row: Mapping[str, str]) -> Dot:
    """The dot of one row."""
    tokens = [int(count) for count in row["tokens"].split()]
    speedup, low, high = (float(row[key]) for key in ("speedup", "speedup_p10", "speedup_p90"))
    return Dot(row["variant"], tokens[0], tokens[-1], share_of_tokens(tokens), speedup, low, high)


def share_of_tokens(tokens: Sequence[int]) -> float:
    """The mean share of the entering tokens that a block processes.

    A step stands between attention and MLP. In a block of width C the projections of attention take 4·C²
    multiply-accumulates per token, the MLP 8·C²: a third of a block sees the tokens before its step, two thirds those
    after it.
    """
    blocks = pairwise(tokens)
    return sum(before / 3 + after * 2 / 3 for before, after in blocks) / (len(tokens) - 1) / tokens[0]


def caption(row: Mapping[str, str]) -> str:
    """The conditions of a measurement in one line."""
    dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[row["dtype"]]
    return f"{row['model']}, batch {row['batch']}, {dtype}, {DEVICE}; bars: 10-90 %"


def draw(dots: Sequence[Dot], conditions: str, out: Path) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    shares = [share / 100 for share in range(40, 108)]
    axes.plot([100 * share for share in shares], [1 / share for share in shares], color="#999999", linewidth=1.2)
    label = {"ha": "right", "color": "#777777", "fontsize": 9.5}
    axes.annotate("ideal: 100 % ÷ x", (46.5, 1 / 0.465), (-6, 2), textcoords="offset points", **label)
    for dot in dots:
        kind = re.split(r"\W", dot.method)[0]
        color, share = COLORS.get(kind, DENSE_COLOR), 100 * dot.share
        band = None if dot.low == dot.high else [[dot.speedup - dot.low], [dot.high - dot.speedup]]
        axes.errorbar(
            share, dot.speedup, yerr=band, fmt="o", color=color, markersize=8, elinewidth=1, capsize=2.5,
            markerfacecolor="white" if dot.method == HOST else color,
        )  # fmt: skip
        style = {"color": color, "fontsize": 9.5, "va": "center", "linespacing": 1.25}
        place = LABELS.get(dot.method)
        if place is None:
            axes.annotate(label_of(dot), (share, dot.speedup), (12, -4), textcoords="offset points", **style)
            continue
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.7, "shrinkA": 2, "shrinkB": 5}
        line["relpos"] = (1, 0.5) if dot.method in LEFT_OF_DOT else (0, 0.5)
        axes.annotate(label_of(dot), (share, dot.speedup), place, arrowprops=line, **style)
    axes.set(xlabel="tokens per block, mean", ylabel="speed-up over Dense()")
    axes.set(xlim=(107, 40), ylim=(0.72, 2.25))
    axes.yaxis.set_major_formatter(lambda value, _: f"×{value:.1f}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(conditions, loc="left", fontsize=10, color="#555555")
    save(figure, out)


def label_of(dot: Dot) -> str:
    """The label of a dot."""
    if dot.method == HOST:
        return f"open_clip as it is, ×{dot.speedup:.2f}"
    counts = "" if dot.leaving == dot.entering else f", {dot.entering} → {dot.leaving} tokens"
    return f"{dot.method}{counts}\n×{dot.speedup:.2f}"


if __name__ == "__main__":
    main()
