"""What heads do with encoded images: CALIP's cross-attention, and affinity to a support set."""

from __future__ import annotations

from torch import Tensor

from clipkernels import backend as _backend
from clipkernels import checks, reference
from clipkernels.backend import Backend
from clipkernels.custom_ops import affinity as _affinity
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
    checks.check_cross_attention(visual, text, alpha)
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
    checks.check_calip(visual, pooled, text, alpha, beta2, beta3)
    chosen = _backend.choose(backend, visual.device, visual.dtype, "calip_logits")
    run = reference.calip_terms if chosen == "reference" else _cross_attention.calip_terms
    parts = run(visual, pooled, text, alpha)
    return parts if terms else parts[0] + beta2 * parts[1] + beta3 * parts[2]


def affinity(
    queries: Tensor,
    support: Tensor,
    labels: Tensor,
    classes: int,
    beta: float,
    weights: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """How near each query is to a class's support: Σ wⱼ·exp(-β(1 - q·fⱼ)) over the class's rows, (t,K).

        (-beta * (1 - queries @ support.T)).exp() * weights @ one_hot(labels, classes)

    Args:
        queries: (t,E), L2-normalised in the source.
        support: (n,E), likewise.
        labels: (n,) int64 the class of each row of the support; what is not in 0..K-1 counts for none.
        classes: K.
        beta: sharpness β.
        weights: (n,) of the rows, any float dtype; None is all ones.
        offsets: (K+1,) int64 where each class begins, and where the last one ends, of a support whose labels ascend
            and say the same; None has it sorted by the triton backend, at every call. See `reference.sort_by_class`.
        backend: "auto", "triton" or "reference".
    Returns:
        (t,K) fp32 (fp64 for fp64 inputs); 0 for a class without support.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        RuntimeError: a gradient is wanted of the triton backend, which has none.
    Guarantees: the (t,n) affinities are never whole in memory, unless autograd keeps them; fp32 accumulation, of halves
        to 16 bits; deterministic on the CPU and on triton; no host sync. Differentiable on the reference alone.
    Source: Tip-Adapter, arXiv 2111.03930, section 3.2.
    """
    checks.check_affinity(queries, support, labels, classes, beta, weights, offsets)
    chosen = _backend.choose(backend, queries.device, queries.dtype, "affinity")
    if chosen == "reference":
        return reference.affinity(queries, support, labels, classes, beta, weights)
    if offsets is None:
        order, offsets = reference.sort_by_class(labels, classes)
        support, weights = support[order], None if weights is None else weights[order]
    return _affinity.affinity(queries, support, offsets, beta, weights)
