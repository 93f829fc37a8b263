"""The steps of `make gpu`: the order in which they run, the seconds and packages each needs, and the schedule.

The order is the one in which an interrupted run is worth most. Every step is visited once, for the seconds estimated
here, before any is visited again; a step that failed comes last. Estimates are for one H200 and are not measured yet.
Only the standard library is imported, so that missing packages are named before anything is loaded.
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
# Methods under the compiler, each in a run of its own because compilation takes minutes.
COMPILED = ("EViT(keep=0.7)", "ToMe", "TCA(rate=0.1)", "EViT(keep=0.5)", "TCA(rate=0.035)", "PatchRanking")

# The distribution that provides each package; without those of BASE nothing runs.
BASE = {"torch": "torch", "triton": "triton", "numpy": "numpy", "safetensors": "safetensors", "PIL": "pillow"}
BASE |= {"click": "click", "rich": "rich"}
OPEN_CLIP = {"open_clip": "open_clip_torch", "ftfy": "ftfy", "wcwidth": "wcwidth", "timm": "timm"}
DISTRIBUTIONS = BASE | OPEN_CLIP
DISTRIBUTIONS |= {"transformers": "transformers", "pytest": "pytest", "pytest_benchmark": "pytest-benchmark"}
DISTRIBUTIONS |= {"matplotlib": "matplotlib"}
RECIPE = """\
Bring them as wheels. Where there is a network, for the Python of the GPU machine:
  python3 -m pip download --no-deps --only-binary=:all: --python-version {python} --dest wheels {distributions}
On the GPU machine:
  python3 -m pip install --no-index --no-deps --target site wheels/*.whl
  PYTHONPATH=$PWD/site make gpu"""


class Step(NamedTuple):
    """One command of the campaign.

    name: of its log and of its entry in done.json.
    command: arguments of the interpreter.
    seconds: the first visit takes at most about this long.
    total: seconds until the step is whole; `seconds` where a visit is enough.
    piece: seconds to start and finish the longest part that cannot be resumed; None where the step cannot be resumed.
    needs: packages without which the step is lost.
    always: true where every run repeats the step, because its result stays on the machine.
    """

    name: str
    command: Sequence[str]
    seconds: float
    total: float = 0.0
    piece: float | None = None
    needs: tuple[str, ...] = ()
    always: bool = False

    @property
    def least(self) -> float:
        """Seconds below which a visit achieves nothing."""
        return self.seconds if self.piece is None else self.piece


class Visit(NamedTuple):
    """A step and the seconds it may take."""

    step: Step
    seconds: float


class Progress(NamedTuple):
    """The steps that are whole, those that failed in an earlier run, and the number of visits in this run."""

    whole: Collection[str]
    failed: Collection[str]
    visits: Mapping[str, int]


def steps(folder: Path, peer: str | None = None) -> list[Step]:
    """Every step, in order.

    Args:
        folder: the results go there.
        peer: tome=PATH, a checkout of facebookresearch/ToMe that is timed beside ours.
    """
    open_clip, pytest, benchmark = tuple(OPEN_CLIP), ("pytest",), ("pytest", "pytest_benchmark")

    def out(name: str) -> list[str]:
        return ["--out", str(folder / f"{name}.csv")]

    def check(name: str, dtype: str, *more: str) -> list[str]:
        command = ["-m", "clipkernels", "check", "--dtype", dtype, "--format", "csv", "--quiet", *more]
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

    found = [
        Step("kernels", ["-m", "bench.gpu.warm", *usual], 45, always=True),
        Step("ceilings", ["-m", "bench.gpu.ceilings", "--out", str(folder / "ceilings.json")], 10),
        Step("first-check", check("check-first", "bfloat16", "--shapes", "B-16"), 40),
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
        Step("check-bfloat16", check("check-bfloat16", "bfloat16"), 50),
        Step(
            "tuned", ["-m", "bench.gpu.tune", "--towers", "B-16", "L-14", "--budget", "16", *out("tuned")], 550, 550, 30
        ),
        Step("counters", ["-m", "bench.gpu.counters", "--ops", str(folder / "ops.csv"), *out("counters")], 60),
        Step(
            "plain",
            [*towers, *every, *batches, "--plain", "--graphs", "8", *out("towers-bf16-plain")],
            *(300, 1800, 60, open_clip),
        ),
        Step("check-float32", check("check-float32", "float32"), 50),
        Step("check-float16", check("check-float16", "float16"), 50),
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
        found.append(Step("peer", run, 120, 200, 60, open_clip))
    for mode, methods in (("default", COMPILED), ("max-autotune", COMPILED[:1])):
        for method in methods:
            name = f"{mode}-{re.sub('[^a-z0-9]+', '-', method.lower()).strip('-')}"
            command = compiled(mode, method, f"towers-bf16-{name}", *every, *both)
            found.append(Step(f"compiled-{name}", command, 300, 900, 120, open_clip))
        command = compiled(mode, "Dense()", f"towers-bf16-{mode}-dense-all", *every, *batches)
        found.append(Step(f"compiled-{mode}-dense", command, 300, 2400, 120, open_clip))
    return found


def tests(chosen: str) -> list[str]:
    """The command for the tests of the operations; names are printed so that a stopped run says how far it got."""
    command = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "--durations=20", "-k", chosen]
    return [*command, *(["-n", "8"] if find_spec("xdist") else []), *(f"tests/{name}.py" for name in TESTS)]


def missing_packages() -> list[str]:
    """The packages of the campaign that cannot be found; none is imported."""
    return [package for package in DISTRIBUTIONS if find_spec(package) is None]


def losses(every: Sequence[Step], missing: Collection[str]) -> Iterator[str]:
    """One line for each missing package with the steps that are lost, then how to bring wheels."""
    for package in missing:
        lost = [step.name for step in every if package in step.needs]
        if package in BASE:
            yield f"{package} is missing: every step is lost"
        elif lost:
            yield f"{package} is missing: lost are {', '.join(lost)}"
        else:
            yield f"{package} is missing: the pictures of the report are lost"
    if missing:
        python = ".".join(map(str, sys.version_info[:2]))
        yield RECIPE.format(python=python, distributions=" ".join(DISTRIBUTIONS[package] for package in missing))


def next_visit(every: Sequence[Step], progress: Progress, left: float) -> Visit | None:
    """The next step that achieves something in `left` seconds, and how long it may take; None where there is none.

    The first visit of a run is limited to the step's estimate, later ones are not.
    """

    def rank(at: int) -> tuple[bool, int, int]:
        return every[at].name in progress.failed, progress.visits.get(every[at].name, 0), at

    for at in sorted(range(len(every)), key=rank):
        step = every[at]
        visits = progress.visits.get(step.name, 0)
        if step.name in progress.whole or left < step.least or (visits and step.piece is None):
            continue
        return Visit(step, min(left, max(step.seconds, step.least)) if not visits else left)
    return None


def schedule(every: Sequence[Step], limits: Sequence[float], overhead: float) -> Iterator[str]:
    """The lines of a simulated schedule, one run for each limit, were every estimate exact.

    Args:
        every: the steps.
        limits: seconds of each run.
        overhead: seconds for the report and the archive after each step.
    """
    ahead = {step.name: max(step.total, step.seconds) for step in every}
    whole: set[str] = set()
    for run, limit in enumerate(limits, 1):
        yield f"run {run}, {limit:.0f} s"
        visits: dict[str, int] = {}
        spent = 0.0
        if run > 1:
            whole -= {step.name for step in every if step.always}
        while visit := next_visit(every, Progress(whole, (), visits), limit - spent - overhead):
            step = visit.step
            took = min(step.seconds if step.always else ahead[step.name], visit.seconds)
            ahead[step.name] -= took
            if step.always or ahead[step.name] < 1:
                whole.add(step.name)
            visits[step.name] = visits.get(step.name, 0) + 1
            end = "whole" if step.name in whole else f"{ahead[step.name]:.0f} s left"
            yield f"  {spent:4.0f} s  {step.name}: {took:.0f} s, {end}"
            spent += took + overhead
        skipped = [step.name for step in every if step.name not in whole and step.name not in visits]
        yield f"  {spent:4.0f} s  end; not begun: {', '.join(skipped) or 'none'}"
