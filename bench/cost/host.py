"""Measure the host's time of operations and towers at batch 1, and count the launches of towers. Needs no GPU.

    python -m bench.cost.host
    python -m bench.cost.host --rounds 31 --only towers
    python -m bench.cost.host --only launches --out bench/results/launches.csv

Triton's driver is a stub that launches nothing, so what remains is the host's work: checks, the choice of a backend,
allocations, the launches. Figures are process time of one thread, medians of interleaved rounds. Compare ratios: the
CPU allocates memory faster than the allocator of a GPU, and in the table of towers both sides compute their matrix
products, tiny ones, on the CPU.

A block has these launches, of which `Dense()` has the first four:

    _attention_kernel   attention and, where a step needs it, the CLS row of every head
    _add_norm_kernel    the residual sum after attention with the projection's bias, and the LayerNorm before the MLP
    _bias_act_kernel    the bias and the activation of the MLP
    _add_norm_kernel    the residual sum after the MLP with its bias, and the LayerNorm of the next block
    _choose_kernel      EViT: the mean of the scores over heads, and the selection
    _gather_kernel      EViT: the kept patches and the fused token, with the LayerNorm before the MLP
    _nearest_kernel     ToMe: the mean of the keys over heads, normalised, and the most similar token of each
    _strongest_kernel   ToMe: the r most similar pairs
    _merge_kernel       ToMe: the merged tokens, with the LayerNorm before the MLP

The matrix products, which are cuBLAS's, come in addition: four per block.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich import print
from rich.table import Table

import clipkernels as ck
from bench import stub_driver
from bench.stub_driver import StubDriver
from clipkernels.files import atomic_write, write_csv
from clipkernels.measure.timing import Band, measure

HALF = torch.bfloat16
TABLES = ("operations", "towers", "launches")
YARDSTICK = "torch.add of 4 elements"
HOST = "open_clip eager"
# Both are of twelve blocks, batch 1. The first has next to nothing to compute; the second has a B/16's tokens.
TIMED = {"image_size": 64, "methods": {"Dense()": ck.Dense(), "EViT(0.7)": ck.EViT(0.7), "ToMe(1)": ck.ToMe(1)}}
COUNTED = {"image_size": 224, "methods": {"Dense()": ck.Dense(), "EViT(0.7)": ck.EViT(0.7), "ToMe(13)": ck.ToMe(13)}}


def main() -> None:
    arguments = parse()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        sys.exit("error: expected triton's compiler, got TRITON_INTERPRET=1: unset it")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Patching runs a block to verify it, so it comes before the stub, under which nothing is computed.
    timed, counted = towers(**TIMED), towers(**COUNTED)
    stub = stub_driver.install()
    if "operations" in arguments.only:
        print(operations_table(stub, arguments.rounds))
    if "towers" in arguments.only:
        print(towers_table(stub, timed, arguments.rounds))
    if "launches" in arguments.only:
        rows = launches_of(stub, counted)
        if arguments.out is None:
            write_csv(rows, sys.stdout)
        else:
            with atomic_write(arguments.out) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
                write_csv(rows, file)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="tables; default: all")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each timed table; default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="the launches; default: the terminal")
    return parser.parse_args()


def operations() -> dict[str, tuple[Callable[[], object], Callable[[], object] | None]]:
    """Return, by name, the public call of operations at the sizes of a B/16, batch 1, and the call inside a tower.

    Operations that no tower takes have a public call alone.
    """
    from clipkernels import ops
    from clipkernels.ops import unchecked

    tokens, width, heads, r = 197, 768, 12, 13
    x, y = (torch.randn(1, tokens, width).to(HALF) for _ in range(2))
    packed = torch.randn(1, tokens, 3 * width).to(HALF)
    q, k, v = packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    weight, bias, wide_bias = (torch.randn(size).to(HALF) for size in (width, width, 4 * width))
    hidden, norm = torch.randn(1, tokens, 4 * width).to(HALF), (weight, bias, 1e-5)
    scores, size = torch.rand(1, heads, tokens - 1), torch.ones(1, tokens)
    even = (tokens + 1) // 2
    match = ops.Match(*(torch.zeros(1, count, dtype=torch.int64) for count in (even - r, r, r)))
    visual, pooled, classes = (torch.randn(size).to(HALF) for size in ((1, tokens - 1, 512), (1, 512), (10, 512)))
    teacher, projection = torch.randn(1, tokens, 512).to(HALF), torch.randn(512, width).to(HALF)
    importance, mask = torch.rand(1, tokens), torch.rand(1, tokens) < 0.4
    calls = {
        "add_norm": ("add_norm", (x, y, bias, None, norm)),
        "bias_act": ("bias_act", (hidden, wide_bias, "quick_gelu")),
        "attention": ("attention", (q, k, v, None, None, 1)),
        "attention, cls": ("attention", (q, k, v, None, "cls", 1)),
        "prune_tokens, heads, fuse, norm": ("prune_tokens", (x, scores, 137, True, "mean", 1, norm)),
        "match_tokens": ("match_tokens", (k, r, 1)),
        "merge_tokens, size, norm": ("merge_tokens", (x, match, size, norm)),
        "condense_tokens, rank, norm": ("condense_tokens", (x, scores, 90, 60, 2, scores, "rank", 1, 0, norm)),
        "cross_attention": ("cross_attention", (visual, classes)),
        "calip_logits": ("calip_logits", (visual, pooled, classes)),
        "targeted_l1": ("targeted_l1", (x, teacher, projection, importance, mask)),
    }

    def bound(module: Any, name: str, values: tuple[Any, ...]) -> Callable[[], object]:
        run = getattr(module, name)
        return lambda: run(*values)

    return {
        name: (bound(ops, op, values), bound(unchecked, op, values) if hasattr(unchecked, op) else None)
        for name, (op, values) in calls.items()
    }


@torch.inference_mode()
def operations_table(stub: StubDriver, rounds: int, calls: int = 200) -> Table:
    """Return a table of the host's time of operations, public and inside a tower, beside a small torch.add."""
    four = torch.randn(4)
    runs: dict[str, Callable[[], object]] = {YARDSTICK: lambda: four + four}
    launches = {}
    for name, (public, internal) in operations().items():
        public()
        launches[name] = count(stub, internal or public).total()
        runs[name] = public
        if internal is not None:
            runs[f"{name} inside"] = internal
    times = measure({name: repeat(run, calls) for name, run in runs.items()}, rounds, warmup=2, clock="process")
    title = "Host time of an operation, B/16, batch 1, bf16; ×: in units of torch.add"
    table = Table("operation", "launches", "public µs", "×", "in a tower µs", "×", title=title, title_justify="left")
    yard = 1e6 * times.of(YARDSTICK).median / calls
    table.add_row(YARDSTICK, "", f"{yard:.2f}", "1.0", "", "")
    for name, number in launches.items():
        figures = []
        for variant in (name, f"{name} inside"):
            if variant in runs:
                figures.append(f"{1e6 * times.of(variant).median / calls:.1f}")
                figures.append(f"{1 / times.ratio(variant, YARDSTICK)[0]:.1f}")
        table.add_row(name, str(number), *figures)
    return table


def towers(image_size: int, methods: dict[str, Any]) -> dict[str, tuple[Callable[[], object], int]]:
    """Return, by name, open_clip's own forward and the patched ones of a narrow tower of twelve blocks."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    images = torch.randn(1, 3, image_size, image_size).to(HALF)

    def forward(method: Any) -> Callable[[], object]:
        sizes = {"image_size": image_size, "patch_size": 16, "width": 64, "layers": 12, "heads": 4, "output_dim": 32}
        model: Any = VisionTransformer(**sizes, mlp_ratio=4.0, act_layer=QuickGELU).eval().to(HALF)
        model = model if method is None else ck.patch(model, method)
        return lambda: model(images)

    return {HOST: forward(None), **{name: forward(method) for name, method in methods.items()}}


@torch.inference_mode()
def towers_table(stub: StubDriver, forwards: dict[str, Callable[[], object]], rounds: int, calls: int = 10) -> Table:
    """Return a table of the host's time of towers, beside open_clip's own forward."""
    launches = {name: count(stub, forward).total() for name, forward in forwards.items()}
    times = measure({name: repeat(run, calls) for name, run in forwards.items()}, rounds, warmup=2, clock="process")
    title = "Host time of a forward, 12 blocks, width 64, 17 tokens, batch 1, bf16"
    table = Table("tower", "launches", "µs", "× open_clip [p10-p90]", title=title, title_justify="left")
    for name in forwards:
        low, middle, high = sorted(1 / value for value in times.ratio(name, HOST))
        ratio = Band(middle, low, high)
        microseconds = f"{1e6 * times.of(name).median / calls:.0f}"
        table.add_row(name, str(launches[name]), microseconds, f"{ratio.median:.2f} [{ratio.low:.2f}-{ratio.high:.2f}]")
    return table


@torch.inference_mode()
def launches_of(stub: StubDriver, forwards: dict[str, Callable[[], object]]) -> list[dict[str, Any]]:
    """Return the launches of one forward of each method, by kernel; those of all kernels first."""
    rows = []
    for name, forward in forwards.items():
        if name != HOST:
            kernels = count(stub, forward)
            counts = {"all": kernels.total(), **dict(sorted(kernels.items()))}
            rows += [{"method": name, "kernel": kernel, "launches": number} for kernel, number in counts.items()]
    return rows


def count(stub: StubDriver, run: Callable[[], object]) -> Counter[str]:
    """Return the launches of a call, by kernel."""
    stub.counts.clear()
    run()
    return stub.counts.copy()


def repeat(run: Callable[[], object], calls: int) -> Callable[[], None]:
    """Return a function that makes several calls."""

    def several() -> None:
        for _ in range(calls):
            run()

    return several


if __name__ == "__main__":
    main()
