"""Launches of a kernel after the first, without what triton repeats for each of them.

`JITFunction.run` binds, specializes and looks up every argument of every launch: 15 µs of Python and more, where the
kernel of a small batch takes two. A `Launch` is all of a launch but its tensors. Its first call goes through triton; it
keeps the compiled kernel, by device and by the dtypes of the tensors, and later calls hand the tensors to that.

A launcher makes its launches in functions under `makes_launches`. Their arguments are the sizes, strides and flags that
decide the grid, the numbers and the constants. A call goes through triton again

    if a tensor does not begin at a multiple of 16 bytes, because compiled kernels load 16 bytes at once
    if triton's own cache no longer has the compiled kernel
    if triton debugs, inspects its stages, or has a hook of this kernel or of all launches
    on AMD, whose kernels also depend on the sizes of storages
    under a version of triton outside `TRIED`, because calling a compiled kernel is private to triton
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, cast

import torch
import triton
from torch import Tensor
from triton.runtime import driver

# The first and the last version of triton that was tried.
TRIED = ((3, 6), (3, 9))
ALIGNMENT = 16
Maker = TypeVar("Maker", bound=Callable[..., Any])
_MAKERS: list[Any] = []


class CompiledKernel(NamedTuple):
    """A compiled kernel, its key in triton's cache, its launcher, and the arguments before and after the tensors."""

    kernel: Any
    key: str
    run: Any
    handles: tuple[Any, ...]
    after: tuple[Any, ...]


class Launch:
    """A kernel, its grid, its numbers and its constants. Calling it with the tensors launches the kernel.

    Args:
        kernel: its parameters are pointers, then numbers, then constants.
        grid: number of programs along each of one to three axes.
        numbers: ints and floats, in the order of the kernel's parameters.
        constants: the other parameters, and the options of the compiler.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: float, **constants: Any) -> None:
        self.kernel, self.numbers, self.constants = kernel, numbers, {"enable_fp_fusion": True, **constants}
        self.grid = (*grid, 1, 1)[:3]
        self._compiled: dict[tuple[Any, ...], CompiledKernel] = {}

    def __call__(self, *tensors: Tensor) -> None:
        """Launch the kernel on the device of the first tensor, in its current stream."""
        if not self._compiled:
            return self._run(tensors)
        active, device = driver.active, tensors[0].get_device()
        current = active.get_current_device()
        if device != current and device >= 0:
            with torch.cuda.device(device):
                return self(*tensors)
        pointers, signature = 0, [current]
        for tensor in tensors:
            pointers |= tensor.data_ptr()
            signature.append(tensor.dtype)
        compiled = self._compiled.get(tuple(signature))
        if compiled is None or pointers % ALIGNMENT or not _is_current(self.kernel, compiled, current):
            return self._run(tensors)
        stream = active.get_current_stream(current)
        compiled.run(*self.grid, stream, *compiled.handles, *tensors, *compiled.after)
        return None

    def _run(self, tensors: tuple[Tensor, ...]) -> None:
        """Launch the kernel through triton, and keep the compiled kernel if later calls may use it."""
        with torch.cuda.device_of(tensors[0]):
            kernel = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
            if kernel is None or not _is_tried() or any(tensor.data_ptr() % ALIGNMENT for tensor in tensors):
                return
            if driver.active.get_current_target().backend != "cuda":
                return
            current = driver.active.get_current_device()
        cache = self.kernel.device_caches[current][0]
        key = next((key for key, cached in cache.items() if cached is kernel), None)
        if key is not None:
            constants = self.kernel.arg_names[len(tensors) + len(self.numbers) :]
            # A launch's metadata and its two hooks are None: a call with hooks goes through triton.
            handles = (kernel.function, kernel.packed_metadata, None, None, None)
            after = (*self.numbers, *(self.constants[name] for name in constants))
            signature = (current, *(tensor.dtype for tensor in tensors))
            self._compiled[signature] = CompiledKernel(kernel, key, kernel.run, handles, after)


def _is_tried() -> bool:
    """Return true if compiled kernels of this triton are called as above."""
    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    return TRIED[0] <= version <= TRIED[1]


def _is_current(kernel: Any, compiled: CompiledKernel, device: int) -> bool:
    """Return true if triton would run this compiled kernel and nothing else."""
    caches, runtime = kernel.device_caches.get(device), triton.knobs.runtime
    return (
        caches is not None
        and caches[0].get(compiled.key) is compiled.kernel
        and not (
            kernel.pre_run_hooks
            or runtime.debug
            or getattr(runtime, "add_stages_inspection_hook", None)
            or runtime.launch_enter_hook.calls
            or runtime.launch_exit_hook.calls
        )
    )


def makes_launches(function: Maker) -> Maker:
    """Decorate a function that makes launches of its arguments: each is made once, until `forget_launches`."""
    maker = lru_cache(maxsize=1024)(function)
    _MAKERS.append(maker)
    return cast(Maker, maker)


def forget_launches() -> None:
    """Make launchers read their configurations again."""
    for maker in _MAKERS:
        maker.cache_clear()
