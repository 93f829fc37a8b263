"""Tip-Adapter and TIP-X: labelled support images vote on the images near them.

    A = cos(image, support), M = KL(softmax(cos(image, class)/τ) ‖ softmax(cos(support, class)/τ))
    Tip-Adapter:  scale · cos(image, class) + α Σ exp(-β(1 - A))          sums over the support of each class
    TIP-X:        … + γ mean ψ(-M),  ψ affine, from the range of -M to that of A within the support

Neither A nor M is materialised for the images: `ops.affinity` sums A by class as it computes it, and the sums of ψ(-M)
by class are one product of (t,K) with (K,K).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkernels import ops, reference
from clipkernels.arguments import check_choice, check_numbers, check_positive, describe, is_list
from clipkernels.heads.arguments import check_labels, check_not_empty, check_rows, embedding_of
from clipkernels.heads.weight_search import SearchResult, search, spaced
from clipkernels.heads.zero_shot import ZeroShot
from clipkernels.reference.precision import autocast_disabled

if TYPE_CHECKING:
    from clipkernels.encode import Encoded

# Entries of the product of the support with itself that are in memory at once.
PRODUCT_ENTRIES = 1 << 24


class Extrema(NamedTuple):
    """The smallest and largest cosine, then the smallest and largest KL divergence, between two support images."""

    cosine_min: float = float("inf")
    cosine_max: float = float("-inf")
    divergence_min: float = float("inf")
    divergence_max: float = float("-inf")


class Support(NamedTuple):
    """The support images, sorted by class.

    features (n,E): L2-normalised embeddings.
    labels (n,): int64 classes.
    offsets (K+1,): int64 first row of each class.
    mass (K,K): for TIP-X, the log-probabilities of the classes, summed over the support images of each class.
    extrema: for TIP-X, the ranges that calibrate ψ.
    """

    features: Tensor
    labels: Tensor
    offsets: Tensor
    mass: Tensor
    extrema: Extrema


class TipAdapter:
    """Zero-shot logits plus the votes of labelled images.

    Args:
        text: class embeddings (K,E), any floating dtype; need not be normalised.
        features: (n,E) embeddings of the support images by the same model, any floating dtype; need not be normalised;
            n may be 0.
        labels: (n,) int64, the classes of the support images; a class without support gets no vote.
        alpha: weight of the votes.
        beta: decay rate of a vote with cosine distance.
        scale: factor of the cosines, 100 in the source; "model" as in `ZeroShot`.
    Raises:
        TypeError: text, features or labels that are no tensors.
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
        scale: float | Literal["model"] = 100.0,
    ) -> None:
        check_numbers(alpha=alpha, beta=beta)
        self.zero_shot = ZeroShot(text, scale)
        self.alpha, self.beta = alpha, beta
        classes = self.zero_shot.text
        offsets = torch.zeros(len(classes) + 1, dtype=torch.int64, device=classes.device)
        mass = classes.new_zeros(len(classes), len(classes))
        self._support = Support(classes[:0], offsets[:0], offsets, mass, Extrema())
        self.update(features, labels)

    @property
    def counts(self) -> Tensor:
        """The number of support images of each class, (K,) int64."""
        return self._support.offsets.diff()

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add images (m,E) with labels (m,) to the support, each after the earlier images of its class.

        Raises:
            ValueError: as at construction; the support is left unchanged.
        """
        classes, width = self.zero_shot.text.shape
        check_rows("features", "(n,E)", features, width)
        check_labels(labels, len(features), classes)
        # Outside of inference mode, because the support may be used after it, and in the support's own precision.
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

    def fit(self, features: Tensor | Encoded, labels: Tensor, grid: tuple[float, float] = (7.0, 3.0)) -> float:
        """Set alpha and beta to the best values of the published grid on a validation split.

        The grid has 200 values of beta from 0.1 to grid[0] and 20 of alpha from 0.1 to grid[1], without the ends.

        Args:
            features: (n,E), or an `Encoded`, of images that are neither in the support nor in the test set.
            labels: (n,) int64, the true classes.
            grid: ends of the ranges of beta and alpha: (7, 3) for ImageNet in the released code, and up to (50, 50)
                for other data.
        Returns:
            The accuracy on these images, 0 to 1. Ties go to the lowest weights, beta first.
        Raises:
            ValueError: shapes or labels that do not fit, no image, or a grid whose ends are not finite and above 0.1.
        """
        return self._fit(features, labels, grid, 0.1)

    def _fit(self, features: Tensor | Encoded, labels: Tensor, ends: tuple[float, float], lowest_beta: float) -> float:
        """Search the grid of beta from `lowest_beta` to ends[0], of alpha from 0.1 to ends[1], and of further weights.

        Returns:
            The accuracy, 0 to 1.
        """
        betas, alphas = grid_of(ends, lowest_beta)
        with torch.no_grad():
            first = self.zero_shot(features)
            check_not_empty(len(first))
            labels = check_labels(labels, *first.shape).to(first.device)
            queries = self._queries(features)
            with autocast_disabled(queries):
                trial = self._weight_search(first, queries, labels, alphas)
                self.beta, best = search_betas(lambda beta: trial(self._votes(queries, beta)), betas)
        self._set_weights(best)
        return best.accuracy

    def __repr__(self) -> str:
        images = len(self._support.features)
        return f"{type(self).__name__}({self.zero_shot.describe()}, images={images}, {self._describe_weights()})"

    def _describe_weights(self) -> str:
        """The weights of the votes, for the repr."""
        return f"alpha={self.alpha:g}, beta={self.beta:g}"

    def _statistics(self, old: Support, features: Tensor, labels: Tensor) -> tuple[Extrema, Tensor]:
        """TIP-X's extrema and mass of a support whose first images are those of `old`."""
        return old.extrema, old.mass

    def _extra_logits(self, queries: Tensor) -> Tensor | float:
        """The additional terms of the logits, (B,K) or a number."""
        return 0.0

    def _weight_search(
        self, first: Tensor, queries: Tensor, labels: Tensor, alphas: Tensor
    ) -> Callable[[Tensor], SearchResult]:
        """A function from the votes (n,K) to the best of the weights other than beta."""
        return lambda votes: search_alphas(first, votes, labels, alphas)

    def _set_weights(self, result: SearchResult) -> None:
        self.alpha = result.second

    def _queries(self, features: Tensor | Encoded) -> Tensor:
        """Normalised embeddings (B,E) in fp32 or wider; the support moves to their device."""
        image = embedding_of(features, self._support.features.shape[1])
        if self._support.features.device != image.device:
            with torch.inference_mode(False):
                features, labels, offsets, mass = (tensor.to(image.device) for tensor in self._support[:4])
                self._support = Support(features, labels, offsets, mass, self._support.extrema)
        return normalize(image.to(torch.promote_types(image.dtype, self._support.features.dtype)), dim=1)

    def _votes(self, queries: Tensor, beta: float) -> Tensor:
        features, labels, offsets, *_ = self._support
        return ops.affinity(queries, features.to(queries.dtype), labels, len(offsets) - 1, beta, offsets=offsets)


def grid_of(ends: tuple[float, float], lowest_beta: float) -> tuple[Tensor, Tensor]:
    """The 200 values of beta from `lowest_beta` to ends[0], and the 20 of alpha from 0.1 to ends[1].

    Raises:
        ValueError: no two ends, or ends that are not finite and above the start.
    """
    if not is_list(ends) or len(ends) != 2:
        raise ValueError(f"grid must be the ends of the ranges of beta and alpha, got {describe(ends)}")
    for name, end, start in (("beta", ends[0], lowest_beta), ("alpha", ends[1], 0.1)):
        check_numbers(**{f"the end of the grid of {name}": end})
        if end <= start:
            raise ValueError(f"the grid of {name} must end above {start}, got {end}")
    return spaced(lowest_beta, ends[0], 200), spaced(0.1, ends[1], 20)


def search_betas(trial: Callable[[float], SearchResult], betas: Tensor) -> tuple[float, SearchResult]:
    """The beta with the best trial, the first one of equals, and that trial."""
    best, beta = SearchResult(-1.0, 0.0, 0.0), float("nan")
    for candidate in betas.tolist():
        result = trial(candidate)
        if result.accuracy > best.accuracy:
            best, beta = result, candidate
    return beta, best


def search_alphas(first: Tensor, votes: Tensor, labels: Tensor, alphas: Tensor) -> SearchResult:
    """The best weight of the votes (n,K) beside logits `first` (n,K), as the second weight of the result."""
    return search(first, torch.zeros_like(first), votes, labels, spaced(0, 1, 1), alphas)


class TipX(TipAdapter):
    """Tip-Adapter plus votes by the similarity of class distributions; it needs no labelled image of the task.

    ψ is calibrated on the pairs of different support images and stays fixed, so a prediction does not depend on other
    test images. Outside of the range of the support ψ is extrapolated linearly.

    Args:
        text: class embeddings (K,E), any floating dtype; need not be normalised.
        features: (n,E) embeddings of the support images by the same model, any floating dtype; need not be normalised;
            n may be 0.
        labels: (n,) int64, the classes of the support images; a class without support gets no α term, and the smallest
            cosine of the support as its γ term.
        alpha: weight of the votes by cosine.
        beta: decay rate of these votes with cosine distance.
        gamma: weight of the votes by KL divergence between class distributions.
        tau: temperature of the softmax of the cosines over the classes.
        reduce: "mean" divides a class's γ term by its number of images; "sum" does not, as published, and so favours
            classes with more images.
        scale: factor of the cosines, 100 in the source; "model" as in `ZeroShot`.
    Raises:
        ValueError: as `TipAdapter`, a tau that is not positive, another reduce.
    Guarantees: as `TipAdapter`. Calibration takes n²·(E + K) multiplications, and m·n·(E + K) for m more images.
    Source: SuS-X, arXiv 2211.16198, section 3.3. The paper has -ψ(M), which gives the same prediction if all classes
        have equally many images.
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
        scale: float | Literal["model"] = 100.0,
    ) -> None:
        check_positive(tau=tau)
        check_numbers(gamma=gamma)
        check_choice("reduce", reduce, "mean", "sum")
        self.gamma, self.tau, self.reduce = gamma, tau, reduce
        super().__init__(text, features, labels, alpha, beta, scale=scale)

    def _describe_weights(self) -> str:
        return f"{super()._describe_weights()}, gamma={self.gamma:g}, tau={self.tau:g}, reduce={self.reduce!r}"

    def _statistics(self, old: Support, features: Tensor, labels: Tensor) -> tuple[Extrema, Tensor]:
        old_count, count = len(old.features), len(features)
        probabilities, logs = self._class_probabilities(features)
        order, offsets = reference.sort_by_class(labels[old_count:], len(old.mass))
        mass = old.mass + torch.segment_reduce(logs[old_count:][order], "sum", offsets=offsets, axis=0)
        # Every ordered pair of different images with at least one new image, because the divergence is not symmetric.
        negative_entropy, index = (probabilities * logs).sum(1), torch.arange(count, device=features.device)
        rows, extrema = max(1, PRODUCT_ENTRIES // max(1, count)), [old.extrema]
        for start in (*range(0, old_count, rows), *range(old_count, count, rows)):
            stop, first = (min(start + rows, old_count), old_count) if start < old_count else (start + rows, 0)
            is_other = index[first:] != index[start:stop, None]
            cosines = (features[start:stop] @ features[first:].T)[is_other]
            divergences = (negative_entropy[start:stop, None] - probabilities[start:stop] @ logs[first:].T)[is_other]
            if cosines.numel():
                extrema.append(Extrema(*(float(x) for x in (*cosines.aminmax(), *divergences.aminmax()))))
        cosine_min, cosine_max, divergence_min, divergence_max = zip(*extrema, strict=True)
        return Extrema(min(cosine_min), max(cosine_max), min(divergence_min), max(divergence_max)), mass

    def _class_probabilities(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """softmax(cos(image, class)/τ) and the logarithm of K times that, both (n,K)."""
        logs = images @ self.zero_shot.text.to(images).T / self.tau
        # The factor K keeps the logarithms small, and divergences are differences of them.
        logs = logs - (logs.logsumexp(1, keepdim=True) - math.log(logs.shape[1]))
        return logs.exp() / logs.shape[1], logs

    def _divergence_votes(self, queries: Tensor) -> Tensor:
        """The mean, or the sum, of ψ(-M) over the support images of each class, (B,K)."""
        support = self._support
        low, high, divergence_min, divergence_max = support.extrema
        if len(support.features) < 2:
            return queries.new_zeros(len(queries), len(support.mass))
        slope = (high - low) / (divergence_max - divergence_min) if divergence_max > divergence_min else 0.0
        probabilities, logs = self._class_probabilities(queries)
        counts, mass = support.offsets.diff().to(probabilities.dtype), support.mass.to(probabilities.dtype)
        # ψ(-M) = low + slope·(divergence_max - M), M = Σ s log s - s·log S, the latter summed by class.
        per_image = low + slope * (divergence_max - (probabilities * logs).sum(1, keepdim=True))
        total = counts * per_image + slope * (probabilities @ mass.T)
        if self.reduce == "mean":
            total = total / counts.clamp_min(1)
        return torch.where(counts > 0, total, low)

    def _extra_logits(self, queries: Tensor) -> Tensor | float:
        return self.gamma * self._divergence_votes(queries)

    def fit(self, features: Tensor | Encoded, labels: Tensor, grid: tuple[float, float] = (50.0, 50.0)) -> float:
        """Set alpha, beta and gamma to the best values of the published grid on a validation split.

        The grid has 200 values of beta from 1 to grid[0], 20 of alpha from 0.1 to grid[1], and 50 of gamma, without
        the ends. Published gammas go from 0.1 to 30 and multiply a sum over a class's images. With reduce="mean" the
        range is therefore multiplied by the mean number of images of the classes that have any.

        Args:
            features: (n,E), or an `Encoded`, of images that are neither in the support nor in the test set.
            labels: (n,) int64, the true classes.
            grid: ends of the ranges of beta and alpha, both 50 in the released code.
        Returns:
            The accuracy on these images, 0 to 1. Ties go to the lowest weights, beta first, then alpha.
        Raises:
            ValueError: as `TipAdapter.fit`; beta's range must end above 1.
        """
        return self._fit(features, labels, grid, 1.0)

    def _weight_search(
        self, first: Tensor, queries: Tensor, labels: Tensor, alphas: Tensor
    ) -> Callable[[Tensor], SearchResult]:
        divergence_votes = self._divergence_votes(queries)
        occupied = self.counts[self.counts > 0]
        unit = float(occupied.double().mean()) if self.reduce == "mean" and len(occupied) else 1.0
        gammas = unit * spaced(0.1, 30, 50)
        return lambda votes: search(first, votes, divergence_votes, labels, alphas, gammas)

    def _set_weights(self, result: SearchResult) -> None:
        self.alpha, self.gamma = result.first, result.second
