"""The steps of `make gpu`: the order in which they run, the seconds and packages each needs, and the schedule.

The order makes an interrupted run worth the most. Every step is visited once, for the seconds estimated here, before
any step is visited again. A step that failed comes last. The estimates are for one H200 and are not measured yet.
This module imports only the standard library, so that missing packages are reported before anything is loaded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TESTS = tuple(
    f"ops/test_{name}"
    for name in ("attention", "predict", "prune", "condense", "merge", "epilogue", "cross_attention", "affinity")
)
TESTS += ("ops/test_targeted_l1", "core/test_fused_tower", "core/test_gpu")
MODELS = ("ViT-B-16", "ViT-L-14", "ViT-B-16-quickgelu", "ViT-B-32", "ViT-L-14-336", "ViT-SO400M-14-SigLIP-384")
BATCHES = ("256", "1", "32", "8", "64")
METHODS = ("Dense()", "EViT(keep=0.7)", "ToMe", "TCA(rate=0.1)")
# Methods under the compiler, each in a separate run because compilation takes minutes.
COMPILED = ("EViT(keep=0.7)", "ToMe", "TCA(rate=0.1)", "EViT(keep=0.5)", "TCA(rate=0.035)", "PatchRanking")

# The distribution that provides each package. Nothing runs without the packages in BASE.
BASE = {"torch": "torch", "triton": "triton", "numpy": "numpy", "safetensors": "safetensors", "PIL": "pillow"}
BASE |= {"click": "click", "msgspec": "msgspec", "rich": "rich"}
OPEN_CLIP = {"open_clip": "open_clip_torch", "ftfy": "ftfy", "wcwidth": "wcwidth", "timm": "timm"}
DISTRIBUTIONS = BASE | OPEN_CLIP
DISTRIBUTIONS |= {"transformers": "transformers", "pytest": "pytest", "pytest_benchmark": "pytest-benchmark"}
DISTRIBUTIONS |= {"matplotlib": "matplotlib"}
RECIPE = """\
Bring them as wheels. On a machine with a network, for the Python version of the GPU machine:
  python3 -m pip download --no-deps --only-binary=:all: --python-version {python} --dest wheels {distributions}
On the GPU machine:
  python3 -m pip install --no-index --no-deps --target site wheels/*.whl
  PYTHONPATH=$PWD/site make gpu"""


class Step(NamedTuple):
    """One command of the campaign.

    name: the name of its log and of its entry in done.json.
    command: arguments of the Python interpreter.
    seconds: approximate upper limit of the first visit.
    total: seconds until the step is complete; 0 if one visit is enough.
    piece: seconds to start and finish the longest part that cannot be resumed; None if the step cannot be resumed.
    needs: packages that the step cannot run without.
    always: true if every run repeats the step, because its result stays on the machine.
    """

    name: str
    command: Sequence[str]
    seconds: float
    total: float = 0.0
    piece: float | None = None
    needs: tuple[str, ...] = ()
    always: bool = False

    @property
    def min_seconds(self) -> float:
        """Seconds that a visit needs at least to make progress."""
        return self.seconds if self.piece is None else self.piece


class Visit(NamedTuple):
    """A step and the seconds that it may take."""

    step: Step
    seconds: float


class Progress(NamedTuple):
    """Names of the complete steps, names of the steps that failed in an earlier run, and visits by name in this run."""

    complete: Collection[str]
    failed: Collection[str]
    visits: Mapping[str, int]


def steps(folder: Path, peer: str | None = None) -> list[Step]:
    """Return every step, in order.

    Args:
        folder: the folder that receives the results.
        peer: tome=PATH, a checkout of facebookresearch/ToMe to time with ours; None for no such step.
    """
    open_clip, pytest, benchmark = tuple(OPEN_CLIP), ("pytest",), ("pytest", "pytest_benchmark")

    def out(name: str) -> list[str]:
        return ["--out", str(folder / f"{name}.csv")]

    def check(name: str, precision: str, *more: str) -> list[str]:
        command = ["-m", "clipkernels", "check", "--precision", precision, "--format", "csv", *more]
        return [*command, "--output", str(folder / f"{name}.csv")]

    ops = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/ops.py", "--rows", str(folder / "ops.csv")]
    ops += ["--benchmark-max-time=0.02", "--benchmark-min-rounds=5", "--benchmark-warmup=off"]
    ops += ["--benchmark-columns=median", "--benchmark-sort=name", "-k"]
    towers = ["-m", "bench.towers", "--dtype", "bfloat16", "--rounds", "9"]
    first, usual, every = ["--models", MODELS[0]], ["--models", *MODELS[:2]], ["--models", *MODELS]
    both, batches = ["--batch", "256", "1"], ["--batch", *BATCHES]
    transformers = ["--models", "transformers:CLIPModel", *batches]
    distance = ["-m", "bench.cost.distill", "--device", "cuda", "--dtype", "bfloat16"]

    def compiled(mode: str, method: str, run: str, *chosen: str) -> list[str]:
        graphs = ["--graphs", "1", "--only", method, "--compile", mode]
        return [*towers, *chosen, *graphs, *([] if method == "Dense()" else ["--compiled", method]), *out(run)]

    result = [
        Step("kernels", ["-m", "bench.gpu.warm", *usual], 45, always=True),
        Step("ceilings", ["-m", "bench.gpu.ceilings", "--out", str(folder / "ceilings.json")], 10),
        Step("first-check", check("check-first", "bf16", "--shapes", "B-16"), 40),
        Step("ops", [*ops, "bfloat16 and not compiled"], 110, 400, 10, benchmark),
        Step(
            "towers",
            [*towers, *usual, "--batch", "256", "1", "32", "--only", *METHODS, "--graphs", "256", *out("towers-bf16")],
            150,
            piece=30,
            needs=open_clip,
        ),
        Step(
            "dense-default",
            compiled("default", "Dense()", "towers-bf16-default-dense", *first, *both),
            *(60, 60, 30, open_clip),
        ),
        Step(
            "dense-max-autotune",
            compiled("max-autotune", "Dense()", "towers-bf16-max-autotune-dense", *first, *both),
            *(90, 150, 75, open_clip),
        ),
        Step("tests", tests("not compiled_tower"), 250, needs=pytest),
        Step("compiled-ops", [*ops, "bfloat16 and compiled and not (b8 or b64)"], 120, 400, 15, benchmark),
        Step("check-bfloat16", check("check-bfloat16", "bf16"), 50),
        Step(
            "tuned", ["-m", "bench.gpu.tune", "--towers", "B-16", "L-14", "--budget", "16", *out("tuned")], 550, 550, 30
        ),
        Step("counters", ["-m", "bench.gpu.counters", "--ops", str(folder / "ops.csv"), *out("counters")], 60),
        Step(
            "plain",
            [*towers, *every, *batches, "--plain", "--graphs", "8", *out("towers-bf16-plain")],
            *(300, 1800, 60, open_clip),
        ),
        Step("check-float32", check("check-float32", "fp32"), 50),
        Step("check-float16", check("check-float16", "fp16"), 50),
        Step("launches", [*towers, *every, "--batch", "1", "--launches", *out("launches")], 150, 240, 40, open_clip),
        Step(
            "distill",
            [*distance, "--batch", "256", "--rounds", "31", *out("distill-cost-bf16")],
            60,
        ),
        Step(
            "transformers",
            [*towers, *transformers, "--plain", "--graphs", "8", *out("towers-bf16-transformers")],
            *(120, 200, 60, (*open_clip, "transformers")),
        ),
        Step(
            "staircase", ["-m", "bench.gpu.staircase", *out("staircase"), "--plot", str(folder / "staircase.png")], 200
        ),
        Step("inductor", tests("compiled_tower"), 400, needs=pytest),
    ]
    if peer:
        run = [*towers, *first, *batches, "--peer", peer, *out("towers-bf16-peer")]
        result.append(Step("peer", run, 120, 200, 60, open_clip))
    for mode, methods in (("default", COMPILED), ("max-autotune", COMPILED[:1])):
        for method in methods:
            name = f"{mode}-{re.sub('[^a-z0-9]+', '-', method.lower()).strip('-')}"
            command = compiled(mode, method, f"towers-bf16-{name}", *every, *both)
            result.append(Step(f"compiled-{name}", command, 300, 900, 120, open_clip))
        command = compiled(mode, "Dense()", f"towers-bf16-{mode}-dense-all", *every, *batches)
        result.append(Step(f"compiled-{mode}-dense", command, 300, 2400, 120, open_clip))
    return result


def tests(expression: str) -> list[str]:
    """Return the command for the tests of the operations that match pytest's `-k` expression."""
    # Names are printed, so that the log of a stopped run shows how far it got.
    command = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "--durations=20", "-k", expression]
    return [*command, *(["-n", "8"] if find_spec("xdist") else []), *(f"tests/{name}.py" for name in TESTS)]


def missing_packages() -> list[str]:
    """Return the packages of the campaign that cannot be found, without importing any."""
    return [package for package in DISTRIBUTIONS if find_spec(package) is None]


def losses(every: Sequence[Step], missing: Collection[str]) -> Iterator[str]:
    """Yield one line for each missing package with the steps that need it, then instructions to bring wheels."""
    for package in missing:
        affected = [step.name for step in every if package in step.needs]
        if package in BASE:
            yield f"{package} is missing: no step can run"
        elif affected:
            yield f"{package} is missing: these steps cannot run: {', '.join(affected)}"
        else:
            yield f"{package} is missing: the report has no pictures"
    if missing:
        python = ".".join(map(str, sys.version_info[:2]))
        yield RECIPE.format(python=python, distributions=" ".join(DISTRIBUTIONS[package] for package in missing))


def next_visit(every: Sequence[Step], progress: Progress, remaining: float) -> Visit | None:
    """Return the next step that makes progress in `remaining` seconds and its time limit, or None without such a step.

    The first visit of a run is limited to the step's estimate. Later visits may use all remaining seconds.
    """

    def rank(position: int) -> tuple[bool, int, int]:
        return every[position].name in progress.failed, progress.visits.get(every[position].name, 0), position

    for position in sorted(range(len(every)), key=rank):
        step = every[position]
        visits = progress.visits.get(step.name, 0)
        if step.name in progress.complete or remaining < step.min_seconds or (visits and step.piece is None):
            continue
        return Visit(step, min(remaining, max(step.seconds, step.min_seconds)) if not visits else remaining)
    return None


def schedule(every: Sequence[Step], limits: Sequence[float], overhead: float) -> Iterator[str]:
    """Yield the lines of a simulated schedule, one run for each limit, assuming that every estimate is exact.

    Args:
        every: the steps.
        limits: seconds of each run.
        overhead: seconds for the report and the archive after each step.
    """
    required = {step.name: max(step.total, step.seconds) for step in every}
    complete: set[str] = set()
    for run, limit in enumerate(limits, 1):
        yield f"run {run}, {limit:.0f} s"
        visits: dict[str, int] = {}
        spent = 0.0
        if run > 1:
            complete -= {step.name for step in every if step.always}
        while visit := next_visit(every, Progress(complete, (), visits), limit - spent - overhead):
            step = visit.step
            seconds = min(step.seconds if step.always else required[step.name], visit.seconds)
            required[step.name] -= seconds
            if step.always or required[step.name] < 1:
                complete.add(step.name)
            visits[step.name] = visits.get(step.name, 0) + 1
            end = "complete" if step.name in complete else f"{required[step.name]:.0f} s left"
            yield f"  {spent:4.0f} s  {step.name}: {seconds:.0f} s, {end}"
            spent += seconds + overhead
        skipped = [step.name for step in every if step.name not in complete and step.name not in visits]
        yield f"  {spent:4.0f} s  end; not started: {', '.join(skipped) or 'none'}"
