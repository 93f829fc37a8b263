"""Run everything that needs a GPU, in runs of ten minutes, ordered so that an interrupted run is worth the most.

    make gpu                                         # with PYTHON and OUT= as `make help` says
    make gpu ARGS="--list"                           # the steps with their estimates; needs no GPU
    make gpu ARGS="--simulate 570 570"               # the schedule of two runs; needs no GPU
    make gpu ARGS="--resume build/gpu/results.tar.gz"
    make gpu ARGS="--steps tests ops"
    make gpu ARGS="--again tests"                    # measure a complete step anew
    make gpu ARGS="--peer tome=../ToMe"              # facebookresearch/ToMe with ours
    make gpu ARGS="--dry-run"                        # every step at toy sizes; needs no GPU

Nothing is installed and nothing is downloaded. Missing packages are named first, with the steps that need them.
`bench/gpu/steps.py` lists the steps in order. A step starts only if it can make progress before `--limit`, and every
skipped step is named. Each device has one folder of rows, logs and done.json, bench/results/<device>. After every step
the report and the archive of that folder are complete, so an interrupted run costs one step. Three files have to be
brought back, all in --out: results.tar.gz, report.md and log.txt. The same command continues where the last run ended;
on another machine it needs --resume. CLIPKERNELS_COMMIT names the commit of a copy without git.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.gpu.steps import BASE, ROOT, Progress, Step, Visit, losses, missing_packages, next_visit, schedule, steps

RESULTS = ROOT / "bench" / "results"
LIMIT = 570.0
# Seconds for the report and the archive after each step.
OVERHEAD = 3.0
# A step may exceed its estimate by at least this many seconds before it is stopped.
PATIENCE = 30.0
# The exit status of a step that reached its deadline, as in `bench/result_files.py`, which imports more than the
# standard library.
EXIT_DEADLINE = 75
DRY = "dry-run"


class Done(NamedTuple):
    """The state of a step after its last visit: true if it is complete, true if it failed, its seconds, the last line
    that it printed, and the driver, commit and date."""

    whole: bool
    failed: bool
    seconds: float
    line: str
    driver: str | None
    commit: str | None
    date: str


class Campaign:
    """One run of the campaign.

    Args:
        every: the steps.
        folder: the folder of rows, logs and done.json.
        out: the folder of the archive, the report and the log.
        limit: seconds of the run.
        started: `time.monotonic()` at the start of the run.
        dry: true if nothing is measured.
    """

    def __init__(
        self, every: Sequence[Step], folder: Path, out: Path, limit: float, started: float, dry: bool = False
    ) -> None:
        self.every, self.folder, self.out, self.limit, self.started = every, folder, out, limit, started
        self.dry, self.done, self.running = dry, read(folder), None
        self.running: subprocess.Popen[bytes] | None

    def run(self) -> list[str]:
        """Visit steps until none can make progress; return the names of the steps that failed."""
        visits: dict[str, int] = {}
        failed: list[str] = []
        try:
            while True:
                progress = Progress(self.complete(visits) | set(failed), self.failed(), visits)
                visit = next_visit(self.every, progress, self.remaining())
                if visit is None:
                    break
                visits[visit.step.name] = visits.get(visit.step.name, 0) + 1
                if self.visit(visit).failed:
                    failed.append(visit.step.name)
                self.publish()
        finally:
            self.stop()
        for step in self.every:
            if step.name not in self.complete(visits) and step.name not in visits:
                self.say(
                    f"skipped {step.name}: needs {step.min_seconds:.0f} s, {max(self.remaining(), 0):.0f} s are left"
                )
        return failed

    def visit(self, visit: Visit) -> Done:
        """Run a step until it ends or reaches its time limit; record and return its state."""
        step, began = visit.step, time.monotonic()
        log = self.folder / f"{step.name}.log"
        deadline = [] if step.piece is None else ["--deadline", f"{max(visit.seconds - step.piece, 1):.0f}"]
        # A step that takes far longer than expected probably hangs, and the time is better spent on the other steps.
        patience = max(step.seconds, PATIENCE) if step.piece is None else 2 * step.piece
        allowed = min(self.remaining(), visit.seconds + patience)
        with log.open("a", encoding="utf-8") as stream:
            self.running = subprocess.Popen(
                [sys.executable, "-u", *(["-m", "bench.gpu.dry_run"] if self.dry else []), *step.command, *deadline],
                cwd=ROOT,
                env=environment(self.dry),
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        try:
            status = self.running.wait(max(allowed, 0.1))
            end = {0: "done", EXIT_DEADLINE: "incomplete"}.get(status, f"exit status {status}")
        except subprocess.TimeoutExpired:
            self.stop()  # its workers would disturb later timings
            status, end = EXIT_DEADLINE if step.piece is not None else 1, "stopped at its time limit"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        seconds = time.monotonic() - began
        self.say(f"{step.name}: {end} after {seconds:.0f} s: {lines[-1] if lines else 'no output'}")
        failed = status not in (0, EXIT_DEADLINE)
        if failed:
            self.say("\n".join(f"    {line}" for line in lines[-30:]))
        from bench.result_files import stamp

        state = Done(status == 0, failed, round(seconds), lines[-1] if lines else "no output", **stamp())
        self.done[step.name] = state
        save_json({name: done._asdict() for name, done in self.done.items()}, self.folder / "done.json")
        return state

    def publish(self) -> None:
        """Write the report and the archive, each atomically."""
        from bench.gpu.report import render
        from clipkernels.files import atomic_write

        try:
            render(self.folder, None if self.dry or self.folder.parent != RESULTS else ROOT / "docs" / "results.md")
        except Exception:  # rows without a report are still worth bringing back
            self.say(f"no report:\n{traceback.format_exc()}")
        with atomic_write(self.out / "results.tar.gz") as temporary, tarfile.open(temporary, "w:gz") as archive:
            archive.add(self.folder, self.folder.name)
        if (self.folder / "report.md").exists():
            with atomic_write(self.out / "report.md") as temporary:
                Path(temporary).write_bytes((self.folder / "report.md").read_bytes())

    def complete(self, visits: Mapping[str, int]) -> set[str]:
        """Return the names of the steps that need no further visit."""
        again = {step.name for step in self.every if step.always and step.name not in visits}
        return {name for name, state in self.done.items() if state.whole} - again

    def failed(self) -> set[str]:
        """Return the names of the steps whose last visit failed."""
        return {name for name, state in self.done.items() if state.failed}

    def remaining(self) -> float:
        """Return the seconds until the run has to end."""
        return self.limit - OVERHEAD - (time.monotonic() - self.started)

    def say(self, line: str) -> None:
        """Print a line and append it to the log."""
        print(line, flush=True)
        with (self.out / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"{line}\n")

    def stop(self) -> None:
        """Kill the running step with every process that it started."""
        if self.running is not None and self.running.poll() is None:
            os.killpg(self.running.pid, signal.SIGKILL)
            self.running.wait()


def main() -> None:
    started = time.monotonic()
    arguments = parse()
    missing = missing_packages()
    every = steps(arguments.folder or RESULTS / "DEVICE", arguments.peer)
    if arguments.list or arguments.simulate:
        for line in listed(every) if arguments.list else schedule(every, arguments.simulate, OVERHEAD):
            print(line)
        return
    for line in losses(every, missing):
        print(line, flush=True)
    if not BASE.keys().isdisjoint(missing):
        absent = ", ".join(name for name in BASE if name in missing)
        sys.exit(f"error: expected the packages {', '.join(BASE)}; install the missing {absent}")
    folder = arguments.folder or RESULTS / device_name(arguments.dry_run)
    chosen = [
        step
        for step in steps(folder, arguments.peer)
        if step.name in (arguments.steps or [step.name]) and set(missing).isdisjoint(step.needs)
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # SystemExit stops the running step
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.resume:
        unpack(arguments.resume, folder)
    folder.mkdir(parents=True, exist_ok=True)
    for step in chosen:
        if step.name in arguments.again:
            forget(step, folder)
    campaign = Campaign(chosen, folder, arguments.out, arguments.limit, started, arguments.dry_run)
    failed = campaign.run()
    incomplete = [step.name for step in chosen if step.name not in campaign.done or not campaign.done[step.name].whole]
    campaign.say(f"results in {folder}; archive, report and log in {arguments.out}")
    if incomplete:
        campaign.say(f"incomplete: {', '.join(incomplete)}; run the same command again to continue")
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed; the log has the last lines of their output")


def parse() -> argparse.Namespace:
    names = [step.name for step in steps(RESULTS, "tome=PATH")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=names, metavar="STEP", help="run only these; --list names all")
    parser.add_argument("--again", nargs="+", choices=names, default=[], metavar="STEP", help="measure these anew")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, metavar="SECONDS", help="time of this run; default %(default)g"
    )
    parser.add_argument("--peer", metavar="tome=PATH", help="a checkout of facebookresearch/ToMe to time with ours")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="rows and logs; default bench/results/<device>")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "build" / "gpu",
        metavar="DIR",
        help="the three files to bring back; default build/gpu",
    )
    parser.add_argument("--resume", type=Path, metavar="FILE.tar.gz", help="continue the run that wrote this archive")
    parser.add_argument("--list", action="store_true", help="print the steps and run nothing")
    parser.add_argument(
        "--simulate", nargs="+", type=float, metavar="SECONDS", help="print the schedule of runs with these time limits"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="run every step at toy sizes without a GPU; all figures are meaningless"
    )
    arguments = parser.parse_args()
    if arguments.dry_run and arguments.folder is None:
        arguments.folder = arguments.out / DRY
    for name in ("folder", "out", "resume"):
        if getattr(arguments, name) is not None:
            setattr(arguments, name, getattr(arguments, name).resolve())
    if arguments.resume and not arguments.resume.is_file():
        parser.error(f"expected --resume with an archive written by `make gpu`, got {arguments.resume}")
    if arguments.peer:
        peer, _, path = arguments.peer.partition("=")
        arguments.peer = f"{peer}={Path(path).resolve()}"
    return arguments


def listed(every: Sequence[Step]) -> list[str]:
    """Return a line for each step."""
    return [
        f"{step.name}: {step.seconds:.0f} s of {max(step.total, step.seconds):.0f}: python {' '.join(step.command)}"
        for step in every
    ]


def device_name(dry: bool) -> str:
    """Return the name of the folder for this machine's GPU; exit with an error without a GPU."""
    import torch

    if not dry and not torch.cuda.is_available():
        sys.exit("error: expected a CUDA or ROCm device, got none; --list, --simulate and --dry-run need none")
    return DRY if dry else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())


def environment(dry: bool) -> dict[str, str]:
    """Return the environment variables of a step, with the checkout on Python's path."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if dry:
        variables.pop("TRITON_INTERPRET", None)
    return variables


def unpack(archive: Path, folder: Path) -> None:
    """Extract the files of an archive into a folder without results.

    Raises:
        SystemExit: the folder has results, or the archive is of another device.
    """
    if (folder / "done.json").exists():
        sys.exit(
            f"error: expected no results in {folder} with --resume, got done.json: omit --resume to continue with it"
        )
    with tarfile.open(archive) as packed:
        outside = [name for name in packed.getnames() if Path(name).parts[0] != folder.name]
        if outside:
            sys.exit(f"error: expected results of {folder.name} in {archive}, got {outside[0]}")
        packed.extractall(folder.parent, filter="data")


def read(folder: Path) -> dict[str, Done]:
    """Return the states of the steps that done.json in a folder records; empty without that file."""
    file = folder / "done.json"
    if not file.exists():
        return {}
    return {name: Done(**state) for name, state in json.loads(file.read_text(encoding="utf-8")).items()}


def forget(step: Step, folder: Path) -> None:
    """Remove the rows and the state of a step, so that it starts anew."""
    for option in ("--out", "--output", "--rows"):
        if option in step.command:
            table = Path(step.command[step.command.index(option) + 1])
            for suffix in (".csv", ".json", ".begun"):
                table.with_suffix(suffix).unlink(missing_ok=True)
    states = {name: state._asdict() for name, state in read(folder).items() if name != step.name}
    save_json(states, folder / "done.json")


def save_json(content: object, file: Path) -> None:
    """Write a JSON file atomically."""
    from clipkernels.files import atomic_write

    with atomic_write(file) as temporary:
        Path(temporary).write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
