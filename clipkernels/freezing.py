"""Functions of images under torch.compile, with their weights frozen into the graph on request, and what that costs.

Inductor packs a frozen weight once, where an eager product in half precision packs it again in every call. It freezes
only while `torch._inductor.config.freezing` is set: dynamo reads that setting when it traces, Inductor when it
compiles, and an option of torch.compile of the same name does nothing. So the setting is made for one compilation,
under the lock that other threads take to compile, and is then put back.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
# Their output lies in the memory of a CUDA graph, which the next call writes again.
GRAPH_MODES = ("reduce-overhead", "max-autotune")
SAMPLE_SECONDS = 0.02
_TURN = threading.local()


class Cost(NamedTuple):
    """The cost of a compilation.

    seconds: from the first trace to the end of the first run.
    peak_bytes: the most that the resident memory of the process rose meanwhile, sampled every 20 ms; None where the
        system does not tell. The compilers that Inductor starts as processes of their own do not count.
    kept_bytes: the part that the process holds afterwards, which includes the compiler's own caches.
    """

    seconds: float
    peak_bytes: int | None
    kept_bytes: int | None


class CompiledForward:
    """A function of images (B,3,S,S) that is compiled for one shape, or for any batch size, by its first call.

    Every call runs without gradients. The guards of dynamo, which take milliseconds on a tower of twelve blocks, are
    left out where torch can (2.11 can, 2.6 cannot): the caller passes images of one size, dtype and device, and calls
    nothing whose weights or modules have changed since.

    Args:
        function: from images to tensors in any structure.
        freeze: make the weights constants of the graph, which are read and packed once.
        mode: a mode of torch.compile.
        dynamic: compile for any batch size of at least 2.
    """

    def __init__(
        self, function: Callable[[Tensor], Any], *, freeze: bool, mode: Mode = "default", dynamic: bool = False
    ) -> None:
        self.freeze, self.dynamic, self.copies = freeze, dynamic, mode in GRAPH_MODES
        self.cost: Cost | None = None
        options: dict[str, Any] = dict(torch._inductor.list_mode_options(mode, dynamic))
        if hasattr(torch.compiler, "skip_all_guards_unsafe"):
            options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
        # Not dynamic, because all sizes would be: only the batch is marked.
        self._run = torch.compile(
            _with_code_alone(function), fullgraph=True, dynamic=False, backend=_compile_in_turn, options=options
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, images: Tensor) -> Any:
        """The function's output for images (B,3,S,S)."""
        # The graph is of ordinary tensors in one memory format.
        images = images.clone() if images.is_inference() else images.detach()
        images = images.contiguous()
        if self.cost is None:
            return self._compile(images)
        try:
            return self._call(images)
        except Exception as error:
            if not isinstance(getattr(error, "inner_exception", None), _OutOfTurnError):
                raise
        return self._compile(images)  # torch._dynamo.reset() has deleted the graph

    def _call(self, images: Tensor) -> Any:
        if not self.copies:
            return self._run(images)
        torch.compiler.cudagraph_mark_step_begin()
        return _pytree.tree_map_only(Tensor, Tensor.clone, self._run(images))

    def _compile(self, images: Tensor) -> Any:
        """The output of the first call."""
        if self.dynamic:
            torch._dynamo.mark_dynamic(images, 0)
        with _exclusive_compilation(self.freeze), _watch_memory() as memory:
            start = time.perf_counter()
            output = self._call(images)
            seconds = time.perf_counter() - start
        self.cost = Cost(seconds, *memory)
        return output


class _OutOfTurnError(Exception):
    """Dynamo compiles while nothing is set for it."""


def _compile_in_turn(graph: Any, inputs: list[Any], options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """The backend: Inductor, but only within `_exclusive_compilation`, so that nothing is left unfrozen by chance."""
    if not getattr(_TURN, "is_taken", False):
        raise _OutOfTurnError
    inductor: Any = torch._dynamo.lookup_backend("inductor")
    compiled: Callable[..., Any] = inductor(graph, inputs, config_patches=options)
    return compiled


def _with_code_alone(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The function under a code object of its own, to which dynamo attaches what it compiles.

    Functions that share one compete for a few places, and keep each other's graphs alive.
    """

    def forward(images: Tensor) -> Any:
        return function(images)

    forward.__code__ = forward.__code__.replace()
    return forward


@contextmanager
def _exclusive_compilation(freeze: bool) -> Iterator[None]:
    """Keep other threads from compiling, and freeze what this one compiles if `freeze`."""
    import torch._inductor.config as config
    from torch._dynamo.convert_frame import compile_lock

    # Until torch 2.13 or so, the setting is that of every thread.
    with compile_lock, config.patch(freezing=freeze):
        _TURN.is_taken = True
        try:
            yield
        finally:
            _TURN.is_taken = False


@contextmanager
def _watch_memory() -> Iterator[list[int | None]]:
    """Yields a list that at the end has the peak and the rest of the growth of resident memory; None if unknown."""
    growth: list[int | None] = []
    before = _resident_bytes()
    if before is None:
        yield growth
        growth += [None, None]
        return
    samples, ended = [before], threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            samples.append(_resident_bytes() or 0)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield growth
    finally:
        ended.set()
        thread.join()
    after = _resident_bytes() or before
    growth += [max(*samples, after) - before, max(after - before, 0)]


def _resident_bytes() -> int | None:
    """The resident memory of the process, as Linux tells it; None elsewhere."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
