"""A driver for triton that launches nothing: the host's work of every launch, without a GPU.

    stub = stub_driver.install()   # before the first launch, in a process without TRITON_INTERPRET
    stub.counts                    # launches by kernel
    stub.records = []              # from here on every launch is recorded

Kernels compile for sm_90, tensors stay on the CPU, and outputs remain uninitialised: only counts and host times mean
anything. clipkernels takes its kernels for CPU tensors, and no check reads their values, as on a GPU.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Launched(NamedTuple):
    """One launch: the kernel's name, the signature that it was compiled for, and all arguments of the launcher."""

    kernel: str
    signature: dict[Any, str]
    attributes: Any
    arguments: tuple[Any, ...]


class _Utilities:
    """What a driver tells of its device and its binaries."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        handles = (1, 1, 32, 0, 1024)
        return handles if hasattr(triton, "knobs") else handles[:4]  # before 3.4 without the number of threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    def unload_module(self, module: int) -> None:
        pass


class StubDriver:
    """The driver of one H200, or of as many as `device` numbers.

    counts: the launches of each kernel.
    records: the launches in order, or None if they are not recorded, because a record keeps its tensors.
    """

    binary_ext = "cubin"

    def __init__(self) -> None:
        self.utils = _Utilities()
        self.device = 0
        self.counts: Counter[str] = Counter()
        self.records: list[Launched] | None = None
        self.target = GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """The launcher of a compiled kernel, which counts and calls the hooks among its arguments."""
        name, attributes = source.fn.__name__, getattr(source, "attrs", None)

        def launch(*arguments: Any) -> None:
            metadata, enter, leave = arguments[6:9]
            if enter is not None:
                enter(metadata)
            self.counts[name] += 1
            if self.records is not None:
                self.records.append(Launched(name, source.signature, attributes, arguments))
            if leave is not None:
                leave(metadata)

        return launch


def install() -> StubDriver:
    """Make triton launch nothing and clipkernels take its kernels, for the rest of the process."""
    from clipkernels import arguments, backend
    from clipkernels.ops import affinity, merge

    stub = StubDriver()
    driver.set_active(stub)
    os.environ["CLIPKERNELS_BACKEND"] = "triton"
    backend._obstacle = lambda device: None
    for module in (arguments, affinity, merge):
        module.values_are_readable = lambda *tensors: False
    return stub
