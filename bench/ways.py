"""Ways to run what a tower runs: in plain PyTorch, from a CUDA graph; whether it runs, and what it takes and could."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from clipkernels.cli.memory import peak
from clipkernels.timing import Clock, Variant, measure

CHOICE = "CLIPKERNELS_BACKEND"
SIDE = {"cuda": 8192, "cpu": 1024}
"""Of the square matrices whose product says what a device can do."""


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


def in_graphs(variants: Mapping[str, Variant], images: Tensor) -> dict[str, Variant]:
    """Variants from CUDA graphs, until one cannot be captured, which is named."""
    found = {}
    for label, variant in variants.items():
        try:
            found[f"{label}, graph"] = captured(variant, images)
        except RuntimeError as error:
            print(f"no graph of {label}: {str(error).splitlines()[:1]}", flush=True)
            break
    return found


def lost() -> bool:
    """Whether the device takes no more work."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def serves(label: str, attempt: Callable[[], object], needed: str) -> bool:
    """Whether an attempt at a variant raises nothing; one that does is named, unless it is needed: then it raises."""
    try:
        attempt()
    except Exception as error:  # a wrong result, what a compiler or a device refuses
        if label == needed or lost():
            raise
        print(f"left out, {label}: {str(error).splitlines()[:1]}", flush=True)
        return False
    return True


@torch.inference_mode()
def run_once(variant: Variant, images: Tensor) -> None:
    """Warms a variant; raises where its embeddings are not finite."""
    came: Any = variant.encode(images)
    assert came.isfinite().all(), "the embedding is not finite"


@torch.inference_mode()
def held(label: str, variant: Variant, images: Tensor) -> float | None:
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
    side = SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, side, side, device=device, generator=generator).to(dtype).unbind()
    with torch.inference_mode():
        times = measure({"product": lambda: a @ b}, rounds=7, warmup=2, clock=clock)
    return round(2 * side**3 / times.of("product").median / 1e12, 4)
