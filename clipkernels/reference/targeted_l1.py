"""The L1 distance of projected tokens to a teacher's, over selected tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from clipkernels.reference.precision import autocast_disabled, upcast

# Numbers that the rows projected at once may be on a CPU: few beside a gradient, and faster for staying in cache.
HELD = 2**17
# And where launches count: a few thousand rows.
DEVICE = 2**21


def targeted_l1(student: Tensor, teacher: Tensor, projection: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    with autocast_disabled(student):
        form = _whole if _traced(student, teacher, projection, weights, mask) else _Chosen.apply
        return form(student, teacher, projection, weights, mask)


def _traced(*given: Tensor) -> bool:
    """Whether a graph is made, whose shapes cannot depend on the mask, torch.func transforms what is called, or there
    are shapes alone."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or get_proxy_mode() is not None:
        return True
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return True
    return given[0].is_meta or detect_fake_mode(given) is not None


def _whole(student: Tensor, teacher: Tensor, projection: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    chosen, wide = mask[..., None], upcast(projection)
    far = torch.where(chosen, student, 0.0).to(wide.dtype) @ wide.T - torch.where(chosen, teacher, 0.0).to(wide.dtype)
    distances = torch.where(mask, far.abs().sum(2), 0.0)  # 0 · P is not 0 where P is not finite
    return (torch.where(mask, weights, 0.0).to(wide.dtype) * distances).sum(1) / teacher.shape[2]


class _Chosen(torch.autograd.Function):
    """The same, a few of the selected rows at a time, in backward too."""

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, projection: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        wide = upcast(projection)
        distances = wide.new_zeros(mask.shape)
        for at, _, far in _differences(student, teacher, wide, mask):
            distances[at] = torch.linalg.vector_norm(far, 1, dim=1) * weights[at].to(wide.dtype)
        return distances.sum(1) / teacher.shape[2]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, _, projection, *_ = given = ctx.saved_tensors
        to_student, _, to_projection, *_ = ctx.needs_input_grad
        if torch._C._functorch.is_legacy_batchedtensor(grad):  # is_grads_batched: no operation may be in place
            learnt, again = [student] * to_student + [projection] * to_projection, torch.is_grad_enabled()
            with torch.enable_grad(), autocast_disabled(student):
                came = iter(torch.autograd.grad(_whole(*given), learnt, grad, create_graph=again))
        else:
            came = iter(_Gradients.apply(grad, *given, to_student, to_projection))
        return next(came) if to_student else None, None, next(came) if to_projection else None, None, None


class _Gradients(torch.autograd.Function):
    """Of the student and of the projection, where they are wanted; they have none themselves."""

    @staticmethod
    def forward(
        grad: Tensor,
        student: Tensor,
        teacher: Tensor,
        projection: Tensor,
        weights: Tensor,
        mask: Tensor,
        to_student: bool,
        to_projection: bool,
    ) -> tuple[Tensor, ...]:
        wide = upcast(projection)
        grad_student = torch.zeros_like(student) if to_student else None
        grad_projection = torch.zeros_like(wide) if to_projection else None
        with autocast_disabled(student):
            for at, rows, far in _differences(student, teacher, wide, mask):
                scale = (weights[at].to(wide.dtype) * grad[at[0]] / teacher.shape[2])[:, None]
                signs = far.sign_()
                if grad_student is not None:
                    grad_student[at] = (signs @ wide).mul_(scale).to(student.dtype)
                if grad_projection is not None:
                    grad_projection.addmm_(signs.mul_(scale).T, rows)
        made = (grad_student, None if grad_projection is None else grad_projection.to(projection.dtype))
        return tuple(one for one in made if one is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("targeted_l1 is differentiable once: its gradients have none")


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
