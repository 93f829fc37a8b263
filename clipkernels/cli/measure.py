"""Speed, fidelity and memory of every variant of a tower, by precision: the rows of `clipkernels bench`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import click
import torch
from rich.progress import Progress
from rich.text import Text
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipkernels.cli.demo import HOST
from clipkernels.cli.images import first_line
from clipkernels.cli.memory import peak
from clipkernels.cli.models import DTYPES
from clipkernels.methods import Method
from clipkernels.patch import tower_of
from clipkernels.timing import Clock, Speed, Variant, tabulate, time_variants, vary

EAGER = "eager"
GRAPHS = ("compiled reduce-overhead", "compiled max-autotune")  # whose memory is a pool that a forward adds nothing to
TIMED = 4
POOR = 0.99


class Settings(NamedTuple):
    """How a run is taken; `modes` are those of torch.compile, beside eager."""

    batch: int
    rounds: int
    clock: Clock
    modes: Sequence[str]
    device: torch.device


class Fidelity(NamedTuple):
    """How close embeddings came to the host's dense ones in eager fp32, and to their own method's.

    Cosines are the least and the mean over images; an embedding that is not finite counts as 0. `precision` is None in
    fp32. `agreement` is the share of images whose nearest other image is the same, None where there is no other.
    """

    cosine: tuple[float, float]
    precision: tuple[float, float] | None
    agreement: float | None
    finite: bool


class Row(NamedTuple):
    """One method in one precision and mode; `peak` in bytes, None where it cannot be told."""

    precision: str
    method: str
    mode: str
    speed: Speed
    fidelity: Fidelity
    peak: int | None

    def record(self) -> dict[str, Any]:
        """The row as plain numbers."""
        fidelity = self.fidelity
        own = fidelity.precision
        return {
            "precision": self.precision,
            "mode": self.mode,
            **self.speed.record(),
            "variant": self.method,  # without its mode
            "cosine_min": round(fidelity.cosine[0], 6),
            "cosine_mean": round(fidelity.cosine[1], 6),
            "precision_cosine_min": own and round(own[0], 6),
            "precision_cosine_mean": own and round(own[1], 6),
            "agreement": fidelity.agreement,
            "peak_mib": None if self.peak is None else round(self.peak / 2**20, 3),
        }


def measure(
    model: nn.Module,
    tower_name: str,
    methods: Mapping[str, Method | None],
    images: Tensor,
    precisions: Collection[str],
    settings: Settings,
    bar: Progress,
) -> list[Row]:
    """A row per precision, mode and method, in this order; the rows of one precision are timed interleaved.

    Args:
        model: in fp32 on the device, left unpatched.
        tower_name: what warnings call it.
        methods: what runs, by name; HOST is the host library's own forward.
        images: (n,3,S,S) preprocessed, on the CPU.
        precisions: names in DTYPES; a low one casts a copy of the model and its images.
        settings: of the run.
        bar: told of every batch; what it prints names the embeddings that came out poor.
    Raises:
        click.ClickException: a variant that does not run or compile.
    """
    n, device = len(images), settings.device
    # Every batch is full, so that no other shape is ever compiled.
    batches = torch.cat([images, images[:1].expand(-n % settings.batch, -1, -1, -1)]).split(settings.batch)
    each = len(methods) * (1 + len(settings.modes)) * (len(batches) + settings.rounds + 1)
    before = 0 if "fp32" in precisions else len(methods) * len(batches)
    task = bar.add_task("", total=before + len(precisions) * each)

    def embed(encode: Callable[[Tensor], Any], name: str, dtype: torch.dtype) -> Tensor:
        bar.update(task, description=name)
        found = []
        try:
            with torch.inference_mode():
                for batch in batches:
                    found.append(encode(batch.to(device, dtype)).double().cpu())
                    bar.advance(task)
        except Exception as error:  # no kernel for a dtype, no compiler, no memory: whatever torch raises
            raise click.ClickException(f"expected {name} to run on {device}, got: {first_line(error)}") from error
        return torch.cat(found)[:n]

    tower = tower_of(model)
    plain = vary(model, methods)
    exact = {label: embed(variant.encode, f"{label}, fp32", torch.float32) for label, variant in plain.items()}
    rows: list[Row] = []
    for precision in precisions:
        dtype = DTYPES[precision]
        variants = plain if precision == "fp32" else vary(copy.deepcopy(model).to(dtype), methods)
        keys = {label: (label, EAGER) for label in methods}
        for mode in settings.modes:
            compiled = compile_each({label: variants[label] for label in methods}, mode)
            keys |= {key: (label, f"compiled {mode}") for key, label in zip(compiled, methods, strict=True)}
            variants = {**variants, **compiled}
        timed = [batch.to(device, dtype) for batch in batches[:TIMED]]
        fidelities, peaks = {}, {}
        with room_to_compile(len(variants)) if settings.modes else nullcontext():
            for key, variant in variants.items():
                label, mode = keys[key]
                known = precision == "fp32" and mode == EAGER
                came = exact[label] if known else embed(variant.encode, f"{key}, {precision}", dtype)
                fidelities[key] = compare(came, exact[HOST], exact[label] if precision != "fp32" else None)
                complain(f"{tower_name}, {key}, {precision}", fidelities[key], bar)
                with torch.inference_mode():
                    pooled = device.type == "cuda" and mode in GRAPHS
                    peaks[key] = None if pooled else peak(partial(variant.encode, timed[0]), device)
            bar.update(task, description=f"timing, {precision}")
            times = time_variants(
                variants, timed, settings.rounds, clock=settings.clock, progress=lambda: bar.advance(task)
            )
        for speed in tabulate(times, variants, tower, settings.batch):
            rows.append(Row(precision, *keys[speed.name], speed, fidelities[speed.name], peaks[speed.name]))
    return rows


def compile_each(variants: Mapping[str, Variant], mode: str) -> dict[str, Variant]:
    """The variants under torch.compile, under names that say so."""
    # Static, or the numbers in the plan of a second method would be compiled as symbols.
    return {
        f"{label}, compiled {mode}": variant._replace(encode=torch.compile(variant.encode, mode=mode, dynamic=False))
        for label, variant in variants.items()
    }


def room_to_compile(variants: int) -> AbstractContextManager[None]:
    """A context in which torch compiles every variant: they share code, and beyond eight of it would stay eager."""
    torch._dynamo.reset()
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # until torch 2.6
    return config.patch({name: 8 + 2 * variants})


def compare(came: Tensor, dense: Tensor, own: Tensor | None) -> Fidelity:
    """Fidelity of embeddings (n,E) to the dense ones, and to their own method's in fp32 unless they are those."""

    def cosine(other: Tensor) -> tuple[float, float]:
        each = (unit(came) * unit(other)).sum(1).clamp(-1, 1)
        return each.min().item(), each.mean().item()

    same = (nearest(came) == nearest(dense)).double().mean().item() if len(came) > 1 else None
    return Fidelity(cosine(dense), None if own is None else cosine(own), same, bool(came.isfinite().all()))


def unit(x: Tensor) -> Tensor:
    """Rows of length one, zeros for a row that is not finite."""
    return normalize(x.masked_fill(~x.isfinite().all(1, keepdim=True), 0), dim=1)


def nearest(x: Tensor) -> Tensor:
    """For every row (n,E) the index of the other row with the largest cosine, the lower of equals."""
    x = unit(x)
    found = []
    for start, part in zip(range(0, len(x), 1024), x.split(1024), strict=True):
        near = part @ x.T
        near.diagonal(start).fill_(-torch.inf)
        found.append(near.argmax(1))
    return torch.cat(found)


def complain(name: str, fidelity: Fidelity, bar: Progress) -> None:
    """One line on stderr for embeddings that are not finite, or that a low precision moved too far."""
    worst, mean = fidelity.precision or (1.0, 1.0)
    if not fidelity.finite:
        line = "expected finite embeddings, got some that are not"
    elif worst < POOR:
        line = f"expected a cosine of {POOR} with the same in fp32, got {worst:.4f} at worst, {mean:.4f} in the mean"
    else:
        return
    bar.console.print(Text(f"warning: {name}: {line}"), soft_wrap=True)
