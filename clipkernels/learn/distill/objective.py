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
from clipkernels.learn.distill.teacher import TeacherFeatures
from clipkernels.reference.order import inverse_of, strongest_first
from clipkernels.reference.precision import exactly, widened

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
    """The objective with its projections, a module to be trained beside the student: `loss = task + distil(…).loss`.

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
            features: what the teacher says of the batch; `text` and `image` always, `words` and `regions` with the
                states of the branch, `answers` where the weight asks the teacher.
            text: (B,n_t,d) the student's text states, one for each of the teacher's words, padding included.
            text_pooled: (B,d) its state of the whole text.
            text_mask: (B,n_t) bool, False for padding, beside what the teacher leaves out.
            prior: (B,n_t) or (n_t,) q ≥ 0, such as 1 for content words and 0 for others; None is all ones.
            visual: (B,n_v,d) the student's visual states, one for each of the teacher's regions.
            visual_pooled: (B,d) its state of the whole image.
            visual_mask: (B,n_v) bool, False for padding.
            logits: (B,a) the student's answers, where the weight asks it.
            labels: (B,) int64 the true answers, where there is a weight.
        Returns:
            Distilled.
        Raises:
            ValueError: shapes that do not fit, states without their branch, or what a term needs and is not given.
        Guarantees: no (B,n,E) of the student is ever in memory; no host sync; no gradient through relevance, choice and
            weight.
        """
        image, sentence = _needed(features.image, "features.image"), _needed(features.text, "features.text")
        _expect("features.image", image, (len(image), self.width))
        _expect("features.text", sentence, (len(image), self.width))
        weight = self._weights(image, features.answers, logits, labels)
        words = _both(features.words_mask, text_mask, text)
        regions = _both(features.regions_mask, visual_mask, visual)
        told = self._branch("text", self.text, text, text_pooled, features.words, sentence, image, words, prior)
        seen = self._branch("visual", self.visual, visual, visual_pooled, features.regions, image, sentence, regions)
        terms = [*told.terms, *seen.terms]
        if not terms:
            raise ValueError("expected states of the student, text, text_pooled, visual or visual_pooled, got none")
        distance = torch.stack(terms).sum(0)
        return Distilled(self.strength * (weight * distance).mean(), distance, weight, told.share, seen.share)

    def _branch(
        self,
        name: str,
        projection: nn.Linear | None,
        hidden: Tensor | None,
        pooled: Tensor | None,
        guide: Tensor | None,
        whole: Tensor,
        other: Tensor,
        mask: Tensor | None,
        prior: Tensor | None = None,
    ) -> _Branch:
        """The terms (B,) of the tokens and of the whole, of a branch, and ρ̂."""
        terms: list[Tensor] = []
        share = None
        if projection is None:
            if hidden is not None or pooled is not None:
                raise ValueError(f"expected no {name} states, got some: make this with {name}= their width")
            return _Branch(terms, share)
        if hidden is not None and mask is not None:
            _expect(name, hidden, (len(whole), *hidden.shape[1:-1], projection.in_features))
            named = "features.words" if name == "text" else "features.regions"
            guide = _needed(guide, named)
            _expect(f"{named}, one for each of the student's tokens,", guide, (*hidden.shape[:2], self.width))
            relevance = relevance_of(guide, other, mask, self.temperature, prior)
            chosen = choose(relevance, mask, self.keep)
            share = shares(relevance, chosen)
            terms.append(ops.targeted_l1(hidden, guide, projection.weight, share, chosen))
        if pooled is not None:
            _expect(f"{name}_pooled", pooled, (len(whole), projection.in_features))
            one = torch.ones(len(whole), 1, device=pooled.device)
            terms.append(ops.targeted_l1(pooled[:, None], whole[:, None], projection.weight, one, one.bool()))
        return _Branch(terms, share)

    @torch.no_grad()
    def _weights(self, image: Tensor, answers: Tensor | None, logits: Tensor | None, labels: Tensor | None) -> Tensor:
        """w (B,) fp32."""
        batch = image.shape[0]
        if self.weight is None:
            return torch.ones(batch, device=image.device)
        labels = _needed(labels, f"labels with weight {self.weight!r}")
        answers = _needed(answers, f"features.answers with weight {self.weight!r}")
        _expect("labels", labels, (batch,))
        _expect("features.answers", answers, (batch, *answers.shape[1:-1], self.width))
        with exactly(image):
            alike = (normalize(answers.float(), dim=-1) @ normalize(image.float(), dim=-1)[..., None])[..., 0]
            teacher = _confidence(self.scale * alike, labels)
            if self.weight == "teacher":
                return teacher
            logits = _needed(logits, f"logits with weight {self.weight!r}")
            _expect("logits", logits, tuple(answers.shape[:2]))
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
    with exactly(tokens):
        tokens = widened(tokens)
        length = torch.linalg.vector_norm(tokens, dim=2) * torch.linalg.vector_norm(widened(other), dim=1)[:, None]
        alike = (tokens @ widened(other)[..., None])[..., 0] / length.clamp(min=1e-12)
        alike = (alike / temperature).masked_fill(~mask, float("-inf"))
        share = torch.where(mask, (alike - alike.logsumexp(1, keepdim=True)).exp(), 0)  # NaN where all is padding
    return share if prior is None else torch.where(mask, share * prior.to(share.dtype), 0)


@torch.no_grad()
def choose(relevance: Tensor, mask: Tensor, keep: float) -> Tensor:
    """Which ⌈keep·n⌉ of the n tokens that mask (B,n) leaves have the highest relevance (B,n), bool; ties to the lower
    index."""
    place = inverse_of(strongest_first(relevance.masked_fill(~mask, float("-inf"))))
    count = (keep * mask.sum(1, keepdim=True, dtype=torch.float64) - 1e-9).ceil()
    return mask & (place < count)


def shares(relevance: Tensor, chosen: Tensor) -> Tensor:
    """ρ̂ (B,n): the relevance of what is chosen, over its sum; all 0 where that is 0."""
    kept = torch.where(chosen, relevance, 0)
    total = kept.sum(1, keepdim=True)
    return kept / torch.where(total > 0, total, 1)


def _confidence(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.softmax(1).gather(1, labels[:, None])[:, 0]


def _both(there: Tensor | None, own: Tensor | None, hidden: Tensor | None) -> Tensor | None:
    """The tokens (B,n) of a student that are no padding, neither the teacher's nor its own."""
    if hidden is None:
        return None
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    for name, each in (("the teacher's", there), ("the student's", own)):
        if each is not None:
            _expect(f"{name} mask", each, tuple(mask.shape))
            mask = mask & each
    return mask


def _needed(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"expected {name}, got none")
    return tensor


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        wanted, came = (",".join(map(str, size)) for size in (shape, tensor.shape))
        raise ValueError(f"{name} must be ({wanted}), got ({came})")
