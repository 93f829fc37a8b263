"""Measure images/s and reduction efficiency η of random-weight CLIP towers, every variant interleaved with dense.

    python -m bench.towers --models ViT-B-16 --batch 1 8 32 --threads 1 --clock process --out towers.csv
    python -m bench.towers --models ViT-B-16 --dtype float32 bfloat16 --batch 1 8 --threads 1 --compile freeze openvino
    python -m bench.towers --models ViT-L-14 --dtype bfloat16 --batch 1 256 --plain --graphs 8   # on a GPU
    python -m bench.towers --models ViT-B-16 --compile default max-autotune --compiled dense "Dense()" "EViT(keep=0.7)"
    python -m bench.towers --models ViT-B-16 --peer tome=../ToMe
    python -m bench.towers --models transformers:CLIPModel timm:vit_base_patch16_siglip_224 clip:ViT-B-16
    pytest bench/towers.py -k "B-32 and b8" --benchmark-json=towers.json

η = (t_dense / t_reduced) ÷ (GMACs_dense / GMACs_reduced), where dense is the fastest dense variant of the run and the
GMACs are those that each side ran. A row also has the peak memory of a batch, and its arithmetic rate as a share of a
large matrix product's in the same run. A run resumes from its file. A variant that cannot run is reported and left out,
and a tower with a wrong result is never timed. Under pytest each round of a benchmark first times both dense variants,
so `extra_info` also holds a paired speed-up and η.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from itertools import cycle, product
from pathlib import Path
from time import monotonic
from typing import Any

import open_clip
import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import clipkernels as ck
from bench.models import LIBRARIES, NAMES, R, build, images, methods
from bench.result_files import EXIT_DEADLINE, draw, note_attempt, remaining, resume, stamp, write
from bench.runners import (
    ALLOWED_EPS,
    CUDA,
    DEVICE,
    in_graphs,
    is_device_lost,
    launches,
    matmul_rate,
    peak_mib,
    plain,
    run_once,
    runs_without_error,
)
from clipkernels.comparison.towers import compile_each, name_mode, room_to_compile
from clipkernels.measure.environment import environment
from clipkernels.measure.timing import HOST, Speed, Times, Variant, plan_for, tabulate, time_variants, vary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_BATCHES = {"ViT-B-32": (1, 8, 32), "ViT-B-16": (1, 8), "ViT-L-14": (1,)}
BATCHES = dict.fromkeys(R, (1, 32, 256)) if CUDA else CPU_BATCHES
ROUNDS = 20 if CUDA else 5
OPTIONS = ("rounds", "clock", "seed", "only", "plain", "graphs", "compile", "compiled", "launches", "peer")


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    started = monotonic()
    options = {name: getattr(arguments, name) for name in OPTIONS}
    header = {"environment": environment(), **options, "peer": arguments.peer and arguments.peer.name}
    records = resume(arguments.out, header)
    done = {(row["model"], row["dtype"], row["batch"]) for row in records}
    console = Console(width=None if sys.stdout.isatty() else 160)
    every = [(name, dtype, batch) for batch, name, dtype in product(arguments.batch, arguments.models, arguments.dtype)]
    cases, failed = remaining(every, done, arguments.out)
    for index, (name, dtype, batch) in enumerate(cases):
        if index and monotonic() - started > arguments.deadline:
            print(f"{len(cases) - index} of {len(every)} left: run the same command again to continue", flush=True)
            sys.exit(EXIT_DEADLINE)
        note_attempt(arguments.out, str((name, dtype, batch)))
        try:
            rows, complete = paired(name, DTYPES[dtype], batch, arguments)
        except Exception:  # out of memory, no compiler, or a wrong result: the other cases are still worth measuring
            traceback.print_exc()
            failed.append(f"{name} {dtype} b{batch}")
            if is_device_lost():
                sys.exit(EXIT_DEADLINE)
            continue
        console.print(draw(f"{name} {dtype}, batch {batch}, {arguments.threads} threads", [row for row, _ in rows]))
        case = {"model": name, "dtype": dtype, "batch": batch}
        records += [{**case, **row.record(), **extra, **stamp()} for row, extra in rows]
        if arguments.out:  # an interrupted run keeps its rows
            write(records, header, arguments.out)
        if not complete:  # a failed capture may leave the random generator and the stream in capture mode
            sys.exit(EXIT_DEADLINE)
    if failed:
        sys.exit(f"error: {', '.join(failed)} could not be measured")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(R), metavar="NAME", help=NAMES)
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[1, 8, 32], metavar="B", help="images per batch; default: 1 8 32"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="default: float32")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="VARIANT", help="the host and variants whose names start like this"
    )
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="order of the variants; default %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--clock", choices=["wall", "process"], default="wall", help="process: CPU time of one thread")
    parser.add_argument("--plain", action="store_true", help="also every method in plain PyTorch, with the same plan")
    parser.add_argument(
        "--graphs", type=int, default=0, metavar="B", help="up to this batch, also every variant from a CUDA graph"
    )
    parser.add_argument(
        "--compile",
        nargs="+",
        default=[],
        metavar="MODE",
        help="also variants under torch.compile in its modes, by ck.compile with frozen weights (freeze), or exported "
        "to onnxruntime or openvino",
    )
    parser.add_argument(
        "--compiled",
        nargs="+",
        default=[""],
        metavar="VARIANT",
        help="variants to compile: names start like this; default: all",
    )
    parser.add_argument(
        "--launches", action="store_true", help="also count kernel launches, which disturbs later timings"
    )
    parser.add_argument(
        "--peer", metavar="tome=PATH", help="a checkout of facebookresearch/ToMe to run on timm's ViT-B/16"
    )
    parser.add_argument(
        "--deadline", type=float, default=float("inf"), metavar="SECONDS", help="start no case after this time"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="rows; FILE.json adds the environment")
    arguments = parser.parse_args()
    unknown = sorted({name for name in arguments.models if ":" not in name} - set(open_clip.list_models()))
    unknown += [name for name in arguments.models if ":" in name and name.partition(":")[0] not in LIBRARIES]
    if unknown:
        parser.error(f"expected {NAMES}, got {', '.join(unknown)}")
    if arguments.clock == "process" and arguments.threads != 1:
        parser.error(f"expected --threads 1 with --clock process, got {arguments.threads}")
    if (arguments.graphs or arguments.launches) and not CUDA:
        parser.error("expected a GPU with --graphs and --launches, got none")
    if arguments.peer:
        peer, _, path = arguments.peer.partition("=")
        if peer != "tome" or not (Path(path) / "tome" / "patch" / "timm.py").is_file():
            parser.error(f"expected --peer tome=PATH with PATH/tome/patch/timm.py, got {arguments.peer}")
        if set(arguments.models) != {"ViT-B-16"}:
            parser.error(f"expected --models ViT-B-16 with --peer, got {' '.join(arguments.models)}")
        arguments.peer = Path(path).resolve()
    return arguments


def paired(
    name: str, dtype: torch.dtype, batch: int, arguments: argparse.Namespace
) -> tuple[list[tuple[Speed, dict[str, Any]]], bool]:
    """Measure one model, dtype and batch size, all variants interleaved.

    Returns:
        The rows, each with its additional figures, and true if every CUDA graph could be captured.
    """
    rate = matmul_rate(dtype, DEVICE, arguments.clock)
    peers: dict[str, Variant] = {}
    if arguments.peer:
        from bench.naive.tome_peer import peer_tome

        model, peers = peer_tome(arguments.peer, dtype, DEVICE, R[name])
    else:
        model = build(name, dtype)
    tower = ck.tower_of(model)
    batches = images(tower, batch, dtype)
    selected = {
        label: method for label, method in methods(name, model).items() if label.startswith((HOST, *arguments.only))
    }
    selected = {
        label: method
        for label, method in selected.items()
        if runs_without_error(label, partial(check, model, {label: method}, batches[0]), HOST)
    }
    eager = vary(model, selected)
    if arguments.plain:
        eager |= {f"{label}, plain": plain(variant) for label, variant in eager.items() if label != HOST}
    compilable = {label: method for label, method in selected.items() if label.startswith(tuple(arguments.compiled))}
    graphs = in_graphs(eager, batches[0]) if batch <= arguments.graphs else {}
    complete = len(graphs) == len(eager) or batch > arguments.graphs
    # Only dense variants have an expected embedding: rounding may move a token of the others.
    with torch.inference_mode():
        dense = [label for label, method in selected.items() if method is None or isinstance(method, ck.Dense)]
        expected = {label: eager[label].encode(batches[0]) for label in dense}
    with (
        Progress(console=Console(stderr=True), transient=True) as bar,
        room_to_compile(len(eager) + len(compilable) * len(arguments.compile)) if arguments.compile else nullcontext(),
    ):
        compiled: dict[str, Variant] = {}
        for mode, (label, method) in product(arguments.compile, compilable.items()):
            attempt = partial(_add_compiled, compiled, model, {label: method}, mode, batch)
            runs_without_error(f"{label}, {name_mode(mode)}", attempt, HOST)
        variants = {**eager, **compiled, **graphs, f"{HOST} again": eager[HOST], **peers}
        variants = {
            label: variant
            for label, variant in variants.items()
            if runs_without_error(
                label, partial(run_once, variant, batches[0], expected.get(label.partition(", ")[0])), HOST
            )
        }
        peers = {label: variant for label, variant in peers.items() if label in variants}
        warmup = 3 if arguments.compile else 1  # the second call of a compiled variant may record a CUDA graph
        task = bar.add_task(f"{name} {dtype} b{batch}", total=(arguments.rounds + warmup) * len(variants))
        times = time_variants(
            variants,
            batches,
            arguments.rounds,
            warmup,
            arguments.seed,
            arguments.clock,
            progress=lambda: bar.advance(task),
        )
        extras = {label: {"peak_mib": peak_mib(label, variant, batches[0])} for label, variant in variants.items()}
        if arguments.launches:
            for label, variant in variants.items():
                extras[label]["launches"] = launches(partial(variant.encode, batches[0]))
    rows = tabulate(times, variants, tower, batch)
    if peers:
        rows += tabulate(times, peers, tower, batch, baseline="timm (host)")
    return [(row, {**extras[row.name], **arithmetic(row, batch, rate)}) for row in rows], complete


def _add_compiled(compiled: dict[str, Variant], *arguments: Any) -> None:
    """Add the variants that `compile_each` returns."""
    compiled.update(compile_each(*arguments))


def arithmetic(row: Speed, batch: int, rate: float) -> dict[str, float]:
    """Return the TFLOP/s of a row, and its share of `rate`, the TFLOP/s of a large matrix product."""
    reached = 2 * row.gmacs_run * batch / row.seconds.median / 1e3
    return {"tflop_per_s": round(reached, 4), "of_matmul": round(reached / rate, 4), "matmul_tflop_per_s": rate}


@torch.inference_mode()
def check(model: nn.Module, methods: Mapping[str, ck.Method | None], images: Tensor) -> None:
    """Check methods on two images.

    Raises:
        AssertionError: an embedding is not finite, `Dense()` differs from the host by more than ALLOWED_EPS epsilons,
            or a method leaves a number of tokens other than its plan's.
    """
    images = images[:2]
    tower = ck.tower_of(model)
    host = tower.encode(images).double()
    for name, method in methods.items():
        if method is None:
            continue
        with ck.patched(model, method):
            embedding = tower.encode(images).double()
            tokens = ck.encode_image(model, images, tokens=True).tokens
        assert tokens is not None and embedding.isfinite().all(), f"{name}: expected finite embeddings, got inf or nan"
        actual, planned = tokens.shape[1], plan_for(tower, method).tokens[-1]
        assert actual == planned, f"{name}: expected {planned} tokens, got {actual}"
        if isinstance(method, ck.Dense):
            error = ((embedding - host).norm() / host.norm()).item()
            allowed = ALLOWED_EPS * torch.finfo(images.dtype).eps
            assert error <= allowed, f"{name}: relative error {error:.1e} against the host is above {allowed:.1e}"


@pytest.mark.parametrize(
    "variant", [HOST, "Dense()", "EViT(keep=0.7)", "EViT(keep=0.5)", "ToMe", "TCA(rate=0.1)", "PatchRanking"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "batch"),
    [pytest.param(name, batch, id=f"{name}-b{batch}") for name, batches in BATCHES.items() for batch in batches],
)
def test_tower(benchmark: Any, name: str, batch: int, dtype: str, variant: str) -> None:
    """Time one batch. Every round first times both dense variants."""
    model = build(name, DTYPES[dtype])
    tower = ck.tower_of(model)
    selected = {label: method for label, method in methods(name, model).items() if label.startswith(variant)}
    variant = next(iter(selected))
    batches = images(tower, batch, DTYPES[dtype])
    check(model, selected, batches[0])
    variants = vary(model, {HOST: None, "Dense()": ck.Dense(), **selected})
    seconds: dict[str, list[float]] = {HOST: [], "Dense()": []}

    def run() -> None:
        variants[variant].encode(next(turn))
        if CUDA:
            torch.cuda.synchronize()

    def dense_first() -> None:
        for label, times in seconds.items():
            start = time.perf_counter()
            variants[label].encode(next(turn))
            if CUDA:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)

    turn = cycle(batches)
    benchmark.group = f"{name} b{batch} {dtype}"
    with torch.inference_mode():
        benchmark.pedantic(run, setup=dense_first, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info |= {"model": name, "batch": batch, "dtype": dtype} | environment()
    if benchmark.stats is not None:
        paired = {label: times[-ROUNDS:] for label, times in seconds.items()}
        times = Times({**paired, variant: paired.get(variant, benchmark.stats.stats.data)})
        row = next(row for row in tabulate(times, variants, tower, batch) if row.name == variant)
        benchmark.extra_info |= row.record()


if __name__ == "__main__":
    main()
