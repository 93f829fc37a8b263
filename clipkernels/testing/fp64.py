"""Comparison of an operation's results with fp64, for `check` and the benches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipkernels.testing.budget import budget
from clipkernels.testing.cases import Case
from clipkernels.testing.inputs import InputFactory, Shape

# Units of eps(dtype)·‖f‖∞ that plain PyTorch may be off.
REFERENCE_EPS = 16


class Verdict(NamedTuple):
    """The worst of an operation's results: its error, the error it may have, the reference's own, and what is wrong."""

    error: float
    allowed: float
    eager: float
    wrong: str | None


def is_checkable(op: str, shape: Shape) -> bool:
    """Whether `judge` can tell: matching is compared by similarities that are exact at a head width of 64 alone."""
    return op != "match_tokens" or shape.width == 64 * shape.heads


def check_against_fp64(
    case: Case, source: InputFactory, inputs: tuple[Tensor, ...], came: list[Tensor], backend: str
) -> Verdict:
    """Compares results with fp64: choices exactly with the reference's, values within the error budget.

    The reference itself, which the budget is made from, may be off by `PLAIN` units of its dtype.

    Args:
        case: what was called.
        source: of the inputs.
        inputs: that it was called with.
        came: its results, from `flat`.
        backend: that it ran on.
    """
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    exact = flat(case.call(source, "reference", *wide))
    plain = flat(case.call(source, "reference", *inputs))
    worst = Verdict(0.0, 0.0, 0.0, None)
    for place, (result, right, eager) in enumerate(zip(came, exact, plain, strict=True)):
        if not result.is_floating_point():
            if not torch.equal(result, eager):
                return worst._replace(wrong=f"choice {place} differs from the reference's")
            continue
        if result.shape != right.shape:
            return worst._replace(wrong=f"result {place} is {tuple(result.shape)} instead of {tuple(right.shape)}")
        own = _error(eager, right)
        if backend == "reference":
            allowed = REFERENCE_EPS * torch.finfo(source.dtype).eps * float(right.abs().max()) if right.numel() else 0.0
        else:
            allowed = budget(result, right, eager)
        error = _error(result, right)
        if not error <= allowed:
            return Verdict(error, allowed, own, f"result {place} is off by {error:.1e}, {allowed:.1e} allowed")
        if worst.allowed == 0 or error / allowed > worst.error / worst.allowed:
            worst = Verdict(error, allowed, own, None)
    return worst


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result if part is not None for tensor in flat(part)]


def _error(came: Tensor, exact: Tensor) -> float:
    return float((came.double() - exact).abs().max()) if exact.numel() else 0.0
