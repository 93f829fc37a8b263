"""Comparison of an operation's results with fp64, for `check` and bench/."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipkernels.testing.budget import budget
from clipkernels.testing.cases import Case
from clipkernels.testing.inputs import InputFactory, Shape

# The error that plain PyTorch may have, in units of eps(dtype)·‖result‖∞.
REFERENCE_EPS = 16


class Verdict(NamedTuple):
    """The worst result of an operation: its error, the allowed error, the reference's error, and a fault or None."""

    error: float
    allowed: float
    reference_error: float
    fault: str | None


def is_checkable(op: str, shape: Shape) -> bool:
    """Return true if `check_against_fp64` can check an operation at a shape."""
    # Matching is compared exactly, and its similarities are exact at a head width of 64 only.
    return op != "match_tokens" or shape.width == 64 * shape.heads


def check_against_fp64(
    case: Case, factory: InputFactory, inputs: tuple[Tensor, ...], results: list[Tensor], backend: str
) -> Verdict:
    """Compare results with fp64: indices exactly with the reference's, values within the error budget.

    The budget follows from the reference's error. The reference itself may have an error of `REFERENCE_EPS` units.

    Args:
        case: the case that ran.
        factory: the factory of its inputs.
        inputs: its flat inputs.
        results: its results, from `flat`.
        backend: the backend that it ran on.
    """
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    exact_results = flat(case.call(factory, "reference", *wide))
    eager_results = flat(case.call(factory, "reference", *inputs))
    worst = Verdict(0.0, 0.0, 0.0, None)
    for number, (result, exact, eager) in enumerate(zip(results, exact_results, eager_results, strict=True)):
        if not result.is_floating_point():
            if not torch.equal(result, eager):
                return worst._replace(fault=f"choice {number} differs from the reference's")
            continue
        if result.shape != exact.shape:
            expected = tuple(exact.shape)
            return worst._replace(fault=f"result {number} must have the shape {expected}, got {tuple(result.shape)}")
        reference_error = _error(eager, exact)
        if backend == "reference":
            scale = float(exact.abs().max()) if exact.numel() else 0.0
            allowed = REFERENCE_EPS * torch.finfo(factory.dtype).eps * scale
        else:
            allowed = budget(result, exact, eager)
        error = _error(result, exact)
        if not error <= allowed:
            fault = f"result {number} is off by {error:.1e}, {allowed:.1e} allowed"
            return Verdict(error, allowed, reference_error, fault)
        if worst.allowed == 0 or error / allowed > worst.error / worst.allowed:
            worst = Verdict(error, allowed, reference_error, None)
    return worst


def flat(result: Any) -> list[Tensor]:
    """Return the tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result if part is not None for tensor in flat(part)]


def _error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).abs().max()) if exact.numel() else 0.0
