"""Distance between projected student tokens and a teacher's: `targeted_l1`."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import reference
from clipkernels.arguments import check_floating, check_same, shape_of
from clipkernels.backend import Backend
from clipkernels.custom_ops import targeted_l1 as _targeted_l1


def targeted_l1(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor,
    weights: Tensor,
    mask: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """How far an instance's selected tokens are from its teacher's: Σ wᵢ·‖P hᵢ - gᵢ‖₁/E, (B,).

        (mask * weights * (student @ projection.T - teacher).abs().mean(2)).sum(1)

    Args:
        student: (B,n,d) the student's tokens h.
        teacher: (B,n,E) the teacher's g, any float dtype.
        projection: (E,d) P, of the dtype of student; under autocast both are cast to its dtype.
        weights: (B,n) of the tokens, any float dtype.
        mask: (B,n) bool, which tokens count; what the others hold, NaN too, makes no difference to anything.
        backend: "auto", "triton" or "reference".
    Returns:
        (B,) fp32 (fp64 for fp64 inputs); 0 for an instance of which nothing is selected.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a teacher or weights that require a gradient.
        RuntimeError: a second derivative, once it is asked for; create_graph=True alone is none.
    Guarantees: differentiable in student and projection, once, with sign(0) = 0; nothing of the shape (B,n,E) is made,
        forward or backward: the reference holds at most 2¹⁷ of its numbers at once, 2²¹ on a GPU, unless it is
        compiled, exported, traced, transformed by torch.func or asked for several gradients (is_grads_batched); fp32
        accumulation; deterministic. On triton no host sync, an instance's value and gradient do not depend on the
        others, and for the gradient of projection each token's factor wᵢ·grad/E is rounded to the dtype of student.
    Source: the distance of CLIP-TD, arXiv 2201.05729, as reconstructed here: only its abstract was at hand.
    """
    # `is_autocast_available`, which older compilers cannot trace, would say the same.
    if not student.is_meta and torch.is_autocast_enabled(student.device.type):
        narrow = torch.get_autocast_dtype(student.device.type)
        student, projection = (
            x.to(narrow) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (student, projection)
        )
    _check_targeted_l1(student, teacher, projection, weights, mask)
    chosen = _backend.choose(backend, student.device, student.dtype, "targeted_l1")
    if chosen == "reference":
        return reference.targeted_l1(student, teacher, projection, weights, mask)
    return _targeted_l1.targeted_l1(student, teacher, projection, weights, mask)


def _check_targeted_l1(student: Tensor, teacher: Tensor, projection: Tensor, weights: Tensor, mask: Tensor) -> None:
    if student.ndim != 3 or not student.shape[2]:
        raise ValueError(f"student must be (B,n,d) with d ≥ 1, got {shape_of(student)}")
    check_floating(student=student)
    batch, tokens, width = student.shape
    if teacher.ndim != 3 or teacher.shape[:2] != student.shape[:2] or not teacher.shape[2]:
        raise ValueError(f"teacher must be (B,n,E) = ({batch},{tokens},E) with E ≥ 1, got {shape_of(teacher)}")
    if tuple(projection.shape) != (teacher.shape[2], width):
        raise ValueError(f"projection must be (E,d) = ({teacher.shape[2]},{width}), got {shape_of(projection)}")
    check_same(student, projection=projection)
    for name, tensor in (("weights", weights), ("mask", mask)):
        if tuple(tensor.shape) != (batch, tokens):
            raise ValueError(f"{name} must be (B,n) = ({batch},{tokens}), got {shape_of(tensor)}")
    for name, tensor in (("teacher", teacher), ("weights", weights), ("mask", mask)):
        if tensor.device != student.device:
            raise ValueError(f"{name} must be on {student.device} like student, got {tensor.device}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be torch.bool, got {mask.dtype}")
    check_floating(teacher=teacher, weights=weights)
    for name, tensor in (("teacher", teacher), ("weights", weights)):
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient, for it gets none: detach it")
