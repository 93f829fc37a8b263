"""Peak memory of one call, beyond the memory in use before it."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak bytes that PyTorch's allocator of a device had allocated during `run`, minus those before it.

    Not counted: memory that libraries allocate themselves (GEMM workspaces, locals of compiled loops), and CUDA graph
    pools filled at capture.

    Args:
        run: called once. Warm it up before, because memory that it compiles into or caches counts too.
        device: the CPU, whose allocations the profiler reports one by one, or a CUDA device, which records a maximum.
    Returns:
        Bytes, or None on any other device.
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
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler prints its own stages to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    profiler: Any = profiled.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(changes), default=0)
