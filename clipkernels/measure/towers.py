"""Speed, fidelity and memory of every variant of a tower, by precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from clipkernels.images import first_line
from clipkernels.measure.fidelity import Fidelity, compare, complaint
from clipkernels.measure.memory import peak
from clipkernels.measure.timing import HOST, Clock, Speed, Variant, tabulate, time_variants, vary
from clipkernels.methods import Method
from clipkernels.patching import tower_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EAGER = "eager"
GRAPHS = ("compiled reduce-overhead", "compiled max-autotune")  # whose memory is a pool that a forward adds nothing to
TIMED = 4


class Settings(NamedTuple):
    """How a run is taken; `modes` are those of torch.compile, beside eager."""

    batch: int
    rounds: int
    clock: Clock
    modes: Sequence[str]
    device: torch.device


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


class Observer(Protocol):
    """The progress of a run, and warnings about embeddings that came out poor."""

    def start(self, total: int) -> None:
        """Called once, with the number of batches."""

    def describe(self, name: str) -> None:
        """Called with the variant whose batches follow."""

    def advance(self) -> None:
        """Called after every batch."""

    def warn(self, line: str) -> None:
        """Called with the variant and what is wrong with its embeddings."""


def measure(
    model: nn.Module,
    methods: Mapping[str, Method | None],
    images: Tensor,
    precisions: Collection[str],
    settings: Settings,
    observer: Observer,
) -> list[Row]:
    """A row per precision, mode and method, in this order; the rows of one precision are timed interleaved.

    Args:
        model: in fp32 on the device, left unpatched.
        methods: by name; None under HOST is the host library's own forward.
        images: (n,3,S,S) preprocessed, on the CPU.
        precisions: names in DTYPES; a low one casts a copy of the model and its images.
        settings: of the run.
        observer: of its progress.
    Raises:
        RuntimeError: a variant that does not run or compile.
    """
    n, device = len(images), settings.device
    # Every batch is full, so that no other shape is ever compiled.
    batches = torch.cat([images, images[:1].expand(-n % settings.batch, -1, -1, -1)]).split(settings.batch)
    each = len(methods) * (1 + len(settings.modes)) * (len(batches) + settings.rounds + 1)
    before = 0 if "fp32" in precisions else len(methods) * len(batches)
    observer.start(before + len(precisions) * each)

    def embed(encode: Callable[[Tensor], Any], name: str, dtype: torch.dtype) -> Tensor:
        observer.describe(name)
        found = []
        try:
            with torch.inference_mode():
                for batch in batches:
                    found.append(encode(batch.to(device, dtype)).double().cpu())
                    observer.advance()
        except Exception as error:  # no kernel for a dtype, no compiler, no memory: whatever torch raises
            raise RuntimeError(f"expected {name} to run on {device}, got: {first_line(error)}") from error
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
                fault = complaint(fidelities[key])
                if fault is not None:
                    observer.warn(f"{key}, {precision}: {fault}")
                with torch.inference_mode():
                    pooled = device.type == "cuda" and mode in GRAPHS
                    peaks[key] = None if pooled else peak(partial(variant.encode, timed[0]), device)
            observer.describe(f"timing, {precision}")
            times = time_variants(variants, timed, settings.rounds, clock=settings.clock, progress=observer.advance)
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
