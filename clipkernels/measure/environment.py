"""The environment that a measurement is kept with: versions, device, driver, threads, commit and date."""

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

COMMIT = "CLIPKERNELS_COMMIT"
"""The variable that names the commit of a copy that has no git beside it."""


def versions() -> dict[str, str | None]:
    """Version of clipkernels, Python and the packages it stands on, None for one that is not installed."""
    found: dict[str, str | None] = {
        "clipkernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name, distribution in DISTRIBUTIONS.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def environment() -> dict[str, Any]:
    """What a measurement should be kept with: versions, device, driver, threads, commit of the checkout, and date."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        **versions(),
        "device": gpu or cpu_name(),
        "cpu": cpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "threads": torch.get_num_threads(),
        "commit": _commit() or os.environ.get(COMMIT),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def cpu_name() -> str:
    """The processor's model name, as the system gives it."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that this package is in; None where it is installed, if inside another's checkout."""
    top = _output("git", "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != Path(__file__).resolve().parents[2]:
        return None
    return _output("git", "describe", "--always", "--dirty", "--abbrev=12")


@cache
def _output(*command: str) -> str | None:
    """What a command prints, run where this file lies; None where it fails or does not exist."""
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
