"""The operation `targeted_l1` on the Triton backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipkernels.custom_ops import can_skip_dispatcher, kernels, register


def targeted_l1(student: Tensor, teacher: Tensor, projection: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    arguments = (student, teacher, projection, weights, mask)
    learns = torch.is_grad_enabled() and (student.requires_grad or projection.requires_grad)
    call = _launch if can_skip_dispatcher(*arguments) else torch.ops.clipkernels.targeted_l1
    distance, _, _ = call(*arguments, learns)
    return distance


def _launch(
    student: Tensor, teacher: Tensor, projection: Tensor, weights: Tensor, mask: Tensor, learns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels("targeted_l1").targeted_l1(student, teacher, projection, weights, mask, learns)


def _fake(
    student: Tensor, teacher: Tensor, projection: Tensor, weights: Tensor, mask: Tensor, learns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = student.shape[0] * student.shape[1]
    signs = student.new_empty(rows if learns else 0, (teacher.shape[2] + 15) // 16, dtype=torch.int32)
    distance = student.new_empty(student.shape[0], dtype=torch.float32)
    return distance, signs, student.new_empty(rows + 1, dtype=torch.int32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    student, _, projection, weights, mask, ctx.learns = inputs
    _, signs, order = output
    ctx.mark_non_differentiable(signs, order)
    ctx.embedding = projection.shape[0]
    to_student, _, to_projection, *_ = ctx.needs_input_grad
    factors = (student if to_projection else None, projection if to_student else None)
    ctx.save_for_backward(*factors, weights, mask, signs, order)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if not ctx.learns:
        raise RuntimeError("clipkernels::targeted_l1 was called with learns=False, which saves nothing for a backward")
    student, projection, weights, mask, signs, order = ctx.saved_tensors
    scale = torch.where(mask, weights.float() * grad[:, None], 0.0) / ctx.embedding
    grad_student = grad_projection = None
    if projection is not None:
        grad_student = torch.ops.clipkernels.targeted_l1_student(projection, scale, signs, order)
    if student is not None:
        grad_projection = torch.ops.clipkernels.targeted_l1_projection(student, scale, signs, order, ctx.embedding)
    return grad_student, None, grad_projection, None, None, None


def _refuse(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError("targeted_l1 is differentiable once: its gradients have no backward")


def _launch_student(projection: Tensor, scale: Tensor, signs: Tensor, order: Tensor) -> Tensor:
    return kernels("targeted_l1").student_gradient(projection, scale, signs, order)


def _fake_student(projection: Tensor, scale: Tensor, signs: Tensor, order: Tensor) -> Tensor:
    return projection.new_empty(*scale.shape, projection.shape[1])


def _launch_projection(student: Tensor, scale: Tensor, signs: Tensor, order: Tensor, embedding: int) -> Tensor:
    return kernels("targeted_l1").projection_gradient(student, scale, signs, order, embedding)


def _fake_projection(student: Tensor, scale: Tensor, signs: Tensor, order: Tensor, embedding: int) -> Tensor:
    return student.new_empty(embedding, student.shape[2])


register(
    "targeted_l1(Tensor student, Tensor teacher, Tensor projection, Tensor weights, Tensor mask, bool learns) "
    "-> (Tensor distance, Tensor signs, Tensor order)",
    _launch,
    _fake,
    _backward,
    _setup,
)
register(
    "targeted_l1_student(Tensor projection, Tensor scale, Tensor signs, Tensor order) -> Tensor",
    _launch_student,
    _fake_student,
    _refuse,
)
register(
    "targeted_l1_projection(Tensor student, Tensor scale, Tensor signs, Tensor order, SymInt embedding) -> Tensor",
    _launch_projection,
    _fake_projection,
    _refuse,
)
