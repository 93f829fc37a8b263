"""Everything that needs a GPU, in one command and under eight minutes: tests, check, operations, a loss, towers.

    make gpu PYTHON=python3 OUT=results
    python bench/gpu.py --parts ops towers --out results
    python bench/gpu.py --list

It installs nothing and needs no network: torch, triton, pytest, pytest-benchmark, click and rich must be there, and
open_clip for the towers, which are left out without it. Each part has its own time limit and can be run alone; tests
and checks run beside each other, timings by themselves. Operations and towers are written as they are measured, the
large batches first. Results are CSV, JSON and logs in one folder per device.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("attention", "predict", "prune", "condense", "merge", "epilogue", "cross_attention", "affinity")
TESTS += ("targeted_l1", "fused_tower", "gpu")
MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14")
# Seconds for each part, 7.5 minutes together; tests and check share theirs.
LIMITS = {"tests": 150, "check": 150, "ops": 125, "distill": 35, "towers": 60, "compiled": 80}


def main() -> None:
    arguments = parse()
    runs = {name: make for name, make in commands(arguments.out).items() if name.split("-")[0] in arguments.parts}
    if arguments.list:
        for name, command in runs.items():
            print(f"{name}: {' '.join(command)}")
        return
    if not torch.cuda.is_available():
        sys.exit("error: expected a CUDA or ROCm device, got none; `--list` prints what would run")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if "ops" in arguments.parts:  # rows are appended to
        (arguments.out / "ops.csv").unlink(missing_ok=True)
    if not importlib.util.find_spec("open_clip"):
        print("open_clip is not installed: no towers", flush=True)
    failed = []
    for together in (("tests", "check"), ("ops",), ("distill",), ("towers",), ("compiled",)):
        stage = {name: command for name, command in runs.items() if name.split("-")[0] in together}
        failed += run(stage, arguments.out)
    print(f"results in {arguments.out}")
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed; see the logs there")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--out", type=Path, metavar="DIR", help="default bench/results/<device>")
    parser.add_argument("--list", action="store_true", help="print the commands instead of running them")
    arguments = parser.parse_args()
    if arguments.out is None:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
        arguments.out = ROOT / "bench" / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower())
    arguments.out = arguments.out.resolve()
    return arguments


def commands(out: Path) -> dict[str, list[str]]:
    """What each part runs."""
    python = [sys.executable, "-u"]
    pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    spread = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    made = {"tests": [*pytest, *spread, *(f"tests/test_{name}.py" for name in TESTS)]}
    for dtype in ("bfloat16", "float32", "float16"):
        table = str(out / f"check-{dtype}.csv")
        made[f"check-{dtype}"] = [*python, "-m", "clipkernels", "check", "--dtype", dtype, "--format", "csv"]
        made[f"check-{dtype}"] += ["--output", table, "--quiet"]
    quick = ["--benchmark-max-time=0.02", "--benchmark-min-rounds=7", "--benchmark-warmup=off"]
    made["ops"] = [*pytest, "bench/ops.py", "-k", "bfloat16", *quick, f"--deadline={LIMITS['ops'] - 15}"]
    made["ops"] += [f"--rows={out / 'ops.csv'}", "--benchmark-columns=median", "--benchmark-sort=name"]
    made["distill"] = [*python, "bench/distill_cost.py", "--device", "cuda", "--dtype", "bfloat16", "--batch", "256"]
    made["distill"] += ["--rounds", "31", "--out", str(out / "distill-cost-bf16.csv")]
    if importlib.util.find_spec("open_clip"):
        towers = [*python, "bench/towers.py", "--dtype", "bfloat16", "--rounds", "15"]
        made["towers"] = [*towers, "--models", *MODELS, "--batch", "256", "1", "32"]
        made["towers"] += ["--out", str(out / "towers-bf16.csv")]
        made["compiled"] = [*towers, "--models", "ViT-B-16", "--batch", "256", "--compile", "default"]
        made["compiled"] += ["--only", "Dense", "EViT(keep=0.7)"]
        made["compiled"] += ["--out", str(out / "towers-bf16-compiled.csv")]
    return made


def run(stage: dict[str, list[str]], out: Path) -> list[str]:
    """Runs commands beside each other, each until its limit; the names of those that failed or were cut short."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    started, begun = time.monotonic(), {}
    for name, command in stage.items():
        log = (out / f"{name}.log").open("w", encoding="utf-8")
        begun[name] = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        log.close()
    failed = []
    for name, process in begun.items():
        left = LIMITS[name.split("-")[0]] - (time.monotonic() - started)
        try:
            status = process.wait(max(left, 0.1))
            said = "ok" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its workers, which would disturb the timings
            process.wait()
            status, said = 1, "stopped at its time limit"
        lines = (out / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        print(
            f"{name}: {said} after {time.monotonic() - started:.0f} s: {lines[-1] if lines else 'no output'}",
            flush=True,
        )
        if status:
            failed.append(name)
    return failed


if __name__ == "__main__":
    main()
