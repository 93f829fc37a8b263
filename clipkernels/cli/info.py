"""`clipkernels info`: versions, devices, and the backend that `auto` takes on each device."""

from __future__ import annotations

import json
import os
from typing import Any

import click
import torch
from rich.table import Table
from rich.text import Text

from clipkernels import backend
from clipkernels.cli.parts.output import opened, write_table
from clipkernels.measure.environment import cpu_name, versions

EXAMPLE = """\b
Example:
  clipkernels info --format json
"""


@click.command(epilog=EXAMPLE)
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
def info(form: str) -> None:
    """Show versions, devices and backends.

    For each device: the backend that `auto` takes there, and why.
    """
    packages, machines = versions(), devices()
    with opened(None) as stream:
        if form == "json":
            json.dump({"versions": packages, "devices": machines}, stream, indent=2)
            stream.write("\n")
            return
        table = Table("package", "version")
        for name, version in packages.items():
            table.add_row(name, version or "not installed")
        write_table(table, stream)
        table = Table("device", "name", "memory", "capability", "auto takes", "because")
        for machine in machines:
            memory = f"{machine['memory_gib']:.1f} GiB" if machine["memory_gib"] else "unknown"
            cells = (machine["device"], machine["name"], memory, machine["capability"], machine["backend"])
            table.add_row(*map(Text, cells), Text(machine["why"]))
        write_table(table, stream)


def devices() -> list[dict[str, Any]]:
    """Return the CPU and every CUDA or ROCm device.

    Each has its name, memory in GiB, capability, and the backend that `auto` takes there with the reason.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    rows = [_device("cpu", cpu_name(), _cpu_memory(), f"{capability}, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        if torch.version.hip:
            capability = properties.gcnArchName
        rows.append(_device(f"cuda:{index}", properties.name, properties.total_memory, capability))
    return rows


def _cpu_memory() -> int | None:
    """Return the bytes of physical memory, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _device(device: str, name: str, memory: int | None, capability: str) -> dict[str, Any]:
    """Return the row of one device; memory is in bytes."""
    chosen, why = backend.explain(torch.device(device))
    return {
        "device": device,
        "name": name,
        "memory_gib": round(memory / 2**30, 1) if memory else None,
        "capability": capability,
        "backend": chosen,
        "why": why,
    }
