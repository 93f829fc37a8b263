"""Error budgets, guarded allocations and views with gaps: the tools that kernels are tested with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clipkernels.backend import interpreting


def budget(came: Tensor, exact: Tensor, eager: Tensor) -> float:
    """The error that a result may have: 2‖eager - exact‖∞ + eps·‖exact‖∞.

    Args:
        came: what is tested, in its own dtype.
        exact: the same in fp64.
        eager: what plain PyTorch makes of the same inputs in the tested dtype.
    """
    # The interpreter's bf16 store truncates instead of rounding.
    steps = 2 if came.dtype == torch.bfloat16 and interpreting() else 1
    if not exact.numel():
        return 0.0
    return float(2 * (eager.double() - exact).abs().max() + steps * torch.finfo(came.dtype).eps * exact.abs().max())


def assert_within_budget(came: Tensor, exact: Tensor, eager: Tensor) -> None:
    """Fails unless ‖came - exact‖∞ is within the `budget` of the same arguments.

    Raises:
        AssertionError: with the error and the budget.
    """
    assert came.shape == exact.shape, f"expected shape {tuple(exact.shape)}, got {tuple(came.shape)}"
    if not came.numel():
        return
    allowed = budget(came, exact, eager)
    error = (came.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.3e} is above the budget {allowed:.3e}"


class GuardedAllocations(TorchFunctionMode):
    """Inside this context new uninitialised tensors hold NaN (or a large integer), between guards.

    Leaving it checks the guards, so that a row left unwritten shows as NaN and a store out of bounds as an error.

    Raises:
        AssertionError: something was stored outside of its tensor.
    """

    GUARD = 64

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[Tensor, int]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func not in (torch.empty, torch.empty_like, Tensor.new_empty) or not made.is_contiguous():
            return made
        size = made.numel()
        poison = float("nan") if made.is_floating_point() else torch.iinfo(made.dtype).max
        buffer = torch.full((size + 2 * self.GUARD,), poison, dtype=made.dtype, device=made.device)
        self.buffers.append((buffer, size))
        return buffer[self.GUARD : self.GUARD + size].view(made.shape)

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for buffer, size in self.buffers:
            around = torch.cat([buffer[: self.GUARD], buffer[self.GUARD + size :]])
            whole = around.isnan() if around.is_floating_point() else around == torch.iinfo(around.dtype).max
            assert whole.all(), f"a kernel stored outside of its output of {size} {buffer.dtype}"


@contextmanager
def exact_interpreter_dot() -> Iterator[None]:
    """Inside this context the interpreter sums products in fp64: NumPy's fp32 ones round by CPU, and on some a row
    otherwise where it stands elsewhere in a block, which no GPU does."""
    if not interpreting():
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    def dot(_: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        total = a.data.astype("float64") @ b.data.astype("float64") + acc.data
        return type(acc)(total.astype(acc.data.dtype), acc.dtype.scalar)

    with mock.patch.object(InterpreterBuilder, "create_dot", dot):
        yield


def with_gaps(x: Tensor) -> Tensor:
    """The same values as x with gaps of NaN between the rows of its last two axes: a non-contiguous view."""
    shape = (*x.shape[:-2], 2 * x.shape[-2], x.shape[-1] + 3)
    wide = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    view = wide[..., ::2, 1:-2]
    view.copy_(x)
    return view
