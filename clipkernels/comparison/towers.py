"""Speed, fidelity and memory of every variant of a tower, by precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from clipkernels.comparison.runtimes import RUNTIMES, check_runtime, run_each
from clipkernels.compilation import compile
from clipkernels.measure.fidelity import Fidelity, compare, complaint
from clipkernels.measure.memory import peak
from clipkernels.measure.timing import HOST, Clock, Speed, Variant, tabulate, time_variants, vary
from clipkernels.messages import first_line
from clipkernels.methods import Method
from clipkernels.patching import tower_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EAGER, FREEZE = "eager", "freeze"
# These modes replay CUDA graphs, whose memory is a pool that is allocated before the forward that is measured.
GRAPH_MODES = ("compiled reduce-overhead", "compiled max-autotune")
TIMED_BATCHES = 4


class Settings(NamedTuple):
    """Settings of a run; `modes` are those of `compile_each`, measured in addition to eager."""

    batch: int
    rounds: int
    clock: Clock
    modes: Sequence[str]
    device: torch.device


class Row(NamedTuple):
    """One method in one precision and mode; `peak` is in bytes, None if it cannot be measured."""

    precision: str
    method: str
    mode: str
    speed: Speed
    fidelity: Fidelity
    peak: int | None

    def record(self) -> dict[str, Any]:
        """Return the row as plain numbers, by column."""
        fidelity = self.fidelity
        precision = fidelity.precision
        return {
            "precision": self.precision,
            "mode": self.mode,
            **self.speed.record(),
            "variant": self.method,  # the speed's variant contains the mode
            "cosine_min": round(fidelity.cosine[0], 6),
            "cosine_mean": round(fidelity.cosine[1], 6),
            "precision_cosine_min": precision and round(precision[0], 6),
            "precision_cosine_mean": precision and round(precision[1], 6),
            "agreement": fidelity.agreement,
            "peak_mib": None if self.peak is None else round(self.peak / 2**20, 3),
        }


class Observer(Protocol):
    """Receives the progress of a run, and warnings about poor embeddings."""

    def start(self, total: int) -> None:
        """Start a run of `total` batches; called once."""

    def describe(self, name: str) -> None:
        """Announce the variant whose batches follow."""

    def advance(self) -> None:
        """Count a batch; called after every batch."""

    def warn(self, line: str) -> None:
        """Report a variant and what is wrong with its embeddings."""


def measure(
    model: nn.Module,
    methods: Mapping[str, Method | None],
    images: Tensor,
    precisions: Collection[str],
    settings: Settings,
    observer: Observer,
) -> list[Row]:
    """Return a row per precision, mode and method, in this order; all rows of a precision are timed interleaved.

    Args:
        model: an unpatched model in fp32 on the device; it is not changed.
        methods: methods by name; None under HOST is the host library's own forward.
        images: (n,3,S,S) preprocessed, on the CPU.
        precisions: names in DTYPES; those below fp32 cast a copy of the model and the images.
        settings: settings of the run.
        observer: receives the progress.
    Raises:
        ValueError: a runtime that does not have a precision, or the device.
        ImportError: a package of a runtime is not installed.
        RuntimeError: a variant does not run or compile.
    """
    n, device = len(images), settings.device
    for mode, precision in product(settings.modes, precisions):
        if mode in RUNTIMES:
            check_runtime(mode, precision, device)
    # The last batch is filled up, so that only one shape is compiled.
    batches = torch.cat([images, images[:1].expand(-n % settings.batch, -1, -1, -1)]).split(settings.batch)
    per_precision = len(methods) * (1 + len(settings.modes)) * (len(batches) + settings.rounds + 1)
    before = 0 if "fp32" in precisions else len(methods) * len(batches)
    observer.start(before + len(precisions) * per_precision)

    def embed(encode: Callable[[Tensor], Any], name: str, dtype: torch.dtype) -> Tensor:
        observer.describe(name)
        embeddings = []
        try:
            with torch.inference_mode():
                for batch in batches:
                    embeddings.append(encode(batch.to(device, dtype)).double().cpu())
                    observer.advance()
        except Exception as error:  # torch raises many types, for a missing kernel, compiler or memory
            raise RuntimeError(f"expected {name} to run on {device}, got: {first_line(error)}") from error
        return torch.cat(embeddings)[:n]

    tower = tower_of(model)
    fp32_variants = vary(model, methods)
    fp32 = {label: embed(variant.encode, f"{label}, fp32", torch.float32) for label, variant in fp32_variants.items()}
    rows: list[Row] = []
    for precision in precisions:
        dtype = DTYPES[precision]
        low = model if precision == "fp32" else copy.deepcopy(model).to(dtype)
        variants = fp32_variants if precision == "fp32" else vary(low, methods)
        keys = {label: (label, EAGER) for label in methods}
        timed = [batch.to(device, dtype) for batch in batches[:TIMED_BATCHES]]
        fidelities, peaks = {}, {}
        rooms = len(methods) * (1 + len(settings.modes))
        with room_to_compile(rooms) if settings.modes else nullcontext():
            for mode in settings.modes:
                observer.describe(f"{name_mode(mode)}, {precision}")
                compiled = compile_each(low, methods, mode, settings.batch)
                keys |= {key: (label, name_mode(mode)) for key, label in zip(compiled, methods, strict=True)}
                variants = {**variants, **compiled}
            for key, variant in variants.items():
                label, mode = keys[key]
                done = precision == "fp32" and mode == EAGER
                embeddings = fp32[label] if done else embed(variant.encode, f"{key}, {precision}", dtype)
                fidelities[key] = compare(embeddings, fp32[HOST], fp32[label] if precision != "fp32" else None)
                fault = complaint(fidelities[key])
                if fault is not None:
                    observer.warn(f"{key}, {precision}: {fault}")
                with torch.inference_mode():
                    unknown = mode in RUNTIMES or (device.type == "cuda" and mode in GRAPH_MODES)
                    peaks[key] = None if unknown else peak(partial(variant.encode, timed[0]), device)
            observer.describe(f"timing, {precision}")
            times = time_variants(variants, timed, settings.rounds, clock=settings.clock, progress=observer.advance)
        for speed in tabulate(times, variants, tower, settings.batch):
            rows.append(Row(precision, *keys[speed.name], speed, fidelities[speed.name], peaks[speed.name]))
    return rows


def name_mode(mode: str) -> str:
    """Return the mode as rows name it."""
    return "frozen" if mode == FREEZE else mode if mode in RUNTIMES else f"compiled {mode}"


def compile_each(model: nn.Module, methods: Mapping[str, Method | None], mode: str, batch: int) -> dict[str, Variant]:
    """Return the variants of a model, compiled or exported, with the mode in their names.

    Args:
        model: an unpatched model.
        methods: methods by name, or None for the host's own forward.
        mode: a mode of torch.compile, whose variants compile at their first calls; or FREEZE: `ck.compile` with frozen
            weights, which compiles now; or a runtime of RUNTIMES, in which the exported towers run.
        batch: the batch size that is compiled under FREEZE.
    Raises:
        RuntimeError: a variant cannot be frozen.
        ImportError: a package of the runtime is not installed.
    """
    if mode in RUNTIMES:
        return {f"{label}, {name_mode(mode)}": variant for label, variant in run_each(model, methods, mode).items()}
    if mode == FREEZE:
        prepare = partial(compile, freeze=True, batch_sizes=(batch,), pad=False)
        frozen = vary(model, methods, prepare)
        return {f"{label}, {name_mode(mode)}": variant for label, variant in frozen.items()}
    # Not dynamic, because the counts in the plan of a second method would then be compiled as symbols.
    return {
        f"{label}, {name_mode(mode)}": variant._replace(encode=torch.compile(variant.encode, mode=mode, dynamic=False))
        for label, variant in vary(model, methods).items()
    }


def room_to_compile(variants: int) -> AbstractContextManager[None]:
    """Return a context in which torch compiles every variant."""
    # Variants share code objects, and torch runs a code object eagerly once it was compiled eight times.
    torch._dynamo.reset()
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # until torch 2.6
    return config.patch({name: 8 + 2 * variants})
