"""Measure the ceilings of a device: the bandwidth of a copy and the arithmetic rate of a large matrix product.

    python -m bench.gpu.ceilings --out ceilings.json

Data are random. Bandwidth counts bytes read and bytes written. Figures are medians of runs on a warm device. The file
has the environment, too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from bench.runners import CUDA, DEVICE, copy_rate, matmul_rate
from clipkernels.files import atomic_write
from clipkernels.measure.environment import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="rates and environment")
    arguments = parser.parse_args()
    dtypes = (torch.bfloat16, torch.float32, *([torch.float16] if CUDA else []))
    products = {str(dtype).removeprefix("torch."): matmul_rate(dtype, DEVICE) for dtype in dtypes}
    ceilings = {"copy_gb_per_s": copy_rate(DEVICE), "matmul_tflop_per_s": products, **environment()}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(arguments.out) as temporary:
            Path(temporary).write_text(json.dumps(ceilings, indent=1), encoding="utf-8")
    rates = ", ".join(f"{name} {rate:.4g} TFLOP/s" for name, rate in products.items())
    print(f"{ceilings['device']}: copy {ceilings['copy_gb_per_s']:.4g} GB/s; products {rates}")


if __name__ == "__main__":
    main()
