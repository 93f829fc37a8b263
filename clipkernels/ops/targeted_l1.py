"""L1 distance of projected student tokens to a teacher's tokens: `targeted_l1`."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import reference
from clipkernels.arguments import check_floating, check_same, check_tensors, shape_of
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
    """Weighted L1 distance (B,) of each instance's selected tokens to its teacher's: Σ wᵢ·‖P hᵢ - gᵢ‖₁/E.

        (mask * weights * (student @ projection.T - teacher).abs().mean(2)).sum(1)

    Args:
        student: (B,n,d) the student's tokens h.
        teacher: (B,n,E) the teacher's tokens g, any float dtype.
        projection: (E,d) P, in the dtype of student; autocast casts both to its own dtype.
        weights: (B,n) weight of each token, any float dtype.
        mask: (B,n) bool, true for the selected tokens. The values of all other tokens, including NaN, change neither
            the result nor a gradient.
        backend: "auto", "triton" or "reference".
    Returns:
        (B,) fp32 (fp64 for fp64 inputs); 0 for an instance without a selected token.
    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes or devices do not match, or teacher or weights require a gradient.
        RuntimeError: a second derivative is computed; create_graph=True alone raises nothing.
    Guarantees: differentiable once, in student and projection, with sign(0) = 0; fp32 accumulation; deterministic. No
        tensor of shape (B,n,E) is allocated, forward or backward: the reference processes at most 2¹⁷ elements of it
        at once, 2²¹ on a GPU, unless it is compiled, exported, traced, transformed by torch.func or differentiated in
        a batch of gradients (is_grads_batched). On triton there is no host sync, an instance's value and gradient do
        not depend on other instances, and for the gradient of projection each token's factor wᵢ·grad/E is rounded to
        the dtype of student.
    Source: the distance of CLIP-TD, arXiv 2201.05729, reconstructed from its abstract, the only part available here.
    """
    check_tensors(student=student, teacher=teacher, projection=projection, weights=weights, mask=mask)
    # On meta tensors `is_autocast_enabled` raises; `is_autocast_available` would tell, but older compilers cannot trace
    # it.
    if not student.is_meta and torch.is_autocast_enabled(student.device.type):
        dtype = torch.get_autocast_dtype(student.device.type)
        student, projection = (
            x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (student, projection)
        )
    _check_targeted_l1(student, teacher, projection, weights, mask)
    chosen = _backend.choose(backend, student.device, student.dtype, "targeted_l1")
    if chosen == "reference":
        return reference.targeted_l1(student, teacher, projection, weights, mask)
    return _targeted_l1.targeted_l1(student, teacher, projection, weights, mask)


def _check_targeted_l1(student: Tensor, teacher: Tensor, projection: Tensor, weights: Tensor, mask: Tensor) -> None:
    if student.ndim != 3 or not student.shape[2]:
        raise ValueError(f"student must be (B,n,d) with d ≥ 1, got {shape_of(student)}")
    check_floating(student=student, teacher=teacher, weights=weights)
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
    for name, tensor in (("teacher", teacher), ("weights", weights)):
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient, because it gets none: detach it")
