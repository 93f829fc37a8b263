"""The fastest way to run an image tower on its device, by one verb and in place: compile, uncompile, compilation_of.

    a CPU: torch.compile with frozen weights      a GPU: CUDA graphs, or torch.compile in a mode of its own

A compiled tower repeats the modules, settings and, if frozen, the weights that it was compiled with. So every call
first checks that they are still the tower's, and compiles again if they are not.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from clipkernels import adapters, cuda_graph
from clipkernels.arguments import check_choice, check_flags, check_int, check_model
from clipkernels.freezing import CompiledForward, Cost, Mode
from clipkernels.graphs import check_batch_sizes, graphed, ungraphed
from clipkernels.layered_class import add_server, remove_server
from clipkernels.messages import first_line, join_sizes
from clipkernels.slot import WeakModule
from clipkernels.snapshot import COMPILATION, RANKS, Snapshot, is_plain_call
from clipkernels.verify import refuse_replaced

Model = TypeVar("Model", bound=nn.Module)
GRAPHED_SIZES = (1, 8, 32)
INFERENCE_WEIGHTS = (
    "frozen weights must count their changes, got weights made under torch.inference_mode: make the model outside of it"
)
ANY_SIZE = 0
"""The batch size, among those of a compilation, that stands for all from 2."""


def compile(
    model: Model,
    freeze: bool | None = None,
    *,
    mode: Mode | None = None,
    batch_sizes: Iterable[int] | None = None,
    dynamic: bool = False,
    max_sizes: int = 4,
    pad: bool = True,
) -> Model:
    """Make a model's image tower fast on its device, in place, and return the model. Calling it again starts anew.

    On a CPU the tower runs under `torch.compile` with its weights frozen: they are constants of the graph, which
    Inductor packs once, where an eager product in bfloat16 packs them in every call. On a CUDA or ROCm device it runs
    from CUDA graphs, by `ck.graphed`, unless `freeze`, `mode` or `dynamic` asks for `torch.compile`. The tower may be
    patched or not.

    Compiling takes from seconds to minutes per batch size, and each has its own copy of packed weights.
    `ck.compilation_of` gives seconds and memory, and so does the representation of the tower. A tower is compiled
    again, at the next call, after `ck.patch`, `ck.unpatch`, `.to()` or another change of the modules, of their
    attributes or of the number of threads; if frozen, also after a change of a weight, in place or not, such as by
    `load_state_dict` or an optimiser. A write through `.data` goes unnoticed: compile again after it.

    A call is served if it is one of the tower, such as the model's own `encode_image` or `get_image_features`, with
    images alone, of the tower's size, dtype and device. Every other call runs as before: in training mode; if a
    gradient is needed (so call under `torch.inference_mode()` or `torch.no_grad()`); under autocast, a compiler or a
    tracer; with a hook on any module of the tower; by `ck.encode_image`, which composes the forward itself.

    Other models and other threads are not frozen. A deep copy and a pickle of the model are compiled too, at their
    first calls. If compiling fails at a call, a warning gives the reason, and the tower runs as before until it
    changes.

    Args:
        model: a model that `ck.patch` takes.
        freeze: freeze the weights; None does so on a CPU.
        mode: a mode of `torch.compile`; None is "default", or CUDA graphs on a GPU.
        batch_sizes: the batch sizes to compile, at once in eval mode, otherwise at the first call in eval mode. None
            compiles each size at its first call, up to `max_sizes` of them.
        dynamic: compile for any batch size, in two graphs: of one image, and of more.
        max_sizes: the number of batch sizes to compile if `batch_sizes` is None.
        pad: fill up batches of other sizes to the next larger size that is compiled; if false, or if they are larger
            than all, they run as before.
    Raises:
        UnsupportedTower: the tower is not supported.
        ValueError: an argument is out of range, or weights are inference tensors, whose changes nothing counts.
        RuntimeError: the tower cannot be compiled.
        On any error the model is left unchanged.
    """
    check_choice("mode", mode, None, *get_args(Mode))
    check_flags(dynamic=dynamic, pad=pad)
    if freeze is not None:
        check_flags(freeze=freeze)
    check_int("max_sizes", max_sizes, 1)
    sizes = None if batch_sizes is None else check_batch_sizes(batch_sizes)
    if dynamic and sizes is not None:
        raise ValueError(f"batch_sizes must be None with dynamic=True, got ({join_sizes(sizes)})")
    tower = adapters.find_tower(model)
    refuse_replaced(tower)
    device = tower.like.device
    if cuda_graph.is_available(device) and not freeze and mode is None and not dynamic:
        graphed(model, GRAPHED_SIZES if sizes is None else sizes, pad)
        return model
    freeze = device.type == "cpu" if freeze is None else freeze
    root, previous = tower.root, vars(tower.root).get(COMPILATION)
    compilation = Compilation(freeze, mode or "default", sizes, dynamic, max_sizes, pad, WeakModule(root))
    try:
        add_server(root, RANKS[COMPILATION], COMPILATION, compilation)
        compilation.compile_all(root)
    except BaseException as error:
        remove_server(root, COMPILATION)
        if previous is not None:
            add_server(root, RANKS[COMPILATION], COMPILATION, previous)
        if isinstance(error, Exception) and not isinstance(error, ValueError):
            raise RuntimeError(f"torch.compile cannot compile the tower: {first_line(error)}") from error
        raise
    return ungraphed(model)


def uncompile(model: Model) -> Model:
    """Undo `compile`, and `graphed`, and return the model. A model that is neither is left unchanged.

    Raises:
        TypeError: the model is no module.
    """
    ungraphed(model)
    for module in model.modules():
        remove_server(module, COMPILATION)
    return model


def compilation_of(model: nn.Module) -> Compilation | None:
    """The compilation of a model's image tower by `torch.compile`, or None.

    Its `costs` give seconds and memory by batch size. CUDA graphs are none.
    """
    check_model(model)
    compilation: Compilation | None = vars(adapters.find_tower(model).root).get(COMPILATION)
    return compilation


class _State:
    """A tower as it was compiled, and its forwards by batch size."""

    def __init__(self, root: nn.Module, freeze: bool) -> None:
        self.snapshot = Snapshot(adapters.find_tower(root))
        self.weights = self.snapshot.tensors if freeze else []
        inference = any(map(Tensor.is_inference, self.weights))
        # The reason why nothing can be compiled, or None.
        self.obstacle = INFERENCE_WEIGHTS if inference else None
        self.weights = [] if inference else self.weights
        self.versions = list(map(attrgetter("_version"), self.weights))
        self.settings = _torch_settings()
        self.forwards: dict[int, CompiledForward] = {}

    def has_weights(self) -> bool:
        """Return true if no frozen weight has changed in place."""
        return list(map(attrgetter("_version"), self.weights)) == self.versions

    def is_current(self, root: nn.Module) -> bool:
        """Return true if the tower, its frozen weights and the settings of torch are those of the state."""
        return self.has_weights() and self.settings == _torch_settings() and self.snapshot.is_current(root)


class Compilation:
    """The compiled forwards of a tower, in the `__dict__` of its root.

    freeze: the weights are frozen.
    mode: the mode of `torch.compile`.
    batch_sizes: the batch sizes to compile, in ascending order, or None for those of the first calls.
    dynamic: every batch size from 2 has one forward.
    max_sizes: the number of batch sizes if `batch_sizes` is None.
    pad: serve other batch sizes with the next larger one.
    root: the tower's root.
    """

    def __init__(
        self,
        freeze: bool,
        mode: Mode,
        batch_sizes: tuple[int, ...] | None,
        dynamic: bool,
        max_sizes: int,
        pad: bool,
        root: WeakModule,
    ) -> None:
        self.freeze, self.mode, self.batch_sizes, self.dynamic = freeze, mode, batch_sizes, dynamic
        self.max_sizes, self.pad, self.root = max_sizes, pad, root
        self.lock = threading.RLock()
        self.state: _State | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        options = (self.freeze, self.mode, self.batch_sizes, self.dynamic, self.max_sizes, self.pad)
        return Compilation, (*options, self.root)

    def __repr__(self) -> str:
        costs = self.costs
        sizes = join_sizes("any" if size == ANY_SIZE else size for size in costs) or "none yet"
        verb = "frozen" if self.freeze else "compiled"
        mode = "" if self.mode == "default" else f", {self.mode}"
        peaks = [cost.peak_bytes for cost in costs.values() if cost.peak_bytes is not None]
        memory = f", {max(peaks) / 2**20:.0f} MiB" if peaks else ""
        cost = f" ({sum(cost.seconds for cost in costs.values()):.1f} s{memory})" if costs else ""
        return f"{verb} for batch sizes {sizes}{mode}{cost}"

    @property
    def costs(self) -> dict[int, Cost]:
        """The cost of each batch size that is compiled now; size 0 stands for all from 2."""
        forwards = {} if self.state is None else dict(self.state.forwards)
        return {size: forward.cost for size, forward in sorted(forwards.items()) if forward.cost is not None}

    def call(self, root: nn.Module, base: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The output of a root whose class without the compilation is `base`, compiled if that serves the call."""
        images = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if images is None or self.root.ref() is not root or not is_plain_call(images):
            return base.__call__(root, *args, **kwargs)
        state = self._current_state(root)
        size = self._size_for(images, state) if state.snapshot.serves(root, args, kwargs) else None
        output = None if size is None else self._run(size, root, base, images, state)
        return base.__call__(root, *args, **kwargs) if output is None else output

    def compile_all(self, root: nn.Module) -> None:
        """Compile `batch_sizes`, unless the tower trains or has a hook."""
        base = type(root).__mro__[1]
        with self.lock, torch.inference_mode(False), torch.no_grad():
            self.state = state = _State(root, self.freeze)
            if state.obstacle is not None:
                raise ValueError(state.obstacle)
            snapshot = state.snapshot
            for size in (self.batch_sizes or ()) if snapshot.is_idle(root) else ():
                images = torch.zeros(size, *snapshot.shape, dtype=snapshot.dtype, device=snapshot.device)
                self._compile(size, root, base, images, state)

    def drop(self) -> None:
        """Forget all forwards. The next call compiles again."""
        self.state = None

    def _current_state(self, root: nn.Module) -> _State:
        """The state of the tower. If it has changed, the forwards are dropped."""
        state = self.state
        if state is not None and state.is_current(root):
            return state
        with self.lock:
            state = self.state
            if state is None or not state.is_current(root):
                if state is not None and state.forwards and not state.has_weights():
                    warnings.warn("a frozen weight has changed in place: the tower is compiled again", stacklevel=4)
                self.state = None  # frees its forwards first
                self.state = state = _State(root, self.freeze)
                if state.obstacle is not None:
                    _warn_of_obstacle(state.obstacle)
        return state

    def _size_for(self, images: Tensor, state: _State) -> int | None:
        """The batch size of the forward for images, or None."""
        batch = images.shape[0]
        if not batch or state.obstacle is not None:
            return None
        if self.dynamic:
            return 1 if batch == 1 else ANY_SIZE
        sizes = self.batch_sizes or sorted(state.forwards)
        if batch in sizes or (self.batch_sizes is None and len(sizes) < self.max_sizes):
            return batch
        return next((size for size in sizes if size > batch), None) if self.pad else None

    def _run(self, size: int, root: nn.Module, base: Any, images: Tensor, state: _State) -> Any:
        """The output for images by the forward of a batch size; None if that cannot be compiled."""
        batch = images.shape[0]
        if batch < size:
            images = torch.cat([images, images[-1:].expand(size - batch, *images.shape[1:])])
        forward = state.forwards.get(size)
        if forward is not None:
            output = forward(images)
        else:
            try:
                output = self._compile(size, root, base, images, state)
            except Exception as error:  # of the tower, the compiler or the device
                state.obstacle = first_line(error)
                _warn_of_obstacle(state.obstacle)
                return None
        cut = batch < size
        return _pytree.tree_map_only(Tensor, lambda rows: rows[:batch], output) if cut else output

    def _compile(self, size: int, root: nn.Module, base: Any, images: Tensor, state: _State) -> Any:
        """Compile the forward of a batch size, unless another thread just has, and return the output for images."""
        with self.lock:
            forward = state.forwards.get(size)
            if forward is None:
                function = partial(base.__call__, root)
                forward = CompiledForward(function, freeze=self.freeze, mode=self.mode, dynamic=size == ANY_SIZE)
                output = forward(images)
                # A forward may have changed an attribute, such as a counter of its calls.
                state.snapshot.remember_constants(root)
                state.forwards = {**state.forwards, size: forward}
                return output
        return forward(images)


def _warn_of_obstacle(reason: str) -> None:
    """Warn that a compiled tower runs as before, and why."""
    warnings.warn(f"the tower runs without its compilation: {reason}", stacklevel=6)


def _torch_settings() -> tuple[Any, ...]:
    """The settings of torch that are fixed when a forward is compiled."""
    return torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
