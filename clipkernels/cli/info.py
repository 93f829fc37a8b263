"""`clipkernels info`: versions, devices, and the backend that `auto` takes on each."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table
from rich.text import Text

from clipkernels import __version__, backend
from clipkernels.cli.output import opened, write_table

DISTRIBUTIONS = {
    "triton": "triton",
    "open_clip": "open_clip_torch",
    "timm": "timm",
    "transformers": "transformers",
    "numpy": "numpy",
}

COMMIT = "CLIPKERNELS_COMMIT"
"""The variable that names the commit of a copy that has no git beside it."""

EXAMPLE = """\b
Example:
  clipkernels info --format json
"""


@click.command(epilog=EXAMPLE)
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
def info(form: str) -> None:
    """Versions, devices and backends.

    On each device: which backend `auto` takes, and why.
    """
    found, machines = versions(), devices()
    with opened(None) as stream:
        if form == "json":
            json.dump({"versions": found, "devices": machines}, stream, indent=2)
            stream.write("\n")
            return
        table = Table("package", "version")
        for name, version in found.items():
            table.add_row(name, version or "not installed")
        write_table(table, stream)
        table = Table("device", "name", "memory", "capability", "auto takes", "because")
        for machine in machines:
            memory = f"{machine['memory_gib']:.1f} GiB" if machine["memory_gib"] else "unknown"
            cells = (machine["device"], machine["name"], memory, machine["capability"], machine["backend"])
            table.add_row(*map(Text, cells), Text(machine["why"]))
        write_table(table, stream)


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


def devices() -> list[dict[str, Any]]:
    """The CPU and every CUDA or ROCm device: name, memory in GiB, capability, and `auto`'s backend with its reason."""
    capability = torch.backends.cpu.get_cpu_capability()
    found = [_device("cpu", cpu_name(), _cpu_memory(), f"{capability}, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        if torch.version.hip:
            capability = properties.gcnArchName
        found.append(_device(f"cuda:{index}", properties.name, properties.total_memory, capability))
    return found


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


def _cpu_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _device(device: str, name: str, memory: int | None, capability: str) -> dict[str, Any]:
    chosen, why = backend.explain(torch.device(device))
    return {
        "device": device,
        "name": name,
        "memory_gib": round(memory / 2**30, 1) if memory else None,
        "capability": capability,
        "backend": chosen,
        "why": why,
    }
