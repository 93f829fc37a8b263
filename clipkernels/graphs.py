"""CUDA graphs of an image tower for fixed batch sizes: graphed, ungraphed.

A graph starts all kernels of a forward with one call, so that Python's time per kernel no longer counts. It repeats the
capture exactly: same kernels, same addresses. So every call first checks that the tower is as it was captured.

    images ─copy─► static input ─replay─► static output ─copy─► output
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from clipkernels import adapters, cuda_graph
from clipkernels.arguments import check_flags, check_model, describe
from clipkernels.layered_class import add_server, remove_server
from clipkernels.messages import first_line, join_sizes, list_items
from clipkernels.slot import WeakModule
from clipkernels.snapshot import COMPILATION, GRAPHS, RANKS, Snapshot, is_plain_call
from clipkernels.verify import refuse_replaced

Model = TypeVar("Model", bound=nn.Module)


def graphed(model: Model, batch_sizes: Iterable[int] = (1, 8, 32), pad: bool = True) -> Model:
    """Run a model's image tower from CUDA graphs, in place, and return the model. Calling it again replaces the graphs.

    The tower may be patched or not; a compilation by `ck.compile` is undone. One graph is captured for each batch size,
    at once in eval mode, otherwise at the first call in eval mode. All share one pool of memory. They are captured
    again, at the next call that needs them, after `ck.patch`, `ck.unpatch`, `load_state_dict(assign=True)`, `.to()` or
    another change of the modules, of the numbers, texts and containers among their attributes, or of the addresses of
    weights. Weights that change in place need no new capture.

    A graph serves a call of the tower, such as the model's own `encode_image` or `get_image_features`, with images
    alone, of the tower's size, dtype and device. Every other call runs without graphs: in training mode; if a
    gradient is needed (so call under `torch.inference_mode()` or `torch.no_grad()`); under autocast, a compiler, a
    tracer or another capture; with a hook on any module of the tower; by `ck.encode_image`, which composes the forward
    itself.

    The output is a copy. Calls from several threads or streams run one after the other. A deep copy and a pickle of the
    model are graphed too, and capture at their first calls. On a device without CUDA graphs the model is returned
    unchanged, with a warning. If a later capture fails, a warning gives the reason, and the tower runs without graphs
    until it changes.

    Args:
        model: a model that `ck.patch` takes.
        batch_sizes: the batch sizes to capture.
        pad: run other batch sizes with the graph of the next larger one; if false, or for batches larger than all,
            run them without graphs.
    Raises:
        UnsupportedTower: the tower is not supported.
        ValueError: `batch_sizes` are not positive ints.
        RuntimeError: the tower's forward cannot be captured.
        On any error the model is left unchanged.
    """
    sizes = check_batch_sizes(batch_sizes)
    check_flags(pad=pad)
    tower = adapters.find_tower(model)
    refuse_replaced(tower)
    if not cuda_graph.is_available(tower.like.device):
        warnings.warn(
            f"CUDA graphs need a model on a CUDA or ROCm device, got {tower.like.device.type}: the model is unchanged",
            stacklevel=2,
        )
        return model
    root, previous = tower.root, vars(tower.root).get(GRAPHS)
    compilation = remove_server(root, COMPILATION)
    graphs = Graphs(sizes, pad, WeakModule(root))
    try:
        add_server(root, RANKS[GRAPHS], GRAPHS, graphs)
        graphs.capture_all(root)
    except BaseException as error:
        _uninstall(root)
        for slot, server in ((GRAPHS, previous), (COMPILATION, compilation)):
            if server is not None:
                add_server(root, RANKS[slot], slot, server)
        if isinstance(error, Exception):
            raise RuntimeError(f"a CUDA graph cannot capture the tower: {_reason(error)}") from error
        raise
    if previous is not None:
        previous.drop()
    return model


def ungraphed(model: Model) -> Model:
    """Undo `graphed`, and return the model. A model without graphs is left unchanged.

    Raises:
        TypeError: the model is no module.
    """
    check_model(model)
    for module in model.modules():
        _uninstall(module)
    return model


def check_batch_sizes(batch_sizes: Iterable[int]) -> tuple[int, ...]:
    """Batch sizes in ascending order. Raise ValueError unless they are positive ints, at least one."""
    countable = isinstance(batch_sizes, Iterable) and not isinstance(batch_sizes, (str, bytes, Mapping, Tensor))
    sizes = tuple(batch_sizes) if countable else ()
    if not sizes or not all(type(size) is int and size > 0 for size in sizes):
        actual = f"({list_items(map(describe, sizes))})" if countable else describe(batch_sizes)
        raise ValueError(f"batch_sizes must be positive ints such as (1, 8, 32), got {actual}")
    return tuple(sorted(set(sizes)))


def _uninstall(module: nn.Module) -> None:
    """Remove and free the graphs of a module, if it has any."""
    graphs = remove_server(module, GRAPHS)
    if graphs is not None:
        graphs.drop()


class Capture(NamedTuple):
    """A captured forward of one batch size.

    inputs: the static images (b,3,S,S).
    replay: writes the static outputs.
    leaves: the static outputs, tensors whose first axis is the batch, and other values.
    structure: the structure of the host's own output, made of the leaves.
    """

    inputs: Tensor
    replay: Callable[[], None]
    leaves: Sequence[Any]
    structure: Any

    def start(self, images: Tensor) -> None:
        """Start the forward of at most b images."""
        batch = images.shape[0]
        (self.inputs if batch == self.inputs.shape[0] else self.inputs[:batch]).copy_(images)
        self.replay()

    def output(self, batch: int) -> Any:
        """The host's output for the first images, as copies."""
        copies = [leaf[:batch].clone() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return _pytree.tree_unflatten(copies, self.structure)


def _reason(error: BaseException) -> str:
    """The reason of a failed capture, in one line."""
    # Ending a capture that failed raises a second error.
    return first_line(error.__context__ or error)


class Graphs:
    """The graphs of a tower, in the `__dict__` of its root.

    Args:
        batch_sizes: the batch sizes to capture, in ascending order.
        pad: serve other batch sizes with the next larger graph.
        root: the tower's root.
    """

    def __init__(self, batch_sizes: tuple[int, ...], pad: bool, root: WeakModule) -> None:
        self.batch_sizes, self.pad, self.root = batch_sizes, pad, root
        self.lock = threading.RLock()
        self.captures: dict[int, Capture] = {}
        self.snapshot: Snapshot | None = None
        self.recorder: cuda_graph.Recorder | None = None
        self.inputs: Tensor | None = None
        self.capturing = self.failed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.batch_sizes, self.pad, self.root)

    def __repr__(self) -> str:
        return f"CUDA graphs of batch sizes {join_sizes(self.batch_sizes)}{'' if self.pad else ', without padding'}"

    def call(self, root: nn.Module, base: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The output of a root whose class without graphs is `base`, from a graph if one serves the call."""
        eager = partial(base.__call__, root)
        images = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if images is None or self.root.ref() is not root or not _may_replay(images):
            return eager(*args, **kwargs)
        size = self._size_for(images)
        if size is None:
            return eager(*args, **kwargs)
        with self.lock:
            if self.capturing:  # a class that others derived since may have the layer twice
                return eager(*args, **kwargs)
            output = self._replay(size, root, images, args, kwargs)
            if output is None and self._prepare(size, root, eager, args, kwargs):
                output = self._replay(size, root, images, args, kwargs)
        return eager(*args, **kwargs) if output is None else output

    def capture_all(self, root: nn.Module) -> None:
        """Capture every batch size, unless the tower's forward cannot be repeated now."""
        below: Any = super(type(root), root)
        with self.lock, torch.no_grad():
            snapshot = self._current_snapshot(root)
            for size in reversed(self.batch_sizes) if snapshot.is_idle(root) else ():
                self._capture(size, root, below.__call__, snapshot)  # the largest first: others use its memory again

    def drop(self) -> None:
        """Free all graphs. The next call captures again."""
        with self.lock:
            if self.recorder is not None:
                self.recorder.wait()
            self.captures.clear()
            self.snapshot = self.recorder = self.inputs = None
            self.failed = False

    def _replay(
        self, size: int, root: nn.Module, images: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The output of a call from the graph of a batch size; None if it cannot serve the call or is out of date."""
        snapshot, capture = self.snapshot, self.captures.get(size)
        if snapshot is None or capture is None or self.recorder is None or not snapshot.serves(root, args, kwargs):
            return None
        with self.recorder.in_turn():
            # The device works during the check. A graph that is out of date reads weights that the snapshot keeps.
            capture.start(images)
            return capture.output(images.shape[0]) if snapshot.is_current(root) else None

    def _prepare(
        self, size: int, root: nn.Module, eager: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> bool:
        """Capture the tower as it is, if a graph can serve the call; return true if that is done."""
        snapshot = self._current_snapshot(root)
        if self.failed or size in self.captures or not snapshot.serves(root, args, kwargs):
            return False
        try:
            self._capture(size, root, eager, snapshot)
        except Exception as error:  # of the tower or of the device
            self.failed = True
            warnings.warn(f"the tower runs without CUDA graphs, because {_reason(error)}", stacklevel=4)
        return not self.failed

    def _size_for(self, images: Tensor) -> int | None:
        """The batch size of the graph for images, or None."""
        batch = images.shape[0] if images.ndim == 4 else 0
        sizes = (size for size in self.batch_sizes if size == batch or (self.pad and size > batch))
        return next(sizes, None) if batch else None

    def _current_snapshot(self, root: nn.Module) -> Snapshot:
        """The tower's state. If it has changed, the graphs are dropped."""
        if self.snapshot is None or not self.snapshot.is_current(root):
            self.drop()
            self.snapshot = Snapshot(adapters.find_tower(root))
        return self.snapshot

    def _capture(self, size: int, root: nn.Module, eager: Callable[..., Any], snapshot: Snapshot) -> None:
        """Capture a batch size."""
        if self.recorder is None or self.inputs is None:
            self.recorder = cuda_graph.Recorder(snapshot.device)
            with torch.inference_mode(False):
                self.inputs = torch.zeros(
                    self.batch_sizes[-1], *snapshot.shape, dtype=snapshot.dtype, device=snapshot.device
                )
        inputs = self.inputs[:size]
        self.capturing = True
        try:
            replay, output = self.recorder.capture(partial(eager, inputs))
        finally:
            self.capturing = False
        snapshot.remember_constants(root)
        self.captures[size] = Capture(inputs, replay, *_pytree.tree_flatten(output))


def _may_replay(images: Tensor) -> bool:
    """Return true if nothing around a call needs the forward itself: a tracer, a transform, autocast, a capture."""
    return cuda_graph.is_available(images.device) and is_plain_call(images) and not cuda_graph.is_capturing()
