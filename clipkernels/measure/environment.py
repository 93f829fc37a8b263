"""The environment that results are stored with: versions, device, driver, threads, commit and date."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

from clipkernels import __version__

DISTRIBUTIONS = {
    "triton": "triton",
    "open_clip": "open_clip_torch",
    "timm": "timm",
    "transformers": "transformers",
    "numpy": "numpy",
}

COMMIT_VARIABLE = "CLIPKERNELS_COMMIT"
"""The environment variable that names the commit of a copy without a git checkout."""


def versions() -> dict[str, str | None]:
    """Return the versions of clipkernels, Python and the packages it uses; None if a package is not installed."""
    result: dict[str, str | None] = {
        "clipkernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name, distribution in DISTRIBUTIONS.items():
        try:
            result[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            result[name] = None
    return result


def environment() -> dict[str, Any]:
    """Return the environment of a measurement: versions, device, driver, threads, commit of the checkout, and date."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        **versions(),
        "device": gpu or cpu_name(),
        "cpu": cpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "threads": torch.get_num_threads(),
        "commit": _commit() or os.environ.get(COMMIT_VARIABLE),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def cpu_name() -> str:
    """Return the processor's model name as the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of the checkout that contains this package, or None for an installed package."""
    # An installed package may lie inside the checkout of another project, in a virtual environment there.
    top = _output("git", "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != Path(__file__).resolve().parents[2]:
        return None
    return _output("git", "describe", "--always", "--dirty", "--abbrev=12")


@cache
def _output(*command: str) -> str | None:
    """Return the output of a command run in the folder of this file, or None if it fails or does not exist."""
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
