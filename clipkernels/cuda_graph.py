"""Capture a function in a CUDA graph, and order the replays of graphs that share memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The first runs compile kernels and create the libraries' workspaces, which a capture must not do.
WARMUP_RUNS = 2

# A process may capture one graph at a time.
_CAPTURE = threading.Lock()


def is_available(device: torch.device) -> bool:
    """Return true if graphs of a device can be captured."""
    return device.type == "cuda" and torch.cuda.is_available()


def is_capturing() -> bool:
    """Return true if the caller's stream is being captured, in which no other graph may run."""
    return torch.cuda.is_current_stream_capturing()


class Recorder:
    """CUDA graphs of one device that share one pool of memory, and therefore run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.end = torch.cuda.Event()

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A function that replays `run()` on the current stream, and the output that every replay overwrites.

        No gradient is recorded, and autocast is off.
        """
        with (
            _CAPTURE,
            torch.cuda.device(self.device),
            torch.inference_mode(False),
            torch.no_grad(),  # in this order, because leaving inference mode enables gradients
            torch.autocast(self.device.type, enabled=False),
        ):
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(WARMUP_RUNS):
                    run()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate and copy meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                output = run()
        return graph.replay, output

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Run the body's work on the current stream after that of the previous body, on whatever stream that was."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.end)
        try:
            yield
        finally:  # the graph may run although no output was copied, as when memory runs out
            self.end.record(stream)

    def wait(self) -> None:
        """Wait until no graph runs, before their memory is freed."""
        self.end.synchronize()
