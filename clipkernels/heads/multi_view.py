"""Objects of several views, such as the depth maps of a point cloud: a weighted sum of a head's logits.

logits = Σ_v w_v · head(view v)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipkernels.arguments import check_int, check_numbers, check_positive, describe, is_list, shape_of
from clipkernels.heads.arguments import check_batches, check_labels, check_not_empty
from clipkernels.heads.weight_search import search
from clipkernels.heads.zero_shot import ZeroShot
from clipkernels.messages import quantity

if TYPE_CHECKING:
    from clipkernels.encode import Encoded

GRID = (0.25, 0.5, 0.75, 1.0)
"""The weights that the released code of PointCLIP tries for each view."""


class MultiView:
    """A head of objects that are seen in V views each.

    The views of an object are successive images: those of `ck.data.depth_maps(points).flatten(0, 1)`. PointCLIP has
    this head over zero-shot logits. Over CALIP, whose attention then runs within each view, and over Tip-Adapter, whose
    support then holds views, it is ours.

    Args:
        head: a head that reads each image by itself, such as `ck.ZeroShot`, `ck.CALIP` or `ck.TipAdapter`.
        weights: V numbers; None is 1/V each.
        views: V; None is the number of weights, or 6 without them.
    Raises:
        TypeError: a head that is not callable or has no attribute `needs`.
        ValueError: a head that remembers images, as `ck.Reservoir` and `ck.TDA`, or reads several, as this one; weights
            that are no list of finite numbers, or not as many as views.
    Source: PointCLIP, arXiv 2112.02413, section 3.2.
    """

    def __init__(self, head: Any, weights: Sequence[float] | None = None, *, views: int | None = None) -> None:
        if not callable(head) or isinstance(head, type) or not hasattr(head, "needs"):
            raise TypeError(f"head must be a finished head with an attribute needs, got {describe(head)}")
        if hasattr(head, "reset") or isinstance(head, MultiView):
            reads = "reads several images at once" if isinstance(head, MultiView) else "remembers images"
            raise ValueError(
                f"head must read each image by itself, got {type(head).__name__}, which {reads}: take ck.ZeroShot, "
                "ck.CALIP or ck.TipAdapter"
            )
        if views is not None:
            check_int("views", views, 1)
        if weights is not None:
            if not is_list(weights) or not weights:
                raise ValueError(f"weights must be a list of a number per view, got {describe(weights)}")
            check_numbers(**{f"weights[{place}]": weight for place, weight in enumerate(weights)})
            if views not in (None, len(weights)):
                raise ValueError(f"weights must be one per view, {views} numbers, got {len(weights)}")
        count = views or 6
        self.head = head
        self.weights = (1 / count,) * count if weights is None else tuple(map(float, weights))

    @property
    def views(self) -> int:
        """The number V of views of an object."""
        return len(self.weights)

    @property
    def needs(self) -> tuple[str, ...]:
        """The extras of `ck.encode_image` that the head reads."""
        return tuple(self.head.needs)

    @property
    def zero_shot(self) -> ZeroShot | None:
        """The part of the head that computes the cosine term; None if it has none."""
        part = getattr(self.head, "zero_shot", self.head)
        return part if isinstance(part, ZeroShot) else None

    def __call__(self, features: Tensor | Encoded) -> Tensor:
        """Logits (B,K) of B objects.

        Args:
            features: embeddings (B·V,E) or (B,V,E), or an `Encoded` of B·V images; the views of an object are
                successive.
        Raises:
            TypeError: features of another type.
            ValueError: features that are not of V views per object, a head that does not give logits of each image, or
                as the head raises it.
        """
        logits = self.logits_of_views(features)
        total = self.weights[0] * logits[:, 0]
        for view, weight in enumerate(self.weights[1:], 1):
            total = total + weight * logits[:, view]
        return total

    def logits_of_views(self, features: Tensor | Encoded) -> Tensor:
        """The head's logits (B,V,K) of each view, before their weights."""
        expected = f"(B·V,E), (B,V,E) or an Encoded of B·V images, with V = {self.views}"
        rows: Any = features
        if isinstance(features, Tensor):
            if features.ndim not in (2, 3) or (features.ndim == 3 and features.shape[1] != self.views):
                raise ValueError(f"features must be {expected}, got {shape_of(features)}")
            rows = features if features.ndim == 2 else features.flatten(0, 1)
        images = rows if isinstance(rows, Tensor) else getattr(rows, "embedding", None)
        if not isinstance(images, Tensor):
            raise TypeError(f"features must be {expected}, got {describe(features)}")
        if images.ndim != 2 or len(images) % self.views:
            raise ValueError(f"features must be {expected}, got embeddings {shape_of(images)}")
        logits = self.head(rows)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            raise ValueError(
                f"head must give logits (B·V,K) with B·V = {len(images)}, got {describe(logits)} from "
                f"{type(self.head).__name__}"
            )
        return logits.unflatten(0, (len(images) // self.views, self.views))

    def fit(
        self, features: Tensor | Encoded | Iterable[Encoded], labels: Tensor, grid: Sequence[float] = GRID
    ) -> float:
        """Set the weights to the best of a grid on a validation split; the head stays as it is.

        The search starts from equal weights. It sets two views at a time to their best values, and stops when no pair
        helps. With two views it is exhaustive; the released code tries all 4ⱽ weights, on the test set. The weights are
        then scaled to sum to one, which changes no prediction.

        Args:
            features: as in a call, or batches of such in the order of the labels.
            labels: (n,) int64, the true classes of the objects. Use other objects than those that accuracy is reported
                on.
            grid: the weights that are tried for each view, positive and ascending.
        Returns:
            The accuracy on these objects, 0 to 1. Equal weights stay if no others are better.
        Raises:
            ValueError: labels that do not fit, no object, logits that are not finite, or another grid.
        """
        if not is_list(grid) or not grid:
            raise ValueError(f"grid must be a list of weights, got {describe(grid)}")
        check_positive(**{f"grid[{place}]": weight for place, weight in enumerate(grid)})
        if any(low >= high for low, high in pairwise(grid)):
            raise ValueError(f"grid must be ascending, got {', '.join(map(str, grid))}")
        with torch.no_grad():
            parts = [features] if isinstance(features, Tensor) else check_batches(features)
            views = [self.logits_of_views(part) for part in parts]
            check_not_empty(sum(map(len, views)))
            logits = torch.cat(views).double()
            labels = check_labels(labels, len(logits), logits.shape[2]).to(logits.device)
            faulty = int((~logits.isfinite().flatten(1).all(1)).sum())
            if faulty:
                raise ValueError(
                    f"logits must be finite, got {faulty} of {quantity(len(logits), 'object')} that are not"
                )
            # In units of the largest, because a scale changes no prediction and may leave the range of fp64.
            accuracy, weights = _search_views(logits, labels, torch.tensor(grid, dtype=torch.float64) / grid[-1])
        self.weights = tuple(weight / sum(weights) for weight in weights)
        return accuracy

    def __repr__(self) -> str:
        return f"MultiView({self.head!r}, weights=({', '.join(f'{weight:g}' for weight in self.weights)}))"


def _search_views(logits: Tensor, labels: Tensor, grid: Tensor) -> tuple[float, list[float]]:
    """The accuracy and the weights that coordinate ascent by pairs of views reaches, from logits (n,V,K)."""
    count = logits.shape[1]
    weights, zero = [float(grid[-1])] * count, torch.zeros_like(logits[:, 0])
    one = torch.ones(1, dtype=torch.float64)
    best = search(_sum(logits, weights), zero, zero, labels, one, one).accuracy
    improved = True
    while improved:
        improved = False
        for first, second in combinations(range(count), 2):
            others = [0.0 if view in (first, second) else weight for view, weight in enumerate(weights)]
            result = search(_sum(logits, others), logits[:, first], logits[:, second], labels, grid, grid)
            if result.accuracy > best:
                best, weights[first], weights[second] = result
                improved = True
    return best, weights


def _sum(logits: Tensor, weights: Sequence[float]) -> Tensor:
    return (logits * logits.new_tensor(weights)[:, None]).sum(1)
