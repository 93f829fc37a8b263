"""Everything that needs a GPU, in one command of under eight minutes that goes on where it ended.

    make gpu PYTHON=python3 OUT=results
    make gpu ARGS="--peer tome=../ToMe"      # facebookresearch/ToMe beside ours
    make gpu ARGS="--parts ops towers"
    make gpu ARGS="--again tests check"      # although they were done
    make gpu ARGS=--list

It installs nothing and needs no network: torch, triton, pytest, pytest-benchmark, click, rich and matplotlib must be
there, and open_clip, timm and transformers for the towers, which are left out without open_clip. Tests and checks run
beside each other, everything else by itself. A call takes the parts that had the fewest turns first, begins none that
could do nothing before `--limit`, and stops then; what takes long writes as it measures and goes on in the next call:
call until nothing is left. Results are CSV, JSON and logs in one folder per device, where `done.json` says how far
every part is, and of which commit. The last thing a call does is to render them (`bench/report.py`).
CLIPKERNELS_COMMIT names the commit of a copy without git.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from clipkernels.files import replacing
from rows import MORE, stamp

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
TESTS = ("attention", "predict", "prune", "condense", "merge", "epilogue", "cross_attention", "affinity")
TESTS += ("targeted_l1", "fused_tower", "gpu")
MODELS = ("ViT-B-16", "ViT-B-32", "ViT-L-14", "ViT-L-14-336", "ViT-SO400M-14-SigLIP-384", "transformers:CLIPModel")
BATCHES = ("256", "1", "32", "8", "64")
COMPILED = ("dense (host)", "Dense()", "EViT(keep=0.7)", "EViT(keep=0.5)", "ToMe", "TCA", "PatchRanking")
AUTOTUNED = ("dense (host)", "Dense()", "EViT(keep=0.7)")


class Part(NamedTuple):
    """Seconds that a part may take of one call, and what it takes to begin and do the longest piece that it can go on
    after; None where it begins anew."""

    limit: float
    piece: float | None = None


PARTS = {
    "towers": Part(300, 80),
    "tests": Part(140),
    "check": Part(140),
    "ops": Part(150, 30),
    "compiled": Part(430, 300),
    "autotuned": Part(430, 330),
    "tuned": Part(300, 150),
    "launches": Part(90, 40),
    "peer": Part(120, 60),
    "distill": Part(45),
    "staircase": Part(200),
    "counters": Part(120),
}
BESIDE = ("tests", "check")  # each other


class Done(NamedTuple):
    """How far a command is: whole, in how many calls, in how many seconds of its last one; what it said last, and of
    which driver, commit and day that is."""

    whole: bool
    turns: int
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
    if not importlib.util.find_spec("open_clip"):
        print("open_clip is not installed: no towers", flush=True)
    started, done, failed = time.monotonic(), read(arguments.out), []
    for name in [name for name in runs if part_of(name) in arguments.again]:
        forget(runs[name])
        done.pop(name, None)
    for stage in stages(runs, done):
        left = arguments.limit - (time.monotonic() - started)
        if left >= max(PARTS[part_of(name)].piece or PARTS[part_of(name)].limit for name in stage):
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
    spread = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    made = {"tests": [*pytest, "-v", *spread, *(f"tests/test_{name}.py" for name in TESTS)]}
    for dtype in ("bfloat16", "float32", "float16"):
        made[f"check-{dtype}"] = [*python, "-m", "clipkernels", "check", "--dtype", dtype, "--format", "csv"]
        made[f"check-{dtype}"] += ["--output", str(out / f"check-{dtype}.csv"), "--quiet"]
    quick = ["--benchmark-max-time=0.02", "--benchmark-min-rounds=7", "--benchmark-warmup=off"]
    # A compiler takes seconds for each: at the largest and the smallest batch.
    made["ops"] = [*pytest, "bench/ops.py", "-k", "bfloat16 and not (compiled and (b8 or b64))", *quick]
    made["ops"] += ["--benchmark-columns=median", "--benchmark-sort=name", "--rows", str(out / "ops.csv")]
    if importlib.util.find_spec("open_clip"):
        towers = [*python, "bench/towers.py", "--dtype", "bfloat16", "--models"]
        made["towers"] = [*towers, *MODELS, "--batch", *BATCHES, "--rounds", "15", "--plain", "--graphs", "8"]
        made["towers"] += ["--out", str(out / "towers-bf16.csv")]
        for part, mode, some in (("compiled", "default", COMPILED), ("autotuned", "max-autotune", AUTOTUNED)):
            made[part] = [*towers, *MODELS, "--batch", *BATCHES[:3], "--rounds", "15", "--only", *some]
            made[part] += ["--compile", mode, "--compiled", *some, "--out", str(out / f"towers-bf16-{part}.csv")]
        made["launches"] = [*towers, *MODELS, "--batch", "1", "--rounds", "1", "--launches"]
        made["launches"] += ["--out", str(out / "launches.csv")]
        if peer:
            made["peer"] = [*towers, "ViT-B-16", "--batch", *BATCHES, "--rounds", "15", "--peer", peer]
            made["peer"] += ["--out", str(out / "towers-bf16-peer.csv")]
    made["tuned"] = [*python, "bench/tune.py", "--out", str(out / "tuned.csv")]
    made["distill"] = [*python, "bench/distill_cost.py", "--device", "cuda", "--dtype", "bfloat16", "--batch", "256"]
    made["distill"] += ["--rounds", "31", "--out", str(out / "distill-cost-bf16.csv")]
    made["staircase"] = [*python, "bench/staircase.py", "--out", str(out / "staircase.csv")]
    made["staircase"] += ["--plot", str(out / "staircase.png")]
    made["counters"] = [*python, "bench/counters.py", "--ops", str(out / "ops.csv"), "--out", str(out / "counters.csv")]
    return made


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


def stages(runs: dict[str, list[str]], done: dict[str, Done]) -> list[list[str]]:
    """What is not whole, side by side where that disturbs nobody: those that had the fewest turns first."""
    ahead = [name for name in runs if name not in done or not done[name].whole]
    if "ops" in ahead:  # of which counters look at the slowest
        ahead = [name for name in ahead if name != "counters"]
    beside = [name for name in ahead if part_of(name) in BESIDE]
    found = [*([beside] if beside else []), *([name] for name in ahead if name not in beside)]
    order = list(PARTS)

    def turn(stage: list[str]) -> tuple[int, int]:
        return min(done[name].turns if name in done else 0 for name in stage), order.index(part_of(stage[0]))

    return sorted(found, key=turn)


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
            turns = done[name].turns + 1 if name in done else 1
            done[name] = Done(status == 0, turns, round(took), told, **stamp())
            with replacing(out / "done.json") as temporary:
                whole = {name: each._asdict() for name, each in done.items()}
                Path(temporary).write_text(json.dumps(whole, indent=1), encoding="utf-8")
            failed += [name] if status not in (0, MORE) else []
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
