"""What a student is told by a frozen teacher: how far its projected tokens are from the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import checks, reference
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
    checks.check_targeted_l1(student, teacher, projection, weights, mask)
    chosen = _backend.choose(backend, student.device, student.dtype, "targeted_l1")
    if chosen == "reference":
        return reference.targeted_l1(student, teacher, projection, weights, mask)
    return _targeted_l1.targeted_l1(student, teacher, projection, weights, mask)
