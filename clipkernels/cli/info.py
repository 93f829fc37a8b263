"""`clipkernels info`: versions, devices, and the backend that `auto` takes on each device."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import click
import torch
from rich.table import Table
from rich.text import Text

from clipkernels import backend
from clipkernels.cli.parts.options import format_option
from clipkernels.cli.parts.output import opened, write_results
from clipkernels.measure.environment import cpu_name, versions

EXAMPLE = """\b
Example:
  clipkernels info --format json
"""


@click.command(epilog=EXAMPLE)
@format_option
def info(form: str) -> None:
    """Show versions, devices and backends.

    For each device: the backend that `auto` takes there, and why.
    """
    packages, machines = versions(), devices()
    with opened(None) as stream:
        records: list[dict[str, Any]] = [{"name": name, "value": version} for name, version in packages.items()]
        records += [{"name": machine["device"], "value": machine["name"]} for machine in machines]
        document = {"versions": packages, "devices": machines}
        write_results(form, stream, records, document, lambda: draw_tables(packages, machines))


def draw_tables(packages: Mapping[str, str | None], machines: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return a table of packages and one of devices."""
    versions_table = Table("package", "version")
    for name, version in packages.items():
        versions_table.add_row(name, version or "not installed")
    table = Table("device", "name", "memory", "capability", "auto takes", "because")
    for machine in machines:
        memory = f"{machine['memory_gib']:.1f} GiB" if machine["memory_gib"] else "unknown"
        cells = (machine["device"], machine["name"], memory, machine["capability"], machine["backend"])
        table.add_row(*map(Text, cells), Text(machine["why"]))
    return [versions_table, table]


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
