"""The most memory that one call holds at once, beyond what was there before."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that PyTorch's allocator of a device had handed out at most while `run` ran, less those before it.

    What a library allocates for itself (a GEMM's scratch, a compiled loop's locals) is not seen, nor is a pool that a
    CUDA graph filled when it was captured.

    Args:
        run: what is called once; warm, or what it compiles and caches counts too.
        device: the CPU, whose allocations the profiler reports one by one, or a CUDA device, which keeps a maximum.
    Returns:
        None on any other device.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its own stages on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    kept: Any = recorded.profiler
    events = [event for event in kept.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(changes), default=0)
