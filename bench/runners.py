"""Ways to run what a tower runs: in plain PyTorch, from a CUDA graph; whether it runs, and what it takes and could."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from clipkernels.measure.memory import peak
from clipkernels.measure.timing import Clock, Variant, measure

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CHOICE = "CLIPKERNELS_BACKEND"
MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}
"""Of the square matrices whose product says what a device can do."""
ALLOWED_EPS = 32
"""Of the dtype's epsilons that two dense towers may differ by."""
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
"""Bytes of a tensor larger than any cache of the device."""
RUNS_AT_ONCE = {"cuda": 20, "cpu": 1}
"""Runs that are timed together: starting and waiting for a GPU count for little then, and it leaves its idle clock."""


def plain(variant: Variant) -> Variant:
    """The same plan on the reference: plain PyTorch, attention by SDPA. Eager alone: a compiler keeps its choice."""

    def encode(images: Tensor) -> object:
        before = os.environ.get(CHOICE)
        os.environ[CHOICE] = "reference"
        try:
            return variant.encode(images)
        finally:
            if before is None:
                del os.environ[CHOICE]
            else:
                os.environ[CHOICE] = before

    return variant._replace(encode=encode)


@torch.inference_mode()
def captured(variant: Variant, images: Tensor) -> Variant:
    """The same from a CUDA graph of one batch (B,3,S,S); images are copied into it before every replay."""
    given = images.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what the first runs compile and choose stays out of the graph
        for _ in range(2):
            variant.encode(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        embedding = variant.encode(given)

    def encode(images: Tensor) -> object:
        given.copy_(images)
        graph.replay()
        return embedding

    return variant._replace(encode=encode)


def replayed(
    call: Callable[..., object], inputs: Sequence[Sequence[Tensor]], span: float = 0.0, most: int = 1
) -> tuple[Callable[[], None], int]:
    """A CUDA graph of several calls: what replays it and waits for the device, and the number of calls.

    Args:
        call: what is captured; the first runs compile it, outside the graph.
        inputs: its arguments, used in turn, each at least once.
        span: seconds that the calls of one graph should fill.
        most: calls of one graph, unless there are more inputs.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for own in inputs:
            call(*own)
        stream.synchronize()
        start = time.perf_counter()
        call(*inputs[0])
        stream.synchronize()
        took = time.perf_counter() - start
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    turns = list(islice(cycle(inputs), max(min(int(span / took), most), len(inputs))))
    with torch.cuda.graph(graph):
        for own in turns:
            call(*own)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay, len(turns)


def in_graphs(variants: Mapping[str, Variant], images: Tensor) -> dict[str, Variant]:
    """Variants from CUDA graphs, until one cannot be captured, which is named."""
    found = {}
    for label, variant in variants.items():
        try:
            found[f"{label}, graph"] = captured(variant, images)
        except RuntimeError:
            print(f"no graph of {label}:\n{traceback.format_exc()}", flush=True)
            break
    return found


def is_device_lost() -> bool:
    """Whether the device takes no more work."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def runs_without_error(label: str, attempt: Callable[[], object], needed: str) -> bool:
    """Whether an attempt at a variant raises nothing; one that does is named, unless it is needed: then it raises."""
    try:
        attempt()
    except Exception:  # a wrong result, what a compiler or a device refuses
        if label == needed or is_device_lost():
            raise
        print(f"left out, {label}:\n{traceback.format_exc()}", flush=True)
        return False
    return True


@torch.inference_mode()
def run_once(variant: Variant, images: Tensor, expected: Tensor | None = None) -> None:
    """Warms a variant; raises where its embeddings are not finite, or not those expected, up to rounding."""
    came: Any = variant.encode(images)
    assert came.isfinite().all(), "the embedding is not finite"
    if expected is not None:
        error = ((came.double() - expected.double()).norm() / expected.double().norm()).item()
        allowed = ALLOWED_EPS * torch.finfo(images.dtype).eps
        assert error <= allowed, f"relative error {error:.1e} is above {allowed:.1e}"


@torch.inference_mode()
def peak_mib(label: str, variant: Variant, images: Tensor) -> float | None:
    """MiB that one more batch of a warm variant takes at the peak; None where a graph has a pool of its own."""
    if any(way in label for way in ("graph", "max-autotune", "reduce-overhead")):
        return None
    most = peak(partial(variant.encode, images), images.device)
    return most and round(most / 2**20, 2)


@torch.inference_mode()
def launches(run: Callable[[], object]) -> int:
    """Kernels and copies that one call starts on a GPU; what is timed afterwards may be slower."""
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")  # which CUDA graphs do not survive
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in recorded.events() or ())


def matmul_rate(dtype: torch.dtype, device: torch.device, clock: Clock = "wall") -> float:
    """TFLOP/s of a large product of random matrices: what arithmetic reaches at best here and now."""
    side = MATMUL_SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, side, side, device=device, generator=generator).to(dtype).unbind()
    return round(2 * side**3 / _seconds(lambda: a @ b, device, clock) / 1e12, 4)


def copy_rate(device: torch.device) -> float:
    """GB/s, read and written, of copying a tensor larger than any cache of the device."""
    x = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    y = torch.empty_like(x)
    return round(2 * x.nbytes / _seconds(lambda: y.copy_(x), device) / 1e9, 2)


@torch.inference_mode()
def _seconds(run: Callable[[], object], device: torch.device, clock: Clock = "wall") -> float:
    """Of one run among several at once, on a warm device."""
    several = RUNS_AT_ONCE[device.type]

    def runs() -> None:
        for _ in range(several):
            run()

    return measure({"": runs}, rounds=7, warmup=10, clock=clock).of("").median / several
