"""Parameter-free attention between patches and classes: `cross_attention`, `calip_logits`."""

from __future__ import annotations

from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import reference
from clipkernels.arguments import check_floating, check_numbers, check_same, shape_of
from clipkernels.backend import Backend
from clipkernels.custom_ops import cross_attention as _cross_attention
from clipkernels.reference import CrossAttended


def cross_attention(visual: Tensor, text: Tensor, alpha: float = 0.5, *, backend: Backend = "auto") -> CrossAttended:
    """Image patches that have looked at the classes, and classes that have looked at the patches; no parameters.

        A = visual @ text.T / alpha
        A.softmax(2) @ text, A.softmax(1).mT @ visual

    Args:
        visual: (B,P,E) patches, L2-normalised in the source.
        text: (K,E) class embeddings, L2-normalised in the source.
        alpha: what the similarities are divided by; positive.
        backend: "auto", "triton" or "reference".
    Returns:
        CrossAttended(visual (B,P,E), text (B,K,E)), like visual.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no patch or no class, an alpha that is not positive.
        RuntimeError: a gradient is wanted of the triton backend, which has none.
    Guarantees: the (B,P,K) similarities are never whole in memory, unless autograd keeps them or a graph is made of the
        reference; fp32 accumulation; deterministic. Differentiable on the reference alone.
    Source: CALIP, arXiv 2209.14169, section 3.2; its text divides by alpha, its code has ½.
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
    """CALIP's logits (B,K): what image and classes have in common, before and after they looked at each other.

        attended = ops.cross_attention(visual, text, alpha)
        seen = attended.visual.mean(1) + attended.visual.amax(1)
        100 * (pooled @ text.T + beta2 * (attended.text @ pooled[..., None])[..., 0] + beta3 * seen @ text.T)

    Args:
        visual: (B,P,E) patches, L2-normalised in the source.
        pooled: (B,E) global embeddings, likewise.
        text: (K,E) class embeddings, likewise.
        alpha: what the similarities are divided by; positive.
        beta2: weight of the classes that have looked at the patches.
        beta3: weight of the patches that have looked at the classes.
        terms: the three terms by themselves instead of their weighted sum, each × 100.
        backend: "auto", "triton" or "reference".
    Returns:
        (B,K), or (3,B,K) with `terms`, fp32 (fp64 for fp64 inputs).
    Raises:
        ValueError: as in `cross_attention`.
        RuntimeError: as in `cross_attention`.
    Guarantees: the (B,K,E) classes are never made; otherwise as in `cross_attention`.
    Source: CALIP, arXiv 2209.14169, section 3.2.
    """
    _check_calip(visual, pooled, text, alpha, beta2, beta3)
    chosen = _backend.choose(backend, visual.device, visual.dtype, "calip_logits")
    run = reference.calip_terms if chosen == "reference" else _cross_attention.calip_terms
    parts = run(visual, pooled, text, alpha)
    return parts if terms else parts[0] + beta2 * parts[1] + beta3 * parts[2]


def _check_cross_attention(visual: Tensor, text: Tensor, alpha: float) -> None:
    if visual.ndim != 3 or 0 in visual.shape[1:]:
        raise ValueError(f"visual must be (B,P,E) with at least one patch, got {shape_of(visual)}")
    check_floating(visual=visual)
    if text.ndim != 2 or not len(text) or text.shape[1] != visual.shape[2]:
        raise ValueError(f"text must be (K,E) with K ≥ 1 and E = {visual.shape[2]}, got {shape_of(text)}")
    check_same(visual, text=text)
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be positive, got {alpha!r}")


def _check_calip(visual: Tensor, pooled: Tensor, text: Tensor, alpha: float, beta2: float, beta3: float) -> None:
    check_numbers(beta2=beta2, beta3=beta3)
    _check_cross_attention(visual, text, alpha)
    if pooled.shape != (visual.shape[0], visual.shape[2]):
        raise ValueError(f"pooled must be (B,E) = ({visual.shape[0]},{visual.shape[2]}), got {shape_of(pooled)}")
    check_same(visual, pooled=pooled)
