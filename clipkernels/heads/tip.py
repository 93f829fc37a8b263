"""Tip-Adapter and TIP-X: labelled images vote on those that are near them.

    A = cos(image, support), M = KL(softmax(cos(image, class)/τ) ‖ softmax(cos(support, class)/τ))
    Tip-Adapter:  scale · cos(image, class) + α Σ exp(-β(1 - A))          sums over the support of each class
    TIP-X:        … + γ mean ψ(-M),  ψ affine, from the range of -M to that of A within the support

Neither A nor M is ever whole in memory for the images: A is summed by class as it is made (`ops.affinity`), and the
sums of ψ(-M) by class are one product of (t,K) with (K,K).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkernels import ops, reference
from clipkernels.arguments import check_numbers
from clipkernels.heads.arguments import check_labels, check_positive, check_not_empty
from clipkernels.heads.weight_search import SearchResult, grid, search
from clipkernels.heads.zero_shot import ZeroShot
from clipkernels.reference.precision import autocast_disabled

if TYPE_CHECKING:
    from clipkernels.encode import Encoded

# Numbers of a product of the support with itself that are held at once.
PRODUCT_ENTRIES = 1 << 24


class Extrema(NamedTuple):
    """The smallest and largest cosine and KL divergence between two images of the support."""

    near: float = float("inf")
    nearest: float = float("-inf")
    like: float = float("inf")
    unlike: float = float("-inf")


class Support(NamedTuple):
    """Images that vote, sorted by class: features (n,E), labels (n,), the offsets (K+1,) of the classes, and for TIP-X
    what those of each class say of the classes, summed (K,K), and their extrema."""

    features: Tensor
    labels: Tensor
    offsets: Tensor
    mass: Tensor
    extrema: Extrema


class TipAdapter:
    """Zero-shot logits, and the votes of labelled images.

    Args:
        text: class embeddings (K,E), any floating dtype; need not be normalised.
        features: (n,E) image embeddings of the support, likewise, of the same model; n may be 0.
        labels: (n,) int64, their classes; a class without support gets no vote.
        alpha: weight of the votes.
        beta: how fast a vote fades with distance.
        scale: what the cosines are multiplied by, 100 in the source.
    Raises:
        ValueError: shapes that do not fit, labels outside of the classes, rows or numbers that are not finite.
    Guarantees: computed in fp32 (fp64 stays fp64); the support is sorted by class once.
    Source: Tip-Adapter, arXiv 2111.03930, section 3.2.
    """

    needs: tuple[str, ...] = ()

    def __init__(
        self,
        text: Tensor,
        features: Tensor,
        labels: Tensor,
        alpha: float = 1.17,
        beta: float = 1.0,
        *,
        scale: float = 100.0,
    ) -> None:
        check_numbers(alpha=alpha, beta=beta, scale=scale)
        self.zero_shot = ZeroShot(text, scale)
        self.alpha, self.beta = alpha, beta
        own = self.zero_shot.text
        none = torch.zeros(len(own) + 1, dtype=torch.int64, device=own.device)
        self._support = Support(own[:0], none[:0], none, own.new_zeros(len(own), len(own)), Extrema())
        self.update(features, labels)

    @property
    def counts(self) -> Tensor:
        """Images of the support in each class, (K,) int64."""
        return self._support.offsets.diff()

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Adds images (m,E) of classes (m,) to the support, behind those of their class.

        Raises:
            ValueError: as at construction; the support is then as it was.
        """
        classes, width = self.zero_shot.text.shape
        if features.ndim != 2 or features.shape[1] != width:
            raise ValueError(f"features must be (n,E) with E = {width}, got {tuple(features.shape)}")
        check_labels(labels, len(features), classes)
        wrong = int((~features.isfinite().all(1)).sum())
        if wrong:
            raise ValueError(f"features must be finite, got {wrong} of {len(features)} rows that are not")
        # Outside of inference mode, which the support may outlive, and in its own precision.
        old = self._support
        with torch.inference_mode(False), torch.no_grad(), autocast_disabled(old.features):
            new = normalize(features.detach().clone().to(old.features), dim=1)
            support = torch.cat([old.features, new])
            labels = torch.cat([old.labels, labels.to(old.labels.device)])
            order, offsets = reference.sort_by_class(labels, classes)
            extrema, mass = self._statistics(old, support, labels)
            self._support = Support(support[order], labels[order], offsets, mass, extrema)

    def __call__(self, features: Tensor | Encoded) -> Tensor:
        """Logits (B,K) of image embeddings (B,E), or of the embedding of an `Encoded`.

        Raises:
            ValueError: features that are not (B,E) with the E of the text.
        """
        logits, queries = self.zero_shot(features), self._queries(features)
        with autocast_disabled(queries):
            return logits + self.alpha * self._votes(queries, self.beta) + self._extra_logits(queries)

    def fit(self, features: Tensor | Encoded, labels: Tensor) -> float:
        """Sets the weights to the best of the published grid on a validation split.

        Args:
            features: (n,E), or an `Encoded`, of images that are neither of the support nor of those reported on.
            labels: (n,) int64, the true classes.
        Returns:
            the accuracy there, 0 to 1; of equally good weights the lowest are taken, beta first.
        Raises:
            ValueError: shapes or labels that do not fit, or no image.
        """
        with torch.no_grad():
            first = self.zero_shot(features)
            check_not_empty(len(first))
            labels = check_labels(labels, *first.shape).to(first.device)
            queries, best, beta = self._queries(features), SearchResult(-1.0, 0.0, 0.0), self.beta
            with autocast_disabled(queries):
                trial = self._weight_search(first, queries, labels)
                for candidate in grid(1, 50, 200).tolist():
                    found = trial(self._votes(queries, candidate))
                    if found.accuracy > best.accuracy:
                        best, beta = found, candidate
        self.beta = beta
        self._set_weights(best)
        return best.accuracy

    def _statistics(self, old: Support, features: Tensor, labels: Tensor) -> tuple[Extrema, Tensor]:
        """What TIP-X knows of a support whose first images are the old one."""
        return old.extrema, old.mass

    def _extra_logits(self, queries: Tensor) -> Tensor | float:
        """What else is added to the logits."""
        return 0.0

    def _weight_search(self, first: Tensor, queries: Tensor, labels: Tensor) -> Callable[[Tensor], SearchResult]:
        """The best of the other weights, given the votes."""
        return lambda votes: search(first, torch.zeros_like(first), votes, labels, grid(0, 1, 1), grid(0.1, 50, 20))

    def _set_weights(self, found: SearchResult) -> None:
        self.alpha = found.second

    def _queries(self, features: Tensor | Encoded) -> Tensor:
        """Normalised embeddings (B,E) in fp32 or wider; support and classes move to where they are."""
        image = features if isinstance(features, Tensor) else features.embedding
        if self._support.features.device != image.device:
            with torch.inference_mode(False):
                features, labels, offsets, mass = (tensor.to(image.device) for tensor in self._support[:4])
                self._support = Support(features, labels, offsets, mass, self._support.extrema)
        return normalize(image.to(torch.promote_types(image.dtype, self._support.features.dtype)), dim=1)

    def _votes(self, queries: Tensor, beta: float) -> Tensor:
        features, labels, offsets, *_ = self._support
        return ops.affinity(queries, features.to(queries.dtype), labels, len(offsets) - 1, beta, offsets=offsets)


class TipX(TipAdapter):
    """Tip-Adapter, and a vote by how alike images are to the classes: it needs no labelled image of the task.

    ψ is calibrated on the pairs of different images of the support and stays fixed, so a prediction depends on no other
    test image; beyond what the support has seen it goes on in a straight line.

    Args:
        text: class embeddings (K,E), any floating dtype; need not be normalised.
        features: (n,E) image embeddings of the support, likewise, of the same model; n may be 0.
        labels: (n,) int64, their classes; a class without support gets no α term, and the least near for the γ term.
        alpha: weight of the votes by nearness.
        beta: how fast these fade with distance.
        gamma: weight of the votes by likeness to the classes.
        tau: temperature of the softmax over the classes, of cosines.
        reduce: "mean" divides a class's γ term by its images; "sum" as published, for which classes of more images
            count for more.
        scale: what the cosines are multiplied by, 100 in the source.
    Raises:
        ValueError: as `TipAdapter`, a tau that is not positive, another reduce.
    Guarantees: as `TipAdapter`. Calibrating takes n²·(E + K) multiplications, and m·n·(E + K) for m images more.
    Source: SuS-X, arXiv 2211.16198, section 3.3. Published is -ψ(M): the same prediction where all classes have
        equally many images.
    """

    def __init__(
        self,
        text: Tensor,
        features: Tensor,
        labels: Tensor,
        alpha: float = 1.17,
        beta: float = 1.0,
        gamma: float = 1.0,
        tau: float = 0.5,
        reduce: Literal["mean", "sum"] = "mean",
        *,
        scale: float = 100.0,
    ) -> None:
        check_positive(tau=tau)
        check_numbers(gamma=gamma)
        if reduce not in ("mean", "sum"):
            raise ValueError(f'reduce must be "mean" or "sum", got {reduce!r}')
        self.gamma, self.tau, self.reduce = gamma, tau, reduce
        super().__init__(text, features, labels, alpha, beta, scale=scale)

    def _statistics(self, old: Support, features: Tensor, labels: Tensor) -> tuple[Extrema, Tensor]:
        known, count = len(old.features), len(features)
        shares, leanings = self._shares(features)
        order, offsets = reference.sort_by_class(labels[known:], len(old.mass))
        mass = old.mass + torch.segment_reduce(leanings[known:][order], "sum", offsets=offsets, axis=0)
        # Every pair of different images one of which is new; a divergence is not the same both ways.
        certain, at = (shares * leanings).sum(1), torch.arange(count, device=features.device)
        rows, found = max(1, PRODUCT_ENTRIES // max(1, count)), [old.extrema]
        for start in (*range(0, known, rows), *range(known, count, rows)):
            stop, left = (min(start + rows, known), known) if start < known else (start + rows, 0)
            others = at[left:] != at[start:stop, None]
            near = (features[start:stop] @ features[left:].T)[others]
            apart = (certain[start:stop, None] - shares[start:stop] @ leanings[left:].T)[others]
            if near.numel():
                found.append(Extrema(*(float(x) for x in (*near.aminmax(), *apart.aminmax()))))
        low, high, like, unlike = zip(*found, strict=True)
        return Extrema(min(low), max(high), min(like), max(unlike)), mass

    def _shares(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """softmax(cos(image, class)/τ) and the logarithm of K times that, both (n,K): divergences are differences of
        the latter, small numbers where the plain logarithm's are large."""
        leanings = images @ self.zero_shot.text.to(images).T / self.tau
        leanings = leanings - (leanings.logsumexp(1, keepdim=True) - math.log(leanings.shape[1]))
        return leanings.exp() / leanings.shape[1], leanings

    def _likeness(self, queries: Tensor) -> Tensor:
        """The mean, or the sum, of ψ(-M) over the support of each class, (B,K)."""
        support = self._support
        near, nearest, like, unlike = support.extrema
        if len(support.features) < 2:
            return queries.new_zeros(len(queries), len(support.mass))
        slope = (nearest - near) / (unlike - like) if unlike > like else 0.0
        shares, leanings = self._shares(queries)
        counts, mass = support.offsets.diff().to(shares.dtype), support.mass.to(shares.dtype)
        # ψ(-M) = near + slope·(unlike - M), M = Σ s log s - s·log S, the latter summed by class.
        each = near + slope * (unlike - (shares * leanings).sum(1, keepdim=True))
        total = counts * each + slope * (shares @ mass.T)
        if self.reduce == "mean":
            total = total / counts.clamp_min(1)
        return torch.where(counts > 0, total, near)

    def _extra_logits(self, queries: Tensor) -> Tensor | float:
        return self.gamma * self._likeness(queries)

    def _weight_search(self, first: Tensor, queries: Tensor, labels: Tensor) -> Callable[[Tensor], SearchResult]:
        likeness = self._likeness(queries)
        return lambda votes: search(first, votes, likeness, labels, grid(0.1, 50, 20), grid(0.1, 30, 50))

    def _set_weights(self, found: SearchResult) -> None:
        self.alpha, self.gamma = found.first, found.second
