"""L1 distance of selected, projected tokens to a teacher's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from clipkernels.reference.precision import autocast_disabled, upcast

# Elements of the rows that are projected at once. On a CPU they are small next to a gradient and fit in cache;
CPU_CHUNK_ELEMENTS = 2**17
# on a device, where launches count, they are a few thousand rows.
DEVICE_CHUNK_ELEMENTS = 2**21


def targeted_l1(student: Tensor, teacher: Tensor, projection: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    with autocast_disabled(student):
        form = _dense_distance if needs_static_shapes(student, teacher, projection, weights, mask) else _Distance.apply
        return form(student, teacher, projection, weights, mask)


def needs_static_shapes(*tensors: Tensor) -> bool:
    """Return true if no shape may depend on the mask: in a traced graph, under torch.func, or without real data."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or get_proxy_mode() is not None:
        return True
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return True
    return tensors[0].is_meta or detect_fake_mode(tensors) is not None


def may_be_true(mask: Tensor, *tensors: Tensor) -> bool:
    """Return false if no element of a mask is true, so that a copy of the tensors without them is not needed.

    Mostly none is, and a copy costs time. On a GPU, which would have to be waited for, and in a traced graph, the
    answer is true.
    """
    return mask.device.type != "cpu" or needs_static_shapes(mask, *tensors) or bool(mask.any())


def _dense_distance(student: Tensor, teacher: Tensor, projection: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Return the distances (B,), computed on all tokens."""
    rows, wide = mask[..., None], upcast(projection)
    target = torch.where(rows, teacher, 0.0).to(wide.dtype)
    difference = torch.where(rows, student, 0.0).to(wide.dtype) @ wide.T - target
    distances = torch.where(mask, difference.abs().sum(2), 0.0)  # 0·P is not 0 if P is not finite
    return (torch.where(mask, weights, 0.0).to(wide.dtype) * distances).sum(1) / teacher.shape[2]


class _Distance(torch.autograd.Function):
    """Distances (B,), computed in chunks of the selected rows, forward and backward."""

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, projection: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        wide = upcast(projection)
        distances = wide.new_zeros(mask.shape)
        for at, _, difference in _differences(student, teacher, wide, mask):
            distances[at] = torch.linalg.vector_norm(difference, 1, dim=1) * weights[at].to(wide.dtype)
        return distances.sum(1) / teacher.shape[2]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, _, projection, *_ = inputs = ctx.saved_tensors
        to_student, _, to_projection, *_ = ctx.needs_input_grad
        if torch._C._functorch.is_legacy_batchedtensor(grad):  # is_grads_batched allows no operation in place
            leaves, create_graph = [student] * to_student + [projection] * to_projection, torch.is_grad_enabled()
            with torch.enable_grad(), autocast_disabled(student):
                grads = iter(torch.autograd.grad(_dense_distance(*inputs), leaves, grad, create_graph=create_graph))
        else:
            grads = iter(_Gradients.apply(grad, *inputs, to_student, to_projection))
        return next(grads) if to_student else None, None, next(grads) if to_projection else None, None, None


class _Gradients(torch.autograd.Function):
    """The required gradients of student and projection; they have no backward."""

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
            for at, rows, difference in _differences(student, teacher, wide, mask):
                scale = (weights[at].to(wide.dtype) * grad[at[0]] / teacher.shape[2])[:, None]
                signs = difference.sign_()
                if grad_student is not None:
                    grad_student[at] = (signs @ wide).mul_(scale).to(student.dtype)
                if grad_projection is not None:
                    grad_projection.addmm_(signs.mul_(scale).T, rows)
        grads = (grad_student, None if grad_projection is None else grad_projection.to(projection.dtype))
        return tuple(tensor for tensor in grads if tensor is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save nothing, because the backward raises."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("targeted_l1 is differentiable once: its gradients have no backward")


def _differences(
    student: Tensor, teacher: Tensor, projection: Tensor, mask: Tensor
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor, Tensor]]:
    """Yield the positions (image, token), the rows h and the differences P h - g of a chunk of selected rows."""
    elements = CPU_CHUNK_ELEMENTS if student.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    chunk = max(1, elements // max(projection.shape))
    images, tokens = mask.nonzero(as_tuple=True)
    for start in range(0, len(images), chunk):
        at = (images[start : start + chunk], tokens[start : start + chunk])
        rows = student[at].to(projection.dtype)
        yield at, rows, (rows @ projection.T).sub_(teacher[at])
