"""Print, as JSON, what launches of a kernel do under a driver that launches nothing. Run without TRITON_INTERPRET.

Each observation is a list with an entry per launch: true if the launch went through triton's own `JITFunction.run`.
"""

import json
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from bench import stub_driver
from clipkernels.kernels import epilogue, launch

STUB = stub_driver.install()
WIDTH = 64
through_triton: list[bool] = []


def count_runs() -> None:
    """Let every launch by `JITFunction.run` note itself."""
    run = triton.JITFunction.run

    def counted(*arguments: Any, **options: Any) -> Any:
        through_triton.append(True)
        return run(*arguments, **options)

    triton.JITFunction.run = counted


def call(dtype: torch.dtype = torch.bfloat16, norm_dtype: torch.dtype | None = None, offset: int = 0) -> Any:
    """Launch `add_norm` on new tensors; `offset` moves the branch from a multiple of 16 bytes. Return the launch."""
    x, y = torch.zeros(2, 5, WIDTH, dtype=dtype), torch.zeros(10 * WIDTH + offset, dtype=dtype)[offset:].view(2, 5, -1)
    vector = torch.zeros(WIDTH, dtype=norm_dtype or dtype)
    through_triton.clear()
    STUB.records = []
    epilogue.add_norm(x, y, None, None, (vector, vector, 1e-5))
    return STUB.records[-1]


def direct() -> bool:
    """Launch `add_norm`; true if it did not go through triton."""
    call()
    return not through_triton


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Any:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def observe() -> dict[str, Any]:
    kernel: Any = epilogue._add_norm_kernel
    seen: dict[str, Any] = {"version": triton.__version__}
    first = call()
    seen["first"] = bool(through_triton)
    again = call()
    seen["again"] = bool(through_triton)
    # Grid, stream and handles, then tensors, then numbers and constants; hooks and their metadata are None or empty.
    pointers = [isinstance(argument, torch.Tensor) for argument in first.arguments]
    seen["alike"] = [
        (first.kernel, first.signature) == (again.kernel, again.signature),
        pointers == [isinstance(argument, torch.Tensor) for argument in again.arguments],
        all(
            one == other
            for place, (one, other) in enumerate(zip(first.arguments, again.arguments, strict=True))
            if not pointers[place] and place not in (6, 7, 8)
        ),
    ]

    wide = call(torch.float32)
    seen["other dtype"] = [bool(through_triton), wide.signature["x_ptr"], call().signature["x_ptr"], direct()]
    wide = call(norm_dtype=torch.float32)
    seen["other dtype of a norm"] = [bool(through_triton), wide.signature["weight_ptr"], call().signature["weight_ptr"]]

    unaligned = call(offset=1)
    seen["unaligned"] = [bool(through_triton), unaligned.attributes != again.attributes, direct()]

    STUB.device = 1
    call()
    other = [bool(through_triton), direct()]
    STUB.device = 0
    seen["other device"] = [*other, direct()]
    seen["tensors on another device"] = elsewhere(kernel)

    if hasattr(kernel, "device_caches"):
        kernel.device_caches.clear()
        seen["cleared"] = [not direct(), direct()]
        entered: list[Any] = []
        hooks = triton.knobs.runtime.launch_enter_hook
        hooks.add(entered.append)
        call()
        call()
        hooks.remove(entered.append)
        seen["hooks"] = [len(entered), [entry.get()["name"] for entry in entered], direct()]
        with changed(kernel, "pre_run_hooks", [lambda *arguments, **options: entered.clear()]):
            call()
        seen["kernel hook"] = [len(entered), direct()]
        with changed(triton.knobs.runtime, "debug", True):
            seen["debug"] = [direct(), direct()]
    for name, owner, attribute, value in (
        ("untried", launch, "TRIED", ((0, 0), (0, 1))),
        ("amd", STUB, "target", GPUTarget("hip", "gfx942", 64)),
    ):
        epilogue._add_norm_launch.cache_clear()
        call()
        epilogue._add_norm_launch.cache_clear()
        with changed(owner, attribute, value):
            seen[name] = [direct(), direct()] if hasattr(kernel, "device_caches") else [False, False]
    return seen


def elsewhere(kernel: Any) -> Any:
    """Launch on tensors of device 1 while device 0 is current: the devices of the launches, and the current one."""

    class Elsewhere(torch.Tensor):
        def get_device(self) -> int:
            return 1

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            self.before, STUB.device = STUB.device, self.index

        def __exit__(self, *exception: Any) -> None:
            STUB.device = self.before

    tensors = [torch.zeros(2, 5, WIDTH, dtype=torch.bfloat16).as_subclass(Elsewhere) for _ in range(8)]
    made: Callable[..., None] = epilogue._add_norm_launch(10 * WIDTH, WIDTH, False, False, True, 1e-5)
    devices: list[int] = []
    stream = STUB.get_current_stream
    with (
        changed(torch.cuda, "device", Device),
        changed(torch.cuda, "device_of", lambda tensor: Device(tensor.get_device())),
        changed(STUB, "get_current_stream", lambda device: devices.append(device) or stream(device)),
    ):
        made(*tensors)
        made(*tensors)
    return [devices, STUB.device]


if __name__ == "__main__":
    count_runs()
    print(json.dumps(observe()))
