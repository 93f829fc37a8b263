"""Which block sizes, warps and stages are fastest: every kernel's own choice against its neighbours, step by step.

    python -m bench.gpu.tune --out tuned.csv
    python -m bench.gpu.tune --ops prune_tokens merge_tokens --towers B-16 --out tuned.csv
    python -m bench.gpu.tune --towers B-16 L-14 --budget 16 --out tuned.csv    # ten minutes on a GPU

From a kernel's own configuration it tries every number in it at half and at twice (stages one less, one more), takes
the fastest if that gains 2 % over all batches together, and goes on from there. One configuration serves every batch,
for an image has the same bits in each. A candidate whose result is not right, or that does not compile, is none. Rows
name what changed: it goes into the kernel's `config` by hand, with `make compile` after it. Candidates of a step are
compiled beside each other, in `--jobs` processes, before they are timed one by one. A search stops where its budget of
seconds ends, with the best until then. A run goes on where its file ends.
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

from bench.ops import TOWERS, check, runner, several
from bench.result_files import EXIT_DEADLINE, note_attempt, remaining, resume, stamp, write
from bench.runners import CUDA, DEVICE
from clipkernels.backend import interpreting
from clipkernels.measure.environment import environment
from clipkernels.measure.timing import measure
from clipkernels.testing.cases import CASES
from clipkernels.testing.fp64 import flat, is_checkable
from clipkernels.testing.inputs import SHAPES, InputFactory

BATCHES = (256, 1) if CUDA else (2,)
ORDER = sorted(TOWERS, key=lambda tower: tower not in ("B-16", "L-14"))  # the usual ones first
ROUNDS = 9 if CUDA else 1
GAIN = 1.02
# The functions that configure an operation's launches: module and name.
CHOSEN = {
    "attention_sized": (("attention", "config"),),
    "attention_cls": (("attention", "config"),),
    "attention_received": (("attention", "config"),),
    "rank_tokens": (("rank", "config"), ("ranking", "blocks")),
    "predict_scores": (("predict", "config"),),
    "prune_tokens": (("prune", "config"), ("ranking", "blocks")),
    "prune_tokens_heads_fuse_norm": (("prune", "config"), ("ranking", "blocks")),
    "condense_tokens": (("condense", "config"),),
    "condense_tokens_rank_norm": (("condense", "config"),),
    "match_tokens": (("merge", "match_config"), ("ranking", "blocks")),
    "merge_tokens": (("merge", "merge_config"),),
    "merge_tokens_norm": (("merge", "merge_config"),),
    "calip_logits": (("cross_attention", "config"), ("cross_attention", "terms_config")),
    "affinity": (("affinity", "config"),),
    "targeted_l1": (("targeted_l1", "config"),),
    "bias_act_quick_gelu": (("epilogue", "config"),),
    "add_norm": (("epilogue", "config"),),
}
# What has to be as large as the rows, scores or pairs that it covers: a smaller one leaves results unwritten.
COVERS = {
    ("attention", "config", "BLOCK_D"),
    ("rank", "config", "BLOCK_D"),
    ("ranking", "blocks", "BLOCK_P"),
    ("prune", "config", "BLOCK_P"),
    ("prune", "config", "BLOCK_C"),
    ("condense", "config", "cluster", "BLOCK_P"),
    ("condense", "config", "cluster", "BLOCK_M"),
    ("condense", "config", "gather", "BLOCK_P"),
    ("condense", "config", "gather", "BLOCK_C"),
    ("merge", "match_config", "unit", "BLOCK_D"),
    ("merge", "merge_config", "BLOCK_S"),
    ("merge", "merge_config", "BLOCK_C"),
    ("cross_attention", "config", "BLOCK_E"),
    ("cross_attention", "config", "REST"),
    ("epilogue", "config", "BLOCK_C"),
}
Place = tuple[str, ...]
"""Where a number stands: the module, the function, and its name or names in what that returns."""
Ahead = Callable[[str, str, Sequence[Mapping[Place, int]]], object]
"""Called with an operation, a tower and the candidates that are timed next."""


def main() -> None:
    arguments = parse()
    if not CUDA and not interpreting():
        sys.exit("error: expected a GPU, got none (TRITON_INTERPRET=1 tries the search out, not the speed)")
    started = time.monotonic()
    header = {"environment": environment(), "dtype": "bfloat16", "batches": list(BATCHES), "gain": GAIN}
    records = resume(arguments.out, header)
    done = {(row["op"], row["tower"]) for row in records}
    every = [(op, tower) for tower, op in product(arguments.towers, arguments.ops) if is_checkable(op, SHAPES[tower])]
    left, failed = remaining(every, done, arguments.out)
    with Progress(console=Console(stderr=True), transient=True) as bar, compilers(arguments.jobs) as compile_ahead:
        task = bar.add_task("", total=len(left))
        for at, (op, tower) in enumerate(left):
            if at and time.monotonic() - started > arguments.deadline:
                print(f"{len(left) - at} of {len(every)} left: the same command goes on with them", flush=True)
                sys.exit(EXIT_DEADLINE)
            bar.update(task, description=f"{op} {tower}")
            note_attempt(arguments.out, str((op, tower)))
            try:
                records.append(searched(op, tower, arguments.budget, compile_ahead))
            except AssertionError as error:  # the others are still worth searching
                print(error, flush=True)
                failed.append(f"{op} {tower}")
                continue
            if arguments.out:
                write(records, header, arguments.out)
            bar.advance(task)
            row = records[-1]
            print(f"{op} {tower}: ×{row['gain']:.2f} {row['changed'] or 'as it is'} ({row['tried']} tried)", flush=True)
    if failed:
        sys.exit(f"error: {', '.join(failed)} could not be searched")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=CHOSEN, default=list(CHOSEN), metavar="OP")
    parser.add_argument("--towers", nargs="+", choices=SHAPES, default=ORDER, metavar="SHAPE")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="of one operation and shape")
    parser.add_argument("--jobs", type=int, default=8, metavar="N", help="processes that compile; default %(default)s")
    parser.add_argument("--deadline", type=float, default=math.inf, metavar="SECONDS", help="begin nothing later")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="rows; a .json beside it adds the environment")
    return parser.parse_args()


@contextmanager
def compilers(jobs: int) -> Iterator[Ahead]:
    """Yields a function that compiles candidates in `jobs` processes; their results are found on disk afterwards."""
    if not CUDA or jobs < 2:
        yield lambda op, tower, candidates: None
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:

        def compile_ahead(op: str, tower: str, candidates: Sequence[Mapping[Place, int]]) -> None:
            each = range(len(candidates))
            list(pool.map(call_once, [op for _ in each], [tower for _ in each], candidates))

        yield compile_ahead


def call_once(op: str, tower: str, changes: Mapping[Place, int]) -> None:
    """Compiles a candidate by calling it once, at the smallest batch; a candidate that cannot run is timed as none."""
    source = InputFactory(SHAPES[tower], BATCHES[-1], torch.bfloat16, DEVICE)
    with configured(op, changes, {}), torch.inference_mode(), suppress(Exception):
        CASES[op].call(source, "triton", *CASES[op].inputs(source))


def searched(op: str, tower: str, budget: float, compile_ahead: Ahead) -> dict[str, Any]:
    """A row: an operation's own configuration at one shape, the best that was found, and the time of each."""
    sources = [InputFactory(SHAPES[tower], batch, torch.bfloat16, DEVICE) for batch in BATCHES]
    best, own, tried, rejected = search(op, tower, sources, time.monotonic() + budget, compile_ahead)
    try:
        for source in sources:
            with configured(op, best, {}), torch.inference_mode():
                inputs = CASES[op].inputs(source)
                check(op, "triton", source, inputs, flat(CASES[op].call(source, "triton", *inputs)))
    except AssertionError:  # right at the smallest batch alone
        best = {}
    changed = {".".join(place): [own[place], value] for place, value in best.items() if own[place] != value}
    row = {"op": op, "tower": tower, "changed": json.dumps(changed) if changed else ""}
    row |= beside(op, sources, best)
    return {**row, "tried": tried, "rejected": rejected, **stamp()}


def search(
    op: str, tower: str, sources: list[InputFactory], end: float, compile_ahead: Ahead
) -> tuple[dict[Place, int], dict[Place, int], int, int]:
    """The numbers that gain if they are changed, all numbers of the operation's own configuration, and the counts of
    candidates that were tried and rejected; nothing is tried after `end`, by `time.monotonic`."""
    best: dict[Place, int] = {}
    own: dict[Place, int] = {}
    with configured(op, best, own):
        took(op, sources)  # warm
        fastest = took(op, sources)
    assert fastest is not None, f"{op} {tower}: its own configuration is not right"
    tried, rejected = 0, 0
    while True:
        found = {}
        steps = list(neighbours({**own, **best}))
        compile_ahead(op, tower, [{**best, place: value} for place, value in steps])
        for place, value in steps:
            if time.monotonic() > end:
                break
            tried += 1
            with configured(op, {**best, place: value}, {}):
                times = took(op, sources)
            if times is None:
                rejected += 1
            else:
                found[place, value] = times
        if not found:
            break
        (place, value), times = min(found.items(), key=lambda item: math.prod(item[1]))
        if math.prod(fastest) < GAIN ** len(sources) * math.prod(times):
            break
        best[place], fastest = value, times
    return best, own, tried, rejected


def beside(op: str, sources: list[InputFactory], best: Mapping[Place, int]) -> dict[str, float]:
    """What an operation takes at each batch in its own configuration and in the best found, timed side by side, for
    the best of many times is low by chance; and the gain over all."""
    row: dict[str, float] = {}
    gains = []
    for source in sources:
        pair = {}
        for name, changes in (("own", {}), ("best", best)):
            with configured(op, changes, {}), torch.inference_mode():
                pair[name] = runner(partial(CASES[op].call, source, "triton"), several(op, source))
        with torch.inference_mode():
            times = measure({name: run for name, (run, _) in pair.items()}, ROUNDS, warmup=2)
        gains.append(times.ratio("best", "own").median)
        for name, (_, calls) in pair.items():
            row[f"microseconds_b{source.batch}_{name}"] = round(1e6 * times.of(name).median / calls, 3)
    return row | {"gain": round(math.prod(gains) ** (1 / len(gains)), 4)}


@contextmanager
def configured(op: str, changes: Mapping[Place, int], own: dict[Place, int]) -> Iterator[None]:
    """Has the launches of an operation take some numbers in place of their own, which it notes."""
    with ExitStack() as stack:
        for module, name in CHOSEN[op]:
            where = import_module(f"clipkernels.kernels.{module}")
            original = getattr(where, name)

            def replaced(*given: Any, module: str = module, name: str = name, original: Any = original) -> Any:
                made = original(*given)
                for path, value in numbers(made):
                    own.setdefault((module, name, *path), value)
                for place, value in changes.items():
                    if place[:2] == (module, name):
                        *outer, last = place[2:]
                        inner = made
                        for key in outer:
                            inner = inner[key]
                        inner[last] = value
                return made

            stack.enter_context(mock.patch.object(where, name, replaced))
        yield


def numbers(made: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], int]]:
    """The numbers of a configuration, and where in it they stand."""
    for key, value in made.items():
        if isinstance(value, Mapping):
            yield from (((key, *path), inner) for path, inner in numbers(value))
        elif not isinstance(value, bool) and value:
            yield (key,), value


def neighbours(config: Mapping[Place, int]) -> Iterator[tuple[Place, int]]:
    """Every number that covers nothing one step down and one step up, warps and stages first."""
    for place, value in sorted(config.items(), key=lambda item: not item[0][-1].startswith("num_")):
        if place in COVERS:
            continue
        down, up = (value - 1, value + 1) if place[-1] == "num_stages" else (value // 2, value * 2)
        most = {"num_stages": 5, "num_warps": 16}.get(place[-1], 4096)
        yield from ((place, step) for step in (down, up) if 1 <= step <= most)


@torch.inference_mode()
def took(op: str, sources: list[InputFactory]) -> list[float] | None:
    """Seconds of a call at each batch, or None where the result of the last, the smallest, is not right or there is
    none."""
    found = []
    for source in sources:
        inputs, call = several(op, source), partial(CASES[op].call, source, "triton")
        try:
            if source is sources[-1]:  # fp64 takes long at the others
                check(op, "triton", source, inputs[0], flat(call(*inputs[0])))
            run, calls = runner(call, inputs)
        except Exception:  # too much shared memory, a shape that the compiler refuses, a wrong result
            if CUDA:
                torch.cuda.synchronize()  # ends the search where the device is lost
            return None
        found.append(measure({"": run}, ROUNDS, warmup=2).of("").median / calls)
    return found


if __name__ == "__main__":
    main()
