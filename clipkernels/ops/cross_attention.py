"""Parameter-free attention between patches and classes: `cross_attention`, `calip_logits`."""

from __future__ import annotations

from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import reference
from clipkernels.arguments import (
    check_flags,
    check_floating,
    check_numbers,
    check_positive,
    check_same,
    check_tensors,
    shape_of,
)
from clipkernels.backend import Backend
from clipkernels.custom_ops import cross_attention as _cross_attention
from clipkernels.reference import CrossAttended


def cross_attention(visual: Tensor, text: Tensor, alpha: float = 0.5, *, backend: Backend = "auto") -> CrossAttended:
    """Patches that attend to the classes, and classes that attend to the patches; no parameters.

        A = visual @ text.T / alpha
        A.softmax(2) @ text, A.softmax(1).mT @ visual

    Args:
        visual: (B,P,E) patches, L2-normalised in the source.
        text: (K,E) class embeddings, L2-normalised in the source.
        alpha: divisor of the similarities; positive.
        backend: "auto", "triton" or "reference".
    Returns:
        CrossAttended(visual (B,P,E), text (B,K,E)), in the dtype and on the device of visual.
    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes or devices do not match, there is no patch or no class, or alpha is not positive.
        RuntimeError: a gradient is required on the triton backend, which has no backward.
    Guarantees: the (B,P,K) similarities are never entirely in memory, unless autograd saves them or the reference is
        traced into a graph; fp32 accumulation; deterministic. Only the reference is differentiable.
    Source: CALIP, arXiv 2209.14169, section 3.2; the paper divides by alpha, its code uses ½.
    """
    _check_cross_attention(visual, text, alpha)
    chosen = _backend.choose(backend, visual.device, visual.dtype, "cross_attention")
    return (reference.cross_attention if chosen == "reference" else _cross_attention.cross_attention)(
        visual, text, alpha
    )


def calip_logits(
    visual: Tensor,
    pooled: Tensor,
    text: Tensor,
    alpha: float = 0.5,
    beta2: float = 1.12,
    beta3: float = 0.02,
    terms: bool = False,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """CALIP's logits (B,K): similarities of images and classes, before and after cross-attention.

        attended = ops.cross_attention(visual, text, alpha)
        image = attended.visual.mean(1) + attended.visual.amax(1)
        100 * (pooled @ text.T + beta2 * (attended.text @ pooled[..., None])[..., 0] + beta3 * image @ text.T)

    Args:
        visual: (B,P,E) patches, L2-normalised in the source.
        pooled: (B,E) global image embeddings, L2-normalised in the source.
        text: (K,E) class embeddings, L2-normalised in the source.
        alpha: divisor of the similarities; positive.
        beta2: weight of the term of the classes that attended to the patches.
        beta3: weight of the term of the patches that attended to the classes.
        terms: return the three terms, each × 100, instead of their weighted sum.
        backend: "auto", "triton" or "reference".
    Returns:
        (B,K), or (3,B,K) with `terms`, fp32 (fp64 for fp64 inputs).
    Raises:
        TypeError, ValueError, RuntimeError: as in `cross_attention`.
    Guarantees: the attended classes (B,K,E) are never computed; otherwise as in `cross_attention`.
    Source: CALIP, arXiv 2209.14169, section 3.2.
    """
    _check_calip(visual, pooled, text, alpha, beta2, beta3)
    check_flags(terms=terms)
    chosen = _backend.choose(backend, visual.device, visual.dtype, "calip_logits")
    run = reference.calip_terms if chosen == "reference" else _cross_attention.calip_terms
    parts = run(visual, pooled, text, alpha)
    return parts if terms else parts[0] + beta2 * parts[1] + beta3 * parts[2]


def _check_cross_attention(visual: Tensor, text: Tensor, alpha: float) -> None:
    check_tensors(visual=visual, text=text)
    if visual.ndim != 3 or 0 in visual.shape[1:]:
        raise ValueError(f"visual must be (B,P,E) with at least one patch, got {shape_of(visual)}")
    check_floating(visual=visual)
    if text.ndim != 2 or not len(text) or text.shape[1] != visual.shape[2]:
        raise ValueError(f"text must be (K,E) with K ≥ 1 and E = {visual.shape[2]}, got {shape_of(text)}")
    check_same(visual, text=text)
    check_positive(alpha=alpha)


def _check_calip(visual: Tensor, pooled: Tensor, text: Tensor, alpha: float, beta2: float, beta3: float) -> None:
    check_numbers(beta2=beta2, beta3=beta3)
    _check_cross_attention(visual, text, alpha)
    check_tensors(pooled=pooled)
    if pooled.shape != (visual.shape[0], visual.shape[2]):
        raise ValueError(f"pooled must be (B,E) = ({visual.shape[0]},{visual.shape[2]}), got {shape_of(pooled)}")
    check_same(visual, pooled=pooled)
