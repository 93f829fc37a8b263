"""Everything that needs a GPU, in one command of under eight minutes that goes on where it ended.

    make gpu PYTHON=python3 OUT=results
    make gpu ARGS="--peer tome=../ToMe"      # facebookresearch/ToMe beside ours
    make gpu ARGS="--parts ops towers"
    make gpu ARGS="--again tests check"      # although they were done
    make gpu ARGS=--list

It installs nothing and needs no network: torch, triton, pytest, pytest-benchmark, click, rich and matplotlib must be
there, and open_clip, timm and transformers for the towers, which are left out without open_clip. Tests and checks run
beside each other, everything else by itself, part after part, what failed last. A call begins nothing that could do
nothing before `--limit`, and stops then; what takes long writes as it measures and goes on in the next call: call until
nothing is left. What comes before `compiled` takes some forty minutes of a fast GPU, the rest hours (estimates).
Results are CSV, JSON and logs in one folder per device, where `done.json` says how far every part is, and of which
commit. The last thing a call does is to render them (`bench/report.py`). CLIPKERNELS_COMMIT names the commit of a copy
without git.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from clipkernels.files import replacing
from rows import MORE, stamp

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
TESTS = ("attention", "predict", "prune", "condense", "merge", "epilogue", "cross_attention", "affinity")
TESTS += ("targeted_l1", "fused_tower", "gpu")
MODELS = ("ViT-B-16", "ViT-L-14", "ViT-B-16-quickgelu", "ViT-B-32", "ViT-L-14-336", "ViT-SO400M-14-SigLIP-384")
MODELS += ("transformers:CLIPModel",)
BATCHES = ("256", "1", "32", "8", "64")
# A compiler takes minutes for some: each by itself, beside the host.
COMPILED = ("Dense()", "EViT(keep=0.7)", "EViT(keep=0.5)", "ToMe", "TCA(rate=0.035)", "TCA(rate=0.1)", "PatchRanking")
AUTOTUNED = ("Dense()", "EViT(keep=0.7)")


class Part(NamedTuple):
    """Seconds that a part may take, where it begins anew in every call; or what it takes to begin and do the longest
    piece that it can go on after, in as many calls as it needs."""

    limit: float = math.inf
    piece: float | None = None


PARTS = {
    "tests": Part(280),
    "check": Part(280),
    "towers": Part(piece=90),
    "ops": Part(piece=60),
    "dense": Part(piece=150),
    "launches": Part(piece=50),
    "counters": Part(120),
    "distill": Part(90),
    "peer": Part(piece=60),
    "staircase": Part(200),
    "compiled": Part(piece=250),
    "tuned": Part(piece=150),
    "inductor": Part(430),
}
BESIDE = ("tests", "check")  # each other


class Done(NamedTuple):
    """How far a command is: whole, or failed when it last ran; how many seconds that took and what it said last, of
    which driver, commit and day."""

    whole: bool
    failed: bool
    seconds: float
    said: str
    driver: str | None
    commit: str | None
    date: str


def main() -> None:
    arguments = parse()
    runs = commands(arguments.out, arguments.peer)
    runs = {name: command for name, command in runs.items() if part_of(name) in arguments.parts}
    if arguments.list:
        for name, command in runs.items():
            print(f"{name}: {' '.join(command)}")
        return
    if not torch.cuda.is_available():
        sys.exit("error: expected a CUDA or ROCm device, got none; `--list` prints what would run")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is stopped, too
    arguments.out.mkdir(parents=True, exist_ok=True)
    started, done = time.monotonic(), read(arguments.out)
    for name in [name for name in runs if part_of(name) in arguments.again]:
        forget(runs[name])
        done.pop(name, None)
    failed: list[str] = []
    while True:
        left = arguments.limit - (time.monotonic() - started)
        stage = following([name for name in runs if name not in failed], done, left)
        if not stage:
            break
        failed += run({name: runs[name] for name in stage}, arguments.out, left, done)
    print(f"results in {arguments.out}")
    render = [sys.executable, str(ROOT / "bench" / "report.py"), str(arguments.out)]
    render += ["--readme", str(ROOT / "README.md")] if arguments.out.parent == RESULTS else []
    subprocess.run(render, cwd=ROOT, env=paths(), check=False)
    ahead = [name for name in runs if name not in done or not done[name].whole]
    if ahead:
        print(f"left: {', '.join(ahead)}; the same command goes on with them")
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed; see the logs there")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--again", nargs="+", choices=PARTS, default=[], metavar="PART", help="parts to measure anew")
    parser.add_argument("--limit", type=float, default=450, metavar="SECONDS", help="what a call may take")
    parser.add_argument("--peer", metavar="tome=PATH", help="a checkout of facebookresearch/ToMe to time beside ours")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default bench/results/<device>")
    parser.add_argument("--list", action="store_true", help="print the commands instead of running them")
    arguments = parser.parse_args()
    if arguments.out is None:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
        arguments.out = RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower())
    arguments.out = arguments.out.resolve()
    if arguments.peer:
        peer, _, path = arguments.peer.partition("=")
        arguments.peer = f"{peer}={Path(path).resolve()}"
    return arguments


def commands(out: Path, peer: str | None = None) -> dict[str, list[str]]:
    """What each part runs."""
    python = [sys.executable, "-u"]
    pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # Names, so that a run that is stopped says what it was at.
    tests = [*python, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--durations=20"]
    tests += [*(["-n", "8"] if find_spec("xdist") else []), *(f"tests/test_{name}.py" for name in TESTS)]
    made = {"tests": [*tests, "-k", "not compiled_tower"]}
    for dtype in ("bfloat16", "float32", "float16"):
        made[f"check-{dtype}"] = [*python, "-m", "clipkernels", "check", "--dtype", dtype, "--format", "csv"]
        made[f"check-{dtype}"] += ["--output", str(out / f"check-{dtype}.csv"), "--quiet"]
    quick = ["--benchmark-max-time=0.02", "--benchmark-min-rounds=7", "--benchmark-warmup=off"]
    quick += ["--benchmark-columns=median", "--benchmark-sort=name", "--rows", str(out / "ops.csv")]
    # A compiler takes seconds for each: at the largest and the smallest batch, later but for the published formulas.
    some = "bfloat16 and not (compiled and (b8 or b64))"
    made["ops"] = [*pytest, "bench/ops.py", "-k", f"{some} and (literal or not compiled)", *quick]
    if imports("open_clip"):
        made |= of_towers([*python, "bench/towers.py", "--dtype", "bfloat16", "--rounds", "9"], out, peer)
    made["compiled-ops"] = [*pytest, "bench/ops.py", "-k", f"{some} and compiled", *quick]
    made["inductor"] = [*tests, "-k", "compiled_tower"]
    made["tuned"] = [*python, "bench/tune.py", "--out", str(out / "tuned.csv")]
    made["distill"] = [*python, "bench/distill_cost.py", "--device", "cuda", "--dtype", "bfloat16", "--batch", "256"]
    made["distill"] += ["--rounds", "31", "--out", str(out / "distill-cost-bf16.csv")]
    made["staircase"] = [*python, "bench/staircase.py", "--out", str(out / "staircase.csv")]
    made["staircase"] += ["--plot", str(out / "staircase.png")]
    made["counters"] = [*python, "bench/counters.py", "--ops", str(out / "ops.csv"), "--out", str(out / "counters.csv")]
    return made


def of_towers(towers: list[str], out: Path, peer: str | None) -> dict[str, list[str]]:
    """What is run of whole towers: eager, plain and from graphs at once, under the compiler method by method."""
    every, first = ["--models", *MODELS, "--batch", *BATCHES], ["--models", *MODELS[:2], "--batch", *BATCHES[:2]]
    made = {"towers": [*towers, *every, "--plain", "--graphs", "8", "--out", str(out / "towers-bf16.csv")]}
    made["launches"] = [*towers, "--models", *MODELS, "--batch", "1", "--launches", "--out", str(out / "launches.csv")]
    if peer:
        made["peer"] = [*towers, "--models", "ViT-B-16", "--batch", *BATCHES, "--peer", peer]
        made["peer"] += ["--out", str(out / "towers-bf16-peer.csv")]
    for mode, methods in (("default", COMPILED), ("max-autotune", AUTOTUNED)):
        for method in methods:
            name = f"{mode}-{re.sub('[^a-z0-9]+', '-', method.lower()).strip('-')}"
            options = ["--graphs", "1", "--only", method, "--compile", mode]
            options += ["--out", str(out / f"towers-bf16-{name}.csv")]
            if method == COMPILED[0]:  # whatever η is against: the usual towers at once, the others after the rest
                made[f"dense-{mode}"] = [*towers, *first, *options]
            else:  # the host is compiled above
                options += ["--compiled", method]
            made[f"compiled-{name}"] = [*towers, *every, *options]
    return made


def imports(package: str) -> bool:
    """Whether a package is here with all that it needs; says what is missing."""
    try:
        import_module(package)
    except ImportError as error:
        print(f"{package} is left out: {error}", flush=True)
        return False
    return True


def part_of(name: str) -> str:
    """The part that a command belongs to."""
    return name.split("-")[0]


def read(out: Path) -> dict[str, Done]:
    """How far earlier calls came."""
    file = out / "done.json"
    if not file.exists():
        return {}
    return {name: Done(**said) for name, said in json.loads(file.read_text(encoding="utf-8")).items()}


def forget(command: list[str]) -> None:
    """Removes what a command wrote, or it would go on after it."""
    for option in ("--out", "--output", "--rows"):
        if option in command:
            table = Path(command[command.index(option) + 1])
            for suffix in (".csv", ".json", ".begun"):
                table.with_suffix(suffix).unlink(missing_ok=True)


def following(names: list[str], done: dict[str, Done], left: float) -> list[str]:
    """What comes next, side by side where that disturbs nobody: the first part that is not whole and can do something
    in the seconds that are left, what failed last."""

    def failed(name: str) -> bool:
        return name in done and done[name].failed

    ahead = [name for name in names if name not in done or not done[name].whole]
    if "ops" in ahead and not failed("ops"):  # of which counters look at the slowest
        ahead = [name for name in ahead if name != "counters"]
    ahead = [name for name in ahead if left >= (PARTS[part_of(name)].piece or PARTS[part_of(name)].limit)]
    ahead.sort(key=lambda name: (failed(name), list(PARTS).index(part_of(name))))
    if ahead and part_of(ahead[0]) in BESIDE:
        return [name for name in ahead if part_of(name) in BESIDE and failed(name) == failed(ahead[0])]
    return ahead[:1]


def paths() -> dict[str, str]:
    """The environment in which a checkout's package and its benches are found."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def run(stage: dict[str, list[str]], out: Path, left: float, done: dict[str, Done]) -> list[str]:
    """Runs commands beside each other, each until its limit, and notes how far they came; those that failed."""
    started, begun, failed = time.monotonic(), {}, []
    parts = {name: PARTS[part_of(name)] for name in stage}
    try:
        for name, command in stage.items():
            part = parts[name]
            last = [] if part.piece is None else ["--deadline", f"{min(part.limit, left) - part.piece:.0f}"]
            with (out / f"{name}.log").open("a", encoding="utf-8") as log:
                begun[name] = subprocess.Popen(
                    [*command, *last], cwd=ROOT, env=paths(), stdout=log, stderr=log, start_new_session=True
                )
        for name, process in begun.items():
            try:
                status = process.wait(max(min(parts[name].limit, left) - (time.monotonic() - started), 0.1))
                said = {0: "ok", MORE: "more is left"}.get(status, f"exit status {status}")
            except subprocess.TimeoutExpired:
                stop(process)  # with its workers, which would disturb the timings
                status, said = MORE if parts[name].piece else 1, "stopped at its time limit"
            lines = (out / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
            told, took = lines[-1] if lines else "no output", time.monotonic() - started
            print(f"{name}: {said} after {took:.0f} s: {told}", flush=True)
            done[name] = Done(status == 0, status not in (0, MORE), round(took), told, **stamp())
            with replacing(out / "done.json") as temporary:
                whole = {name: each._asdict() for name, each in done.items()}
                Path(temporary).write_text(json.dumps(whole, indent=1), encoding="utf-8")
            failed += [name] if done[name].failed else []
    finally:
        for process in begun.values():
            stop(process)
    return failed


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a command that still runs, and what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    main()
