"""Tools to test kernels: error budgets, guarded allocations and views with gaps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clipkernels.backend import interpreting


def budget(actual: Tensor, exact: Tensor, eager: Tensor) -> float:
    """Return the largest error that a result may have: 2‖eager - exact‖∞ + eps·‖exact‖∞.

    Args:
        actual: the tested result, in its own dtype, which sets eps.
        exact: the fp64 result.
        eager: the result of plain PyTorch for the same inputs in the tested dtype.
    """
    # The interpreter's bf16 store truncates instead of rounding.
    steps = 2 if actual.dtype == torch.bfloat16 and interpreting() else 1
    if not exact.numel():
        return 0.0
    return float(2 * (eager.double() - exact).abs().max() + steps * torch.finfo(actual.dtype).eps * exact.abs().max())


def assert_within_budget(actual: Tensor, exact: Tensor, eager: Tensor) -> None:
    """Assert that ‖actual - exact‖∞ is at most the `budget` of the same arguments.

    Raises:
        AssertionError: the shapes differ, or the error is larger; the message names the error and the budget.
    """
    assert actual.shape == exact.shape, f"expected shape {tuple(exact.shape)}, got {tuple(actual.shape)}"
    if not actual.numel():
        return
    allowed = budget(actual, exact, eager)
    error = (actual.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.3e} is above the budget {allowed:.3e}"


def assert_same(actual: Tensor, expected: Tensor, backend: str) -> None:
    """Fail unless two results are the same: bit for bit on the triton backend, to rounding on the reference.

    A GEMM library may round by the batch and by the place of a row, and `index_add_` on a GPU adds in any order.

    Raises:
        AssertionError: with the greatest difference.
    """
    tolerance = 0.0 if backend == "triton" else None
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


class GuardedAllocations(TorchFunctionMode):
    """A context in which new uninitialised tensors contain NaN (or the largest integer) and lie between guards.

    A row that a kernel does not write then shows as NaN. Leaving the context checks the guards, which reveals a store
    out of bounds.

    Raises:
        AssertionError: a kernel stored outside of its output.
    """

    GUARD = 64

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[Tensor, int]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.empty, torch.empty_like, Tensor.new_empty) or not result.is_contiguous():
            return result
        if result.dtype == torch.bool:  # no value of it could reveal a store
            return result
        size = result.numel()
        poison = float("nan") if result.is_floating_point() else torch.iinfo(result.dtype).max
        buffer = torch.full((size + 2 * self.GUARD,), poison, dtype=result.dtype, device=result.device)
        self.buffers.append((buffer, size))
        return buffer[self.GUARD : self.GUARD + size].view(result.shape)

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for buffer, size in self.buffers:
            guards = torch.cat([buffer[: self.GUARD], buffer[self.GUARD + size :]])
            intact = guards.isnan() if guards.is_floating_point() else guards == torch.iinfo(guards.dtype).max
            assert intact.all(), f"a kernel stored outside of its output of {size} elements of {buffer.dtype}"


@contextmanager
def exact_interpreter_dot() -> Iterator[None]:
    """Return a context in which Triton's interpreter sums matrix products in fp64."""
    # NumPy's fp32 products round differently by CPU. On some CPUs the rounding of a row also depends on its position in
    # the block, which is true of no GPU.
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
    """Return a non-contiguous view with the values of x and NaN in the gaps of its last two axes."""
    shape = (*x.shape[:-2], 2 * x.shape[-2], x.shape[-1] + 3)
    wide = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    view = wide[..., ::2, 1:-2]
    view.copy_(x)
    return view
