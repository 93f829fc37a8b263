"""Time golden rankings on this machine, against the literal loop over images, rounds and windows.

    python -m bench.cost.ranking --images cifar10-val.tar.gz --out ranking-speed.csv
    python -m bench.cost.ranking --images val_folder --block 2 --rounds 3

The model is the bundled CLIP, with window 2, stride 1 and ten patches per round. Figures are medians of CPU time per
image, the 10-90 % band of the ratio over rounds of sixteen images, and the number of equal rankings. The loop ranks
only the first image of a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import print
from torch import Tensor

import clipkernels as ck
from bench.naive.ranking import literal_ranking
from bench.result_files import header_of, write
from bench.studies.ranking import preprocess_photos
from bench.studies.tiny_clip import read
from clipkernels.learn.patch_ranking import golden_ranking
from clipkernels.measure.environment import environment

IMAGES = 16


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    images = preprocess_photos(read(arguments.images)[0], IMAGES * arguments.rounds).images
    row = speed(images, arguments.block)
    print(row)
    if arguments.out:
        write([row], header_of(arguments, "block", "rounds", "threads"), arguments.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR|FILE.tar.gz", help="a sub-folder per class")
    parser.add_argument(
        "--block", type=int, default=3, help="the block before which patches are removed; default %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds of sixteen images; default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="the row; FILE.json adds the environment")
    return parser.parse_args()


def speed(images: Tensor, block: int) -> dict[str, Any]:
    """Return a row with the seconds per image of both forms, over images (16·rounds,3,S,S)."""
    model, seconds, literal_seconds, equal = ck.bundled()[0], [], [], []
    for part in images.split(IMAGES):
        start = time.process_time()
        ranks = golden_ranking(model, part, score="feature", block=block).ranks
        middle = time.process_time()
        with torch.inference_mode():
            literal = literal_ranking(model, part[:1], "feature", None, None, 2, 1, 10, block)
        seconds.append((middle - start) / len(part))
        literal_seconds.append(time.process_time() - middle)
        equal.append(torch.equal(ranks[:1], literal))
    ratios = [slow / fast for slow, fast in zip(literal_seconds, seconds, strict=True)]
    low, high = np.quantile(ratios, (0.1, 0.9))
    return {
        **{"block": block, "window": 2, "stride": 1, "step": 10, "seconds": round(statistics.median(seconds), 4)},
        **{
            "literal_seconds": round(statistics.median(literal_seconds), 4),
            "speedup": round(statistics.median(ratios), 2),
        },
        **{"speedup_p10": round(float(low), 2), "speedup_p90": round(float(high), 2)},
        **{"alike": f"{sum(equal)} of {len(equal)}", "commit": environment()["commit"]},
    }


if __name__ == "__main__":
    main()
