"""Search the fastest block sizes, warps and stages: every kernel's own choice against its neighbours, step by step.

    python -m bench.gpu.tune --out tuned.csv
    python -m bench.gpu.tune --ops prune_tokens merge_tokens --towers B-16 --out tuned.csv
    python -m bench.gpu.tune --towers B-16 L-14 --budget 16 --out tuned.csv    # ten minutes on a GPU

The search starts at a kernel's own configuration and tries every number in it at half and at twice its value (stages:
one less and one more). If the fastest candidate gains 2 % over all batches together, the search continues from it. One
configuration serves every batch, because an image has the same bits in every batch. A candidate that does not compile
or computes a wrong result is rejected. Rows name the changed numbers; put them into the kernel's `config` by hand and
run `make compile`. The candidates of a step are compiled in parallel, in `--jobs` processes, and then timed one by one.
A search stops at the end of its budget of seconds and reports the best candidate until then. A run resumes from its
file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import Progress

from bench.ops import TOWERS, check, input_sets, runner
from bench.result_files import EXIT_DEADLINE, note_attempt, remaining, resume, stamp, write
from bench.runners import CUDA, DEVICE
from clipkernels.backend import interpreting
from clipkernels.kernels.launch import forget_launches
from clipkernels.measure.environment import environment
from clipkernels.measure.timing import measure
from clipkernels.testing.cases import CASES
from clipkernels.testing.fp64 import flat, is_checkable
from clipkernels.testing.inputs import SHAPES, InputFactory

BATCHES = (256, 1) if CUDA else (2,)
ORDER = sorted(TOWERS, key=lambda tower: tower not in ("B-16", "L-14"))  # the most common towers first
ROUNDS = 9 if CUDA else 1
GAIN = 1.02
# The functions that configure an operation's launches: module and name.
CHOSEN = {
    "attention_sized": (("attention", "config"),),
    "attention_cls": (("attention", "config"),),
    "attention_received": (("attention", "config"),),
    "rank_tokens": (("rank", "config"), ("rank", "sum_config")),
    "predict_scores": (("predict", "config"),),
    "prune_tokens": (("prune", "choose_config"), ("prune", "gather_config")),
    "prune_tokens_heads_fuse_norm": (("prune", "choose_config"), ("prune", "gather_config")),
    "condense_tokens": (("condense", "cluster_config"), ("prune", "gather_config")),
    "condense_tokens_rank_norm": (("condense", "cluster_config"), ("prune", "gather_config"), ("ranking", "config")),
    "match_tokens": (("merge", "match_config"), ("ranking", "blocks")),
    "merge_tokens": (("merge", "merge_config"),),
    "merge_tokens_norm": (("merge", "merge_config"),),
    "calip_logits": (("cross_attention", "config"), ("cross_attention", "terms_config")),
    "affinity": (("affinity", "config"),),
    "targeted_l1": (("targeted_l1", "config"),),
    "bias_act_quick_gelu": (("epilogue", "config"),),
    "add_norm": (("epilogue", "config"),),
}
# Block sizes that have to cover whole rows, scores or pairs: a smaller one leaves results unwritten.
COVERS = {
    ("attention", "config", "BLOCK_D"),
    ("rank", "config", "BLOCK_D"),
    ("rank", "sum_config", "BLOCK_P"),
    ("ranking", "blocks", "BLOCK_P"),
    ("ranking", "config", "BLOCK_P"),
    ("ranking", "config", "LOG_P"),
    ("prune", "choose_config", "BLOCK_P"),
    ("prune", "gather_config", "BLOCK_C"),
    ("condense", "cluster_config", "BLOCK_P"),
    ("condense", "cluster_config", "LOG_P"),
    ("condense", "cluster_config", "BLOCK_M"),
    ("merge", "match_config", "BLOCK_W"),
    ("merge", "merge_config", "BLOCK_S"),
    ("merge", "merge_config", "BLOCK_C"),
    ("cross_attention", "config", "BLOCK_E"),
    ("cross_attention", "config", "REST"),
    ("epilogue", "config", "BLOCK_C"),
}
Place = tuple[str, ...]
"""The position of a number: the module, the function, and its key or keys in the configuration."""
Precompile = Callable[[str, str, Sequence[Mapping[Place, int]]], object]
"""A function of an operation, a tower and the candidates that are timed next."""


def main() -> None:
    arguments = parse()
    if not CUDA and not interpreting():
        sys.exit("error: expected a GPU, got none (TRITON_INTERPRET=1 runs the search, with meaningless times)")
    started = time.monotonic()
    header = {"environment": environment(), "dtype": "bfloat16", "batches": list(BATCHES), "gain": GAIN}
    records = resume(arguments.out, header)
    done = {(row["op"], row["tower"]) for row in records}
    every = [(op, tower) for tower, op in product(arguments.towers, arguments.ops) if is_checkable(op, SHAPES[tower])]
    cases, failed = remaining(every, done, arguments.out)
    with Progress(console=Console(stderr=True), transient=True) as bar, compilers(arguments.jobs) as compile_ahead:
        task = bar.add_task("", total=len(cases))
        for index, (op, tower) in enumerate(cases):
            if index and time.monotonic() - started > arguments.deadline:
                print(f"{len(cases) - index} of {len(every)} left: run the same command again to continue", flush=True)
                sys.exit(EXIT_DEADLINE)
            bar.update(task, description=f"{op} {tower}")
            note_attempt(arguments.out, str((op, tower)))
            try:
                records.append(search_row(op, tower, arguments.budget, compile_ahead))
            except AssertionError as error:  # the other operations are still worth searching
                print(error, flush=True)
                failed.append(f"{op} {tower}")
                continue
            if arguments.out:
                write(records, header, arguments.out)
            bar.advance(task)
            row = records[-1]
            print(
                f"{op} {tower}: ×{row['gain']:.2f} {row['changed'] or 'unchanged'} ({row['tried']} tried)", flush=True
            )
    if failed:
        sys.exit(f"error: {', '.join(failed)} could not be searched")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ops", nargs="+", choices=CHOSEN, default=list(CHOSEN), metavar="OP", help="operations; default: all"
    )
    parser.add_argument(
        "--towers", nargs="+", choices=SHAPES, default=ORDER, metavar="SHAPE", help="towers; default: all"
    )
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="time of one search")
    parser.add_argument("--jobs", type=int, default=8, metavar="N", help="compiling processes; default %(default)s")
    parser.add_argument(
        "--deadline", type=float, default=math.inf, metavar="SECONDS", help="start no search after this time"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="rows; FILE.json adds the environment")
    return parser.parse_args()


@contextmanager
def compilers(jobs: int) -> Iterator[Precompile]:
    """Yield a function that compiles candidates in `jobs` processes. Triton caches the results on disk."""
    if not CUDA or jobs < 2:
        yield lambda op, tower, candidates: None
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:

        def compile_ahead(op: str, tower: str, candidates: Sequence[Mapping[Place, int]]) -> None:
            count = len(candidates)
            list(pool.map(call_once, [op] * count, [tower] * count, candidates))

        yield compile_ahead


def call_once(op: str, tower: str, changes: Mapping[Place, int]) -> None:
    """Compile a candidate by calling it once, at the smallest batch. Errors are ignored here; timing reports them."""
    source = InputFactory(SHAPES[tower], BATCHES[-1], torch.bfloat16, DEVICE)
    with configured(op, changes, {}), torch.inference_mode(), suppress(Exception):
        CASES[op].call(source, "triton", *CASES[op].inputs(source))


def search_row(op: str, tower: str, budget: float, compile_ahead: Precompile) -> dict[str, Any]:
    """Return a row: an operation's own and best configurations at one shape, and the times of both."""
    sources = [InputFactory(SHAPES[tower], batch, torch.bfloat16, DEVICE) for batch in BATCHES]
    best, defaults, num_tried, num_rejected = search(op, tower, sources, time.monotonic() + budget, compile_ahead)
    try:
        for source in sources:
            with configured(op, best, {}), torch.inference_mode():
                inputs = CASES[op].inputs(source)
                check(op, "triton", source, inputs, flat(CASES[op].call(source, "triton", *inputs)))
    except AssertionError:  # the best candidate is correct at the smallest batch only
        best = {}
    changed = {".".join(place): [defaults[place], value] for place, value in best.items() if defaults[place] != value}
    row = {"op": op, "tower": tower, "changed": json.dumps(changed) if changed else ""}
    row |= paired_times(op, sources, best)
    return {**row, "tried": num_tried, "rejected": num_rejected, **stamp()}


def search(
    op: str, tower: str, sources: list[InputFactory], end: float, compile_ahead: Precompile
) -> tuple[dict[Place, int], dict[Place, int], int, int]:
    """Return the numbers whose change gains speed, all numbers of the operation's own configuration, and the counts of
    tried and of rejected candidates. No candidate is tried after `end`, a time of `time.monotonic`."""
    best: dict[Place, int] = {}
    defaults: dict[Place, int] = {}
    with configured(op, best, defaults):
        seconds_of(op, sources)  # warm up
        fastest = seconds_of(op, sources)
    assert fastest is not None, f"{op} {tower}: expected a correct result of its own configuration, got a wrong one"
    num_tried, num_rejected = 0, 0
    while True:
        candidates = {}
        steps = list(neighbours({**defaults, **best}))
        compile_ahead(op, tower, [{**best, place: value} for place, value in steps])
        for place, value in steps:
            if time.monotonic() > end:
                break
            num_tried += 1
            with configured(op, {**best, place: value}, {}):
                times = seconds_of(op, sources)
            if times is None:
                num_rejected += 1
            else:
                candidates[place, value] = times
        if not candidates:
            break
        (place, value), times = min(candidates.items(), key=lambda item: math.prod(item[1]))
        if math.prod(fastest) < GAIN ** len(sources) * math.prod(times):
            break
        best[place], fastest = value, times
    return best, defaults, num_tried, num_rejected


def paired_times(op: str, sources: list[InputFactory], best: Mapping[Place, int]) -> dict[str, float]:
    """Return an operation's times at each batch in its own and in the best configuration, and the gain over all."""
    # Both are timed again, interleaved, because the minimum of many times is low by chance.
    row: dict[str, float] = {}
    gains = []
    for source in sources:
        pair = {}
        for name, changes in (("own", {}), ("best", best)):
            with configured(op, changes, {}), torch.inference_mode():
                pair[name] = runner(partial(CASES[op].call, source, "triton"), input_sets(op, source))
        with torch.inference_mode():
            times = measure({name: run for name, (run, _) in pair.items()}, ROUNDS, warmup=2)
        gains.append(times.ratio("best", "own").median)
        for name, (_, calls) in pair.items():
            row[f"microseconds_b{source.batch}_{name}"] = round(1e6 * times.of(name).median / calls, 3)
    return row | {"gain": round(math.prod(gains) ** (1 / len(gains)), 4)}


@contextmanager
def configured(op: str, changes: Mapping[Place, int], original_numbers: dict[Place, int]) -> Iterator[None]:
    """Replace numbers in the configurations of an operation's launches, and record the original ones."""
    with ExitStack() as stack:
        for module, name in CHOSEN[op]:
            where = import_module(f"clipkernels.kernels.{module}")
            original = getattr(where, name)

            def replaced(*arguments: Any, module: str = module, name: str = name, original: Any = original) -> Any:
                config = original(*arguments)
                for path, value in numbers(config):
                    original_numbers.setdefault((module, name, *path), value)
                for place, value in changes.items():
                    if place[:2] == (module, name):
                        *outer, last = place[2:]
                        inner = config
                        for key in outer:
                            inner = inner[key]
                        inner[last] = value
                return config

            stack.enter_context(mock.patch.object(where, name, replaced))
        stack.callback(forget_launches)
        forget_launches()
        yield


def numbers(config: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the keys and the value of every number of a configuration."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from (((key, *path), inner) for path, inner in numbers(value))
        elif not isinstance(value, bool) and value:
            yield (key,), value


def neighbours(config: Mapping[Place, int]) -> Iterator[tuple[Place, int]]:
    """Yield one step down and one step up of every number outside COVERS, warps and stages first."""
    for place, value in sorted(config.items(), key=lambda item: not item[0][-1].startswith("num_")):
        if place in COVERS:
            continue
        down, up = (value - 1, value + 1) if place[-1] == "num_stages" else (value // 2, value * 2)
        limit = {"num_stages": 5, "num_warps": 16}.get(place[-1], 4096)
        yield from ((place, step) for step in (down, up) if 1 <= step <= limit)


@torch.inference_mode()
def seconds_of(op: str, sources: list[InputFactory]) -> list[float] | None:
    """Return the seconds of a call at each batch, or None if a call fails or is wrong at the last, smallest batch."""
    seconds = []
    for source in sources:
        inputs, call = input_sets(op, source), partial(CASES[op].call, source, "triton")
        try:
            if source is sources[-1]:  # the check in fp64 takes long at larger batches
                check(op, "triton", source, inputs[0], flat(call(*inputs[0])))
            run, calls = runner(call, inputs)
        except Exception:  # too much shared memory, a shape that the compiler refuses, a wrong result
            if CUDA:
                torch.cuda.synchronize()  # raises and ends the search if the device is lost
            return None
        seconds.append(measure({"": run}, ROUNDS, warmup=2).of("").median / calls)
    return seconds


if __name__ == "__main__":
    main()
