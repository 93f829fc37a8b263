"""CLIP-TD's objective: pull a student's hidden states toward a frozen CLIP's, on the tokens CLIP finds relevant.

    text     ρ_i = softmax_i(cos(g_T(i), g_I)/t)·q_i        visual   ρ_j = softmax_j(cos(g_I(j), g_T)/t)
    chosen   the ⌈κn⌉ tokens of highest ρ,  ρ̂ = ρ/Σ ρ over them
    distance Σ ρ̂_i ‖P_t h_i - g_T(i)‖₁/E + ‖P_t h_T - g_T‖₁/E,  and the same with P_v for the visual states
    weight   w = c_T/(c_T + c_S), from the teacher's and the student's confidence in the true answer
    loss     λ·mean(w·distance), to be added to the task's loss

This is a reconstruction, because only the abstract of CLIP-TD (arXiv 2201.05729) is public. The objective takes tensors
instead of a model, so any student can be trained. Its two projections are trained with the student and then discarded.
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
    """The loss of a batch and its components.

    loss (): λ·mean(w·distance), differentiable in the student's states and in the projections.
    distance (B,): the sum of all terms of an instance, differentiable in the same tensors; 0 if no token is chosen and
        no state is pooled.
    weight (B,): w, without gradient.
    text (B,n_t), visual (B,n_v): ρ̂ of every token, 0 for tokens that are not chosen, without gradient; None without
        states.
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

    Plain distillation, with equal tokens and weight 1, is keep=1, temperature=math.inf and weight=None.

    Args:
        teacher: a `Teacher` or a `TeacherCache`, of which only the width E is used; or E.
        text: width d of the student's text states; None disables the text branch.
        visual: width d of the student's visual states; None disables the visual branch.
        keep: κ, the share of the tokens that are not padding; ⌈κn⌉ tokens of each instance are chosen.
        temperature: t of the relevance; math.inf makes all tokens equally relevant.
        weight: "ratio" c_T/(c_T + c_S), "teacher" c_T, "teacher_minus_student" max(c_T - c_S, 0), or None for 1.
        scale: factor of the teacher's cosines before the softmax over the answers.
        strength: λ.
    Raises:
        ValueError: neither branch, or a number out of its range.
    Source: CLIP-TD, arXiv 2201.05729; a reconstruction, because only its abstract is public.
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
        if min(width, *(state for state in (text, visual) if state is not None)) < 1:
            raise ValueError(f"widths must be at least one, got teacher={width}, text={text}, visual={visual}")
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be a number in (0, 1], got {keep!r}")
        if not temperature > 0:  # infinite: plain means
            raise ValueError(f"temperature must be a positive number, got {temperature!r}")
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
        """The loss of a batch and its components.

        If the student's tokens are not the teacher's, align the features first: `TeacherFeatures.align`.

        Args:
            features: the teacher's features of the batch: `words` and `image` for `text`, `regions` and `text` for
                `visual`, `text` for `text_pooled`, `image` for `visual_pooled`; `image` and `answers` for a weight.
            text: (B,n_t,d) the student's text states, one for each of the teacher's words, padding included.
            text_pooled: (B,d) the student's state of the whole text.
            text_mask: (B,n_t) bool, False for padding; combined with the teacher's mask.
            prior: (B,n_t) or (n_t,) q, such as 1 for content words and 0 for others; values below 0 count as 0; None is
                all ones.
            visual: (B,n_v,d) the student's visual states, one for each of the teacher's regions.
            visual_pooled: (B,d) the student's state of the whole image.
            visual_mask: (B,n_v) bool, False for padding; combined with the teacher's mask.
            logits: (B,a) the student's logits over the answers, if the weight uses the student's confidence.
            labels: (B,) int64 the true answers, if there is a weight. An instance with a label outside of 0..a-1, such
                as cross-entropy's -100, gets weight 0.
        Returns:
            Distilled.
        Raises:
            ValueError: shapes, dtypes or devices that do not fit, states without their branch, or missing features,
                logits or labels.
        Guarantees: no (B,n,E) tensor of the student is materialised, except by the reference when it records a graph;
            no host sync on triton; no gradient through relevance, choice and weight. Projections run in the dtype of
            the states, or of autocast. Under DistributedDataParallel wrap this together with the student in one module.
        """
        text_branch = self._branch("text", text, text_pooled, text_mask, features, prior)
        visual_branch = self._branch("visual", visual, visual_pooled, visual_mask, features, None)
        terms = [*text_branch.terms, *visual_branch.terms]
        if not terms:
            raise ValueError("expected states of the student, text, text_pooled, visual or visual_pooled, got none")
        distance = torch.stack(terms).sum(0)
        weight = self._weights(len(distance), distance.device, features, logits, labels)
        loss = self.strength * (weight * distance).sum() / max(1, len(distance))
        return Distilled(loss, distance, weight, text_branch.share, visual_branch.share)

    def _branch(
        self,
        name: Literal["text", "visual"],
        hidden: Tensor | None,
        pooled: Tensor | None,
        student_mask: Tensor | None,
        features: TeacherFeatures,
        prior: Tensor | None,
    ) -> _Branch:
        """The terms (B,) of a branch, for its tokens and for its pooled state, and ρ̂."""
        terms: list[Tensor] = []
        state, share, projection = pooled if hidden is None else hidden, None, getattr(self, name)
        if state is None:
            return _Branch(terms, share)
        if projection is None:
            raise ValueError(f"expected no {name} states, got some: construct this module with {name}= their width")
        batch, device = len(state), projection.weight.device
        parts = ("words", "words_mask", "image") if name == "text" else ("regions", "regions_mask", "text")
        if hidden is not None:
            tokens = (batch, *hidden.shape[1:-1])
            _check_tensor(name, hidden, (*tokens[:2], projection.in_features), device)
            guide, teacher_mask, other = (getattr(features, part) for part in parts)
            label = f"features.{parts[0]}, one for each of the student's tokens,"
            guide = _check_tensor(label, _require(guide, f"features.{parts[0]}"), (*tokens, self.width), device)
            label = f"features.{parts[2]}"
            other = _check_tensor(label, _require(other, label), (batch, self.width), device)
            mask = torch.ones(tokens, dtype=torch.bool, device=device)
            for label, part in ((f"features.{parts[1]}", teacher_mask), (f"{name}_mask", student_mask)):
                mask = mask if part is None else mask & _check_tensor(label, part, tokens, device, torch.bool)
            if prior is not None:
                _check_tensor("prior", prior, tokens if prior.ndim > 1 else tokens[1:], device)
            relevance = relevance_of(guide, other, mask, self.temperature, prior)
            chosen = select_top(relevance, mask, self.keep)
            share = normalize_relevance(relevance, chosen)
            terms.append(ops.targeted_l1(hidden, guide, projection.weight.to(hidden.dtype), share, chosen))
        if pooled is not None:
            label = "features.text" if name == "text" else "features.image"
            whole = getattr(features, label.removeprefix("features."))
            whole = _check_tensor(label, _require(whole, label), (batch, self.width), device)
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
        suffix = f" with weight {self.weight!r}"
        labels = _check_tensor("labels", _require(labels, "labels" + suffix), (batch,), device, torch.int64)
        image = _check_tensor("features.image", _require(features.image, "features.image"), (batch, self.width), device)
        answers = _require(features.answers, "features.answers" + suffix)
        _check_tensor("features.answers", answers, (batch, *answers.shape[1:-1], self.width), device)
        with autocast_disabled(image):
            cosines = (normalize(answers.float(), dim=-1) @ normalize(image.float(), dim=-1)[..., None])[..., 0]
            teacher = _confidence(self.scale * cosines, labels)
            if self.weight == "teacher":
                return teacher
            logits = _check_tensor("logits", _require(logits, "logits" + suffix), tuple(answers.shape[:2]), device)
            student = _confidence(logits.float(), labels)
            if self.weight == "teacher_minus_student":
                return (teacher - student).clamp(min=0)
            total = teacher + student
            return teacher / torch.where(total > 0, total, 1)


@torch.no_grad()
def relevance_of(
    tokens: Tensor, other: Tensor, mask: Tensor, temperature: float = 0.07, prior: Tensor | None = None
) -> Tensor:
    """ρ (B,n), fp32 (fp64 for fp64 tokens): the relevance of each token to the other modality's embedding.

        cosine_similarity(tokens, other[:, None], dim=2).div(temperature).softmax(1) * prior

    Args:
        tokens: (B,n,E) the teacher's words or regions.
        other: (B,E) the teacher's embeddings of the images of those words, or of the texts of those regions.
        mask: (B,n) bool; tokens at False may hold anything, are ignored and get 0.
        temperature: t.
        prior: (B,n) or (n,) weights q; None is all ones.
    """
    with autocast_disabled(tokens):
        tokens = upcast(tokens)
        norms = torch.linalg.vector_norm(tokens, dim=2) * torch.linalg.vector_norm(upcast(other), dim=1)[:, None]
        logits = (tokens @ upcast(other)[..., None])[..., 0] / norms.clamp(min=1e-12)
        logits = (logits / temperature).masked_fill(~mask, float("-inf"))
        share = torch.where(
            mask, (logits - logits.logsumexp(1, keepdim=True)).exp(), 0
        )  # the exponential is NaN if all tokens are padding
    return share if prior is None else torch.where(mask, share * prior.to(share.dtype).clamp(min=0), 0)


@torch.no_grad()
def select_top(relevance: Tensor, mask: Tensor, keep: float) -> Tensor:
    """The mask (B,n) of the ⌈keep·n⌉ tokens with the highest relevance (B,n), of the n at True in `mask` (B,n).

    Ties go to the lower index.
    """
    rank = inverse_of(strongest_first(relevance.masked_fill(~mask, float("-inf"))))
    count = (keep * mask.sum(1, keepdim=True, dtype=torch.float64)).ceil()
    return mask & (rank < count)


def normalize_relevance(relevance: Tensor, chosen: Tensor) -> Tensor:
    """ρ̂ (B,n): the relevance of the chosen tokens, divided by its sum; all 0 if the sum is 0."""
    chosen_relevance = torch.where(chosen, relevance, 0)
    total = chosen_relevance.sum(1, keepdim=True)
    return chosen_relevance / torch.where(total > 0, total, 1)


def _confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """The probability (B,) of the true answer; 0 for labels out of range."""
    is_valid = (labels >= 0) & (labels < logits.shape[1])
    probability = logits.softmax(1).gather(1, torch.where(is_valid, labels, 0)[:, None])[:, 0]
    return torch.where(is_valid, probability, 0)


def _require(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"expected {name}, got none")
    return tensor


def _check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """The tensor, if it has this shape, device and dtype; a dtype of None allows any."""
    if tuple(tensor.shape) != shape:
        expected, actual = (",".join(map(str, size)) for size in (shape, tensor.shape))
        raise ValueError(f"{name} must be ({expected}), got ({actual})")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the projections, got {tensor.device}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    return tensor
