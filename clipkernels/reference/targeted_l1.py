"""The L1 distance of projected tokens to a teacher's, over selected tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from clipkernels.reference.cross_attention import DEVICE
from clipkernels.reference.precision import exactly, widened

# Numbers that the rows projected at once may be on a CPU: few beside a gradient, and faster for staying in cache.
HELD = 2**17


def targeted_l1(student: Tensor, teacher: Tensor, projection: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    with exactly(student):
        form = _whole if _traced() else _Chosen.apply
        return form(student, teacher, projection, weights, mask)


def _traced() -> bool:
    """Whether a graph is made, whose shapes cannot depend on the mask, or torch.func transforms what is called."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def _whole(student: Tensor, teacher: Tensor, projection: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    chosen, wide = mask[..., None], widened(projection)
    far = torch.where(chosen, student, 0.0).to(wide.dtype) @ wide.T - torch.where(chosen, teacher, 0.0).to(wide.dtype)
    return (torch.where(mask, weights, 0.0).to(wide.dtype) * far.abs().sum(2)).sum(1) / teacher.shape[2]


class _Chosen(torch.autograd.Function):
    """The same, a few of the selected rows at a time, in backward too."""

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, projection: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        wide = widened(projection)
        distances = wide.new_zeros(mask.shape)
        for at, _, far in _differences(student, teacher, wide, mask):
            distances[at] = torch.linalg.vector_norm(far, 1, dim=1) * weights[at].to(wide.dtype)
        return distances.sum(1) / teacher.shape[2]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("targeted_l1 is differentiable once: expected no create_graph=True")
        student, teacher, projection, weights, mask = ctx.saved_tensors
        wide = widened(projection)
        grad_student = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        grad_projection = torch.zeros_like(wide) if ctx.needs_input_grad[2] else None
        with exactly(student):
            for at, rows, far in _differences(student, teacher, wide, mask):
                scale = (weights[at].to(wide.dtype) * grad[at[0]] / teacher.shape[2])[:, None]
                signs = far.sign_()
                if grad_student is not None:
                    grad_student[at] = (signs @ wide).mul_(scale).to(student.dtype)
                if grad_projection is not None:
                    grad_projection.addmm_(signs.mul_(scale).T, rows)
        to_projection = None if grad_projection is None else grad_projection.to(projection.dtype)
        return grad_student, None, to_projection, None, None


def _differences(
    student: Tensor, teacher: Tensor, projection: Tensor, mask: Tensor
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor, Tensor]]:
    """Of a few selected rows at a time where they are, what they hold, and P h - g."""
    held = HELD if student.device.type == "cpu" else DEVICE
    few = max(1, held // max(projection.shape))
    images, tokens = mask.nonzero(as_tuple=True)
    for start in range(0, len(images), few):
        at = (images[start : start + few], tokens[start : start + few])
        rows = student[at].to(projection.dtype)
        yield at, rows, (rows @ projection.T).sub_(teacher[at])
