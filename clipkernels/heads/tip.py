"""Tip-Adapter and TIP-X: labelled images vote on those that are near them.

    A = cos(image, support), M = KL(softmax(cos(image, class)/τ) ‖ softmax(cos(support, class)/τ))
    Tip-Adapter:  scale · cos(image, class) + α Σ exp(-β(1 - A))          sums over the support of each class
    TIP-X:        … + γ mean ψ(-M),  ψ affine, from the range of -M to that of A within the support

Neither A nor M is ever whole in memory for the images: A is summed by class as it is made (`ops.affinity`), and the
sums of ψ(-M) by class are one product of (t,K) with (K,K).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkernels import ops, reference
from clipkernels.heads.calip import check_labels
from clipkernels.heads.search import Found, grid, search
from clipkernels.heads.zero_shot import ZeroShot

if TYPE_CHECKING:
    from clipkernels.patch import Encoded

# Numbers of a product of the support with itself that are held at once.
PIECE = 1 << 24


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
        ValueError: shapes that do not fit, labels outside of the classes.
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
        self.zero_shot = ZeroShot(text, scale)
        self.alpha, self.beta = alpha, beta
        self._support = self.zero_shot.text.new_empty(0, text.shape[1])
        self._labels = torch.empty(0, dtype=torch.int64, device=text.device)
        self.update(features, labels)

    @property
    def counts(self) -> Tensor:
        """Images of the support in each class, (K,) int64."""
        return self._offsets.diff()

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Adds images (m,E) of classes (m,) to the support, behind those of their class.

        Raises:
            ValueError: as at construction; the support is then as it was.
        """
        classes, width = self.zero_shot.text.shape
        if features.ndim != 2 or features.shape[1] != width:
            raise ValueError(f"features must be (n,E) with E = {width}, got {tuple(features.shape)}")
        labels = check_labels(labels, len(features), classes).to(self._labels.device)
        new = normalize(features.detach().to(self._support), dim=1)
        self._meet(self._support, new)
        support, labels = torch.cat([self._support, new]), torch.cat([self._labels, labels])
        order, self._offsets = reference.sort_by_class(labels, classes)
        self._support, self._labels = support[order], labels[order]

    def __call__(self, features: Tensor | Encoded) -> Tensor:
        """Logits (B,K) of image embeddings (B,E), or of the embedding of an `Encoded`.

        Raises:
            ValueError: features that are not (B,E) with the E of the text.
        """
        return self.zero_shot(features) + self.alpha * self._votes(self._queries(features), self.beta)

    def fit(self, features: Tensor | Encoded, labels: Tensor) -> float:
        """Sets the weights to the best of the published grid on a validation split.

        Args:
            features: (n,E), or an `Encoded`, of images that are neither of the support nor of those reported on.
            labels: (n,) int64, the true classes.
        Returns:
            the accuracy there, 0 to 1; of equally good weights the lowest are taken, beta first.
        Raises:
            ValueError: shapes or labels that do not fit.
        """
        with torch.no_grad():
            first = self.zero_shot(features)
            labels = check_labels(labels, *first.shape).to(first.device)
            queries, best, beta = self._queries(features), Found(-1.0, 0.0, 0.0), self.beta
            for candidate in grid(1, 50, 200).tolist():
                found = self._search(first, self._votes(queries, candidate), queries, labels)
                if found.accuracy > best.accuracy:
                    best, beta = found, candidate
        self.beta = beta
        self._take(best)
        return best.accuracy

    def _meet(self, old: Tensor, new: Tensor) -> None:
        """Called before images `new` (m,E) join those of the support."""

    def _search(self, first: Tensor, votes: Tensor, queries: Tensor, labels: Tensor) -> Found:
        return search(first, torch.zeros_like(first), votes, labels, grid(0, 1, 1), grid(0.1, 50, 20))

    def _take(self, found: Found) -> None:
        self.alpha = found.second

    def _queries(self, features: Tensor | Encoded) -> Tensor:
        """Normalised embeddings (B,E); the support moves to where they are."""
        image = features if isinstance(features, Tensor) else features.embedding
        dtype = torch.promote_types(image.dtype, self._support.dtype)
        if (self._support.device, self._support.dtype) != (image.device, dtype):
            self._support = self._support.to(image.device, dtype)
            self._labels, self._offsets = self._labels.to(image.device), self._offsets.to(image.device)
        return normalize(image.to(dtype), dim=1)

    def _votes(self, queries: Tensor, beta: float) -> Tensor:
        with torch.autocast(queries.device.type, enabled=False):
            return ops.affinity(
                queries, self._support, self._labels, len(self._offsets) - 1, beta, offsets=self._offsets
            )


class Extrema(NamedTuple):
    """The smallest and largest cosine and KL divergence between two images of the support."""

    near: float = float("inf")
    nearest: float = float("-inf")
    like: float = float("inf")
    unlike: float = float("-inf")


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
        ValueError: shapes that do not fit, labels outside of the classes, a tau that is not positive, another reduce.
    Guarantees: as `TipAdapter`.
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
        if not 0 < tau < float("inf"):
            raise ValueError(f"tau must be positive, got {tau!r}")
        if reduce not in ("mean", "sum"):
            raise ValueError(f'reduce must be "mean" or "sum", got {reduce!r}')
        self.gamma, self.tau, self.reduce = gamma, tau, reduce
        self._extrema = Extrema()
        super().__init__(text, features, labels, alpha, beta, scale=scale)

    def update(self, features: Tensor, labels: Tensor) -> None:
        super().update(features, labels)
        _, leanings = self._shares(self._support)
        self._mass = torch.segment_reduce(leanings, "sum", offsets=self._offsets, axis=0)

    def __call__(self, features: Tensor | Encoded) -> Tensor:
        return super().__call__(features) + self.gamma * self._likeness(self._queries(features))

    def _meet(self, old: Tensor, new: Tensor) -> None:
        # Every pair of different images one of which is new; a divergence is not the same both ways.
        images, known = torch.cat([old, new]), len(old)
        (shares, leanings), count = self._shares(images), len(images)
        certain, at = (shares * leanings).sum(1), torch.arange(count, device=images.device)
        rows, found = max(1, PIECE // max(1, count)), [self._extrema]
        for start in (*range(0, known, rows), *range(known, count, rows)):
            stop, left = (min(start + rows, known), known) if start < known else (start + rows, 0)
            others = at[left:] != at[start:stop, None]
            near = (images[start:stop] @ images[left:].T)[others]
            apart = (certain[start:stop, None] - shares[start:stop] @ leanings[left:].T)[others]
            if near.numel():
                found.append(Extrema(*(float(x) for x in (*near.aminmax(), *apart.aminmax()))))
        low, high, like, unlike = zip(*found, strict=True)
        self._extrema = Extrema(min(low), max(high), min(like), max(unlike))

    def _shares(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """softmax(cos(image, class)/τ) and the logarithm of K times that, both (n,K): divergences are differences of
        the latter, small numbers where the plain logarithm's are large."""
        leanings = images @ self.zero_shot.text.to(images).T / self.tau
        leanings = leanings - (leanings.logsumexp(1, keepdim=True) - math.log(leanings.shape[1]))
        return leanings.exp() / leanings.shape[1], leanings

    def _likeness(self, queries: Tensor) -> Tensor:
        """The mean, or the sum, of ψ(-M) over the support of each class, (B,K)."""
        near, nearest, like, unlike = self._extrema
        if len(self._support) < 2:
            return torch.zeros_like(self.zero_shot(queries))
        slope = (nearest - near) / (unlike - like) if unlike > like else 0.0
        shares, leanings = self._shares(queries)
        counts, mass = self.counts.to(shares), self._mass.to(shares)
        # ψ(-M) = near + slope·(unlike - M), M = Σ s log s - s·log S, the latter summed by class.
        with torch.autocast(shares.device.type, enabled=False):
            each = near + slope * (unlike - (shares * leanings).sum(1, keepdim=True))
            total = counts * each + slope * (shares @ mass.T)
        if self.reduce == "mean":
            total = total / counts.clamp_min(1)
        return torch.where(counts > 0, total, near)

    def _search(self, first: Tensor, votes: Tensor, queries: Tensor, labels: Tensor) -> Found:
        return search(first, votes, self._likeness(queries), labels, grid(0.1, 50, 20), grid(0.1, 30, 50))

    def _take(self, found: Found) -> None:
        self.alpha, self.gamma = found.first, found.second
