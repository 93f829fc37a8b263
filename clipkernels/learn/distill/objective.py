"""CLIP-TD's objective: a student's hidden states are drawn to a frozen CLIP's, where CLIP sees what matters.

    text     ρ_i = softmax_i(cos(g_T(i), g_I)/t)·q_i        visual   ρ_j = softmax_j(cos(g_I(j), g_T)/t)
    chosen   the ⌈κn⌉ tokens of highest ρ,  ρ̂ = ρ/Σ ρ over them
    distance Σ ρ̂_i ‖P_t h_i - g_T(i)‖₁/E + ‖P_t h_T - g_T‖₁/E,  and the same with P_v for the visual states
    weight   w = c_T/(c_T + c_S), the teacher's and the student's confidence in the true answer
    loss     λ·mean(w·distance), to be added to the task's own

Only the abstract of CLIP-TD (arXiv 2201.05729) is public: this is a reconstruction. It takes tensors, not a model, so
that any student will do; its two projections are trained with the student and thrown away.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipkernels import ops
from clipkernels.learn.distill.features import TeacherFeatures
from clipkernels.reference.precision import autocast_disabled, upcast
from clipkernels.reference.ranking import inverse_of, strongest_first

if TYPE_CHECKING:
    from clipkernels.learn.distill.cache import TeacherCache
    from clipkernels.learn.distill.teacher import Teacher

Weight = Literal["ratio", "teacher", "teacher_minus_student"]


class Distilled(NamedTuple):
    """What a batch was found to be worth.

    loss (): λ·mean(w·distance), differentiable in the student's states and in the projections.
    distance (B,): the sum of all terms of an instance, likewise; 0 where nothing is chosen and nothing is pooled.
    weight (B,): w, without gradient.
    text (B,n_t), visual (B,n_v): ρ̂ of every token, 0 where it is not chosen, without gradient; None without states.
    """

    loss: Tensor
    distance: Tensor
    weight: Tensor
    text: Tensor | None
    visual: Tensor | None


class _Branch(NamedTuple):
    terms: list[Tensor]
    share: Tensor | None


class TargetedDistillation(nn.Module):
    """The objective with its projections, a module to be trained with the student: `loss = task + distil(…).loss`.

    Plain distillation, of all tokens alike and with weight 1, is keep=1, temperature=math.inf and weight=None.

    Args:
        teacher: a `Teacher` or a `TeacherCache`, of which only the width E is asked; or E.
        text: width d of the student's text states; None without that branch.
        visual: width d of its visual states; None without that branch.
        keep: κ, the share of the tokens that are not padding; ⌈κn⌉ of each instance are chosen.
        temperature: t of the relevance; math.inf makes all tokens alike.
        weight: "ratio" c_T/(c_T + c_S), "teacher" c_T, "teacher_minus_student" max(c_T - c_S, 0), or None for 1.
        scale: what the teacher's cosines are multiplied by before the softmax over the answers.
        strength: λ.
    Raises:
        ValueError: neither branch, or a number out of its range.
    Source: CLIP-TD, arXiv 2201.05729, of which the abstract alone is public: a reconstruction.
    """

    def __init__(
        self,
        teacher: Teacher | TeacherCache | int,
        text: int | None = None,
        visual: int | None = None,
        *,
        keep: float = 0.4,
        temperature: float = 0.07,
        weight: Weight | None = "ratio",
        scale: float = 100.0,
        strength: float = 1.0,
    ) -> None:
        super().__init__()
        width = teacher if isinstance(teacher, int) else teacher.width
        if text is None and visual is None:
            raise ValueError("expected the width of the student's text or visual states, got neither")
        if min(width, *(each for each in (text, visual) if each is not None)) < 1:
            raise ValueError(f"widths must be at least one, got {width} of the teacher, text={text}, visual={visual}")
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be a number in (0, 1], got {keep!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature!r}")
        if weight is not None and weight not in get_args(Weight):
            raise ValueError(f"weight must be one of {', '.join(get_args(Weight))} or None, got {weight!r}")
        if not math.isfinite(scale) or not 0 <= strength < math.inf:
            raise ValueError(f"scale and strength must be finite, strength not negative, got {scale} and {strength}")
        self.width, self.keep, self.temperature, self.weight = width, keep, temperature, weight
        self.scale, self.strength = scale, strength
        self.text = None if text is None else nn.Linear(text, width, bias=False)
        self.visual = None if visual is None else nn.Linear(visual, width, bias=False)

    def forward(
        self,
        features: TeacherFeatures,
        *,
        text: Tensor | None = None,
        text_pooled: Tensor | None = None,
        text_mask: Tensor | None = None,
        prior: Tensor | None = None,
        visual: Tensor | None = None,
        visual_pooled: Tensor | None = None,
        visual_mask: Tensor | None = None,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Distilled:
        """The loss of a batch, and what it is made of.

        A student whose tokens are not the teacher's needs features that were aligned to them: `TeacherFeatures.align`.

        Args:
            features: what the teacher says of the batch: `words` and `image` with `text`, `regions` and `text` with
                `visual`, `text` with `text_pooled`, `image` with `visual_pooled`; `image` and `answers` with a weight.
            text: (B,n_t,d) the student's text states, one for each of the teacher's words, padding included.
            text_pooled: (B,d) its state of the whole text.
            text_mask: (B,n_t) bool, False for padding, beside what the teacher leaves out.
            prior: (B,n_t) or (n_t,) q, such as 1 for content words and 0 for others; below 0 is 0; None is all ones.
            visual: (B,n_v,d) the student's visual states, one for each of the teacher's regions.
            visual_pooled: (B,d) its state of the whole image.
            visual_mask: (B,n_v) bool, False for padding.
            logits: (B,a) the student's answers, where the weight asks it.
            labels: (B,) int64 the true answers, where there is a weight; an instance with another than 0..a-1, such as
                cross-entropy's -100, weighs nothing.
        Returns:
            Distilled.
        Raises:
            ValueError: shapes, dtypes or devices that do not fit, states without their branch, or what a term needs and
                is not given.
        Guarantees: no (B,n,E) of the student is made, but by the reference where a graph is made of it; no host sync on
            triton; no gradient through relevance, choice and weight. Projections work in the dtype of the states, or of
            autocast. Under DistributedDataParallel this belongs in the module that is wrapped, with the student.
        """
        told = self._branch("text", text, text_pooled, text_mask, features, prior)
        seen = self._branch("visual", visual, visual_pooled, visual_mask, features, None)
        terms = [*told.terms, *seen.terms]
        if not terms:
            raise ValueError("expected states of the student, text, text_pooled, visual or visual_pooled, got none")
        distance = torch.stack(terms).sum(0)
        weight = self._weights(len(distance), distance.device, features, logits, labels)
        loss = self.strength * (weight * distance).sum() / max(1, len(distance))
        return Distilled(loss, distance, weight, told.share, seen.share)

    def _branch(
        self,
        name: Literal["text", "visual"],
        hidden: Tensor | None,
        pooled: Tensor | None,
        own: Tensor | None,
        features: TeacherFeatures,
        prior: Tensor | None,
    ) -> _Branch:
        """The terms (B,) of the tokens and of the whole, of a branch, and ρ̂."""
        terms: list[Tensor] = []
        state, share, projection = pooled if hidden is None else hidden, None, getattr(self, name)
        if state is None:
            return _Branch(terms, share)
        if projection is None:
            raise ValueError(f"expected no {name} states, got some: make this with {name}= their width")
        batch, device = len(state), projection.weight.device
        parts = ("words", "words_mask", "image") if name == "text" else ("regions", "regions_mask", "text")
        if hidden is not None:
            tokens = (batch, *hidden.shape[1:-1])
            _check_tensor(name, hidden, (*tokens[:2], projection.in_features), device)
            guide, there, other = (getattr(features, part) for part in parts)
            named = f"features.{parts[0]}, one for each of the student's tokens,"
            guide = _check_tensor(named, _require(guide, f"features.{parts[0]}"), (*tokens, self.width), device)
            named = f"features.{parts[2]}"
            other = _check_tensor(named, _require(other, named), (batch, self.width), device)
            mask = torch.ones(tokens, dtype=torch.bool, device=device)
            for named, each in ((f"features.{parts[1]}", there), (f"{name}_mask", own)):
                mask = mask if each is None else mask & _check_tensor(named, each, tokens, device, torch.bool)
            if prior is not None:
                _check_tensor("prior", prior, tokens if prior.ndim > 1 else tokens[1:], device)
            relevance = relevance_of(guide, other, mask, self.temperature, prior)
            chosen = select_top(relevance, mask, self.keep)
            share = normalize_relevance(relevance, chosen)
            terms.append(ops.targeted_l1(hidden, guide, projection.weight.to(hidden.dtype), share, chosen))
        if pooled is not None:
            named = "features.text" if name == "text" else "features.image"
            whole = getattr(features, named.removeprefix("features."))
            whole = _check_tensor(named, _require(whole, named), (batch, self.width), device)
            _check_tensor(f"{name}_pooled", pooled, (batch, projection.in_features), device)
            one = torch.ones(batch, 1, device=device)
            weight = projection.weight.to(pooled.dtype)
            terms.append(ops.targeted_l1(pooled[:, None], whole[:, None], weight, one, one.bool()))
        return _Branch(terms, share)

    @torch.no_grad()
    def _weights(
        self, batch: int, device: torch.device, features: TeacherFeatures, logits: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        """w (B,) fp32."""
        if self.weight is None:
            return torch.ones(batch, device=device)
        with_it = f" with weight {self.weight!r}"
        labels = _check_tensor("labels", _require(labels, "labels" + with_it), (batch,), device, torch.int64)
        image = _check_tensor("features.image", _require(features.image, "features.image"), (batch, self.width), device)
        answers = _require(features.answers, "features.answers" + with_it)
        _check_tensor("features.answers", answers, (batch, *answers.shape[1:-1], self.width), device)
        with autocast_disabled(image):
            alike = (normalize(answers.float(), dim=-1) @ normalize(image.float(), dim=-1)[..., None])[..., 0]
            teacher = _confidence(self.scale * alike, labels)
            if self.weight == "teacher":
                return teacher
            logits = _check_tensor("logits", _require(logits, "logits" + with_it), tuple(answers.shape[:2]), device)
            student = _confidence(logits.float(), labels)
            if self.weight == "teacher_minus_student":
                return (teacher - student).clamp(min=0)
            total = teacher + student
            return teacher / torch.where(total > 0, total, 1)


@torch.no_grad()
def relevance_of(
    tokens: Tensor, other: Tensor, mask: Tensor, temperature: float = 0.07, prior: Tensor | None = None
) -> Tensor:
    """ρ (B,n), fp32 (fp64 for fp64 tokens): how much of what the other side is about each token is.

        cosine_similarity(tokens, other[:, None], dim=2).div(temperature).softmax(1) * prior

    Args:
        tokens: (B,n,E) the teacher's words or regions.
        other: (B,E) its embeddings of the images of those words, or of the texts of those regions.
        mask: (B,n) bool; what is False counts for nothing, whatever it holds, and gets 0.
        temperature: t.
        prior: (B,n) or (n,) weights q; None is all ones.
    """
    with autocast_disabled(tokens):
        tokens = upcast(tokens)
        length = torch.linalg.vector_norm(tokens, dim=2) * torch.linalg.vector_norm(upcast(other), dim=1)[:, None]
        alike = (tokens @ upcast(other)[..., None])[..., 0] / length.clamp(min=1e-12)
        alike = (alike / temperature).masked_fill(~mask, float("-inf"))
        share = torch.where(mask, (alike - alike.logsumexp(1, keepdim=True)).exp(), 0)  # NaN where all is padding
    return share if prior is None else torch.where(mask, share * prior.to(share.dtype).clamp(min=0), 0)


@torch.no_grad()
def select_top(relevance: Tensor, mask: Tensor, keep: float) -> Tensor:
    """Which ⌈keep·n⌉ of the n tokens that mask (B,n) leaves have the highest relevance (B,n), bool; ties to the lower
    index."""
    place = inverse_of(strongest_first(relevance.masked_fill(~mask, float("-inf"))))
    count = (keep * mask.sum(1, keepdim=True, dtype=torch.float64)).ceil()
    return mask & (place < count)


def normalize_relevance(relevance: Tensor, chosen: Tensor) -> Tensor:
    """ρ̂ (B,n): the relevance of what is chosen, over its sum; all 0 where that is 0."""
    kept = torch.where(chosen, relevance, 0)
    total = kept.sum(1, keepdim=True)
    return kept / torch.where(total > 0, total, 1)


def _confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """The probability of the true answer, (B,); 0 where there is none."""
    known = (labels >= 0) & (labels < logits.shape[1])
    found = logits.softmax(1).gather(1, torch.where(known, labels, 0)[:, None])[:, 0]
    return torch.where(known, found, 0)


def _require(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"expected {name}, got none")
    return tensor


def _check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """The tensor, if it is of this shape, on this device, and of this dtype, None for any."""
    if tuple(tensor.shape) != shape:
        wanted, came = (",".join(map(str, size)) for size in (shape, tensor.shape))
        raise ValueError(f"{name} must be ({wanted}), got ({came})")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the projections, got {tensor.device}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    return tensor
