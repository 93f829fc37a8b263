"""Run a tower on the reference or from a CUDA graph, check its output, and measure memory, launches and peak rates."""

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

from clipkernels.comparison.runtimes import RUNTIMES
from clipkernels.measure.memory import peak
from clipkernels.measure.timing import Clock, Variant, measure

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BACKEND_VARIABLE = "CLIPKERNELS_BACKEND"
MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}
"""Side of the square matrices whose product measures a device's arithmetic rate."""
ALLOWED_EPS = 32
"""Largest difference of two dense towers, in epsilons of the dtype."""
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
"""Bytes of a tensor that is larger than any cache of the device."""
RUNS_AT_ONCE = {"cuda": 20, "cpu": 1}
"""Runs that are timed together, so that launch and synchronisation count little and a GPU leaves its idle clock."""


def plain(variant: Variant) -> Variant:
    """Return the variant with the same plan on the reference: plain PyTorch, attention by SDPA.

    It works in eager mode only, because a compiled variant keeps the backend that it was traced with.
    """

    def encode(images: Tensor) -> object:
        before = os.environ.get(BACKEND_VARIABLE)
        os.environ[BACKEND_VARIABLE] = "reference"
        try:
            return variant.encode(images)
        finally:
            if before is None:
                del os.environ[BACKEND_VARIABLE]
            else:
                os.environ[BACKEND_VARIABLE] = before

    return variant._replace(encode=encode)


@torch.inference_mode()
def in_cuda_graph(variant: Variant, images: Tensor) -> Variant:
    """Return the variant as a CUDA graph of one batch (B,3,S,S); images are copied into it before every replay."""
    inputs = images.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the first runs compile and tune, outside the capture
        for _ in range(2):
            variant.encode(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        embedding = variant.encode(inputs)

    def encode(images: Tensor) -> object:
        inputs.copy_(images)
        graph.replay()
        return embedding

    return variant._replace(encode=encode)


def capture_calls(
    call: Callable[..., object], inputs: Sequence[Sequence[Tensor]], span: float = 0.0, max_calls: int = 1
) -> tuple[Callable[[], None], int]:
    """Capture several calls in one CUDA graph.

    Args:
        call: the function to capture; it first runs outside the graph, where it compiles.
        inputs: argument lists of the calls, used in turn, each at least once.
        span: seconds that the calls of one graph should take.
        max_calls: maximum number of calls in the graph, unless there are more inputs.
    Returns:
        A function that replays the graph and waits for the device, and the number of calls in the graph.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for arguments in inputs:
            call(*arguments)
        stream.synchronize()
        start = time.perf_counter()
        call(*inputs[0])
        stream.synchronize()
        seconds = time.perf_counter() - start
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    turns = list(islice(cycle(inputs), max(min(int(span / seconds), max_calls), len(inputs))))
    with torch.cuda.graph(graph):
        for arguments in turns:
            call(*arguments)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay, len(turns)


def in_graphs(variants: Mapping[str, Variant], images: Tensor) -> dict[str, Variant]:
    """Return variants as CUDA graphs, up to the first that cannot be captured, whose error is printed."""
    graphs = {}
    for label, variant in variants.items():
        try:
            graphs[f"{label}, graph"] = in_cuda_graph(variant, images)
        except RuntimeError:
            print(f"no graph of {label}:\n{traceback.format_exc()}", flush=True)
            break
    return graphs


def is_device_lost() -> bool:
    """Return true if a GPU exists and accepts no more work."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def runs_without_error(label: str, attempt: Callable[[], object], required: str) -> bool:
    """Return true if `attempt` at the variant `label` succeeds; print its error if not.

    Raises:
        Exception: the attempt's own, if `label` is `required` or the device is lost.
    """
    try:
        attempt()
    except Exception:  # a wrong result, or an error of a compiler or of the device
        if label == required or is_device_lost():
            raise
        print(f"left out, {label}:\n{traceback.format_exc()}", flush=True)
        return False
    return True


@torch.inference_mode()
def run_once(variant: Variant, images: Tensor, expected: Tensor | None = None) -> None:
    """Run a variant once, to warm it up.

    Raises:
        AssertionError: an embedding is not finite, or differs from `expected` by more than ALLOWED_EPS epsilons.
    """
    actual: Any = variant.encode(images)
    assert actual.isfinite().all(), "expected finite embeddings, got inf or nan"
    if expected is not None:
        error = ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
        allowed = ALLOWED_EPS * torch.finfo(images.dtype).eps
        assert error <= allowed, f"relative error {error:.1e} is above {allowed:.1e}"


@torch.inference_mode()
def peak_mib(label: str, variant: Variant, images: Tensor) -> float | None:
    """Return the peak MiB of one more batch of a warm variant; None for a CUDA graph and in other runtimes."""
    if any(way in label for way in ("graph", "max-autotune", "reduce-overhead", *RUNTIMES)):
        return None
    num_bytes = peak(partial(variant.encode, images), images.device)
    return num_bytes and round(num_bytes / 2**20, 2)


@torch.inference_mode()
def launches(run: Callable[[], object]) -> int:
    """Return the number of kernels and copies that one call starts on a GPU. Later timings may be slower."""
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")  # CUDA graphs do not survive a lazy reinitialisation
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in recorded.events() or ())


def matmul_rate(dtype: torch.dtype, device: torch.device, clock: Clock = "wall") -> float:
    """Return TFLOP/s of a large product of random matrices, the best arithmetic rate of the device now."""
    side = MATMUL_SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, side, side, device=device, generator=generator).to(dtype).unbind()
    return round(2 * side**3 / _seconds(lambda: a @ b, device, clock) / 1e12, 4)


def copy_rate(device: torch.device) -> float:
    """Return GB/s, read plus written, of copying a tensor that is larger than any cache of the device."""
    x = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    y = torch.empty_like(x)
    return round(2 * x.nbytes / _seconds(lambda: y.copy_(x), device) / 1e9, 2)


@torch.inference_mode()
def _seconds(run: Callable[[], object], device: torch.device, clock: Clock = "wall") -> float:
    """Return the seconds of one run, timed with RUNS_AT_ONCE of them on a warm device."""
    count = RUNS_AT_ONCE[device.type]

    def runs() -> None:
        for _ in range(count):
            run()

    return measure({"": runs}, rounds=7, warmup=10, clock=clock).of("").median / count
