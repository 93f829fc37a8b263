"""Quality of reduced embeddings: figures of a budget, image by image, and bounds that hold beyond the sample.

    cosine_mean, cosine_p1  mean and first percentile of the cosine of an image's reduced and its dense embedding
    recall@k, dense index   share of images that are among the k nearest dense embeddings of their reduced embedding
    recall@k, same index    mean share of an image's k nearest others by dense embeddings that are among its k nearest
                            others by reduced ones
    accuracy_drop           zero-shot accuracy of dense embeddings minus that of reduced ones
    text_recall@k           share of captions with an image of theirs among the k nearest reduced embeddings

Cosines that differ by at most 1e-6 are equal. An image is among the k nearest if fewer than k images are nearer: equal
cosines never push it out, so dense embeddings find every image even if another has the same content. The k nearest
others by dense embeddings are exactly k: of equal cosines those with the lower index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkernels.arguments import check_choice, check_floating, check_int, check_range, check_tensors, shape_of
from clipkernels.messages import quantity
from clipkernels.tuning.budget import RULES, Constraint

Against = Literal["dense", "same"]

TIE = 1e-6
"""Cosines that differ by at most this are equal, because fp32 embeddings of one image differ so much by batch size."""
ROUNDING = 1e-12
BLOCK_VALUES = 1 << 23
"""Values of the matrix of cosines that are computed at once, 64 MiB in fp64."""
TAIL = 0.02
MIN_TAIL = 5
PERCENTILE = 0.01


@dataclass(frozen=True, eq=False)
class Reference:
    """The dense embeddings of n images, and what is known about these.

    Args:
        dense: embeddings (n,E) of any floating dtype; they are kept as fp32 rows of length one.
        against: the index that reduced queries search: "dense", the dense embeddings of all images, or "same", the
            reduced ones.
        labels: the class (n,) of each image, or None.
        classes: class embeddings (K,E); needed with labels.
        captions: embeddings (n,E) of a caption of each image, or None.
        caption_ids: ints (n,), equal for equal captions; None tells captions apart by their embeddings.
    Raises:
        TypeError: no tensors.
        ValueError: shapes that do not fit, embeddings that are not finite or zero, or labels without classes.
    """

    dense: Tensor
    against: Against = "dense"
    labels: Tensor | None = None
    classes: Tensor | None = None
    captions: Tensor | None = None
    caption_ids: Tensor | None = None
    _nearest: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("against", self.against, "dense", "same")
        for name in ("dense", "classes", "captions"):
            rows = getattr(self, name)
            if rows is not None:
                object.__setattr__(self, name, _unit_rows(name, rows))
        n, width = self.dense.shape
        for name, rows in (("classes", self.classes), ("captions", self.captions)):
            if rows is not None and (rows.shape[1] != width or (name == "captions" and len(rows) != n)):
                wanted = f"({'n' if name == 'captions' else 'K'},E) = ({n if name == 'captions' else 'K'},{width})"
                raise ValueError(f"{name} must be {wanted}, got {shape_of(rows)}")
        if (self.labels is None) != (self.classes is None):
            raise ValueError("expected labels with class embeddings, got one of the two: give both or none")
        for name in ("labels", "caption_ids"):
            ids = getattr(self, name)
            if ids is not None:
                check_tensors(**{name: ids})
                if tuple(ids.shape) != (n,) or ids.is_floating_point():
                    raise ValueError(f"{name} must be ints (n,) = ({n}), got {ids.dtype} {shape_of(ids)}")
        if self.labels is not None and self.classes is not None:
            low, high = (int(end) for end in self.labels.aminmax())
            if low < 0 or high >= len(self.classes):
                raise ValueError(f"labels must be from 0 to {len(self.classes) - 1}, got {low} to {high}")
        if self.captions is not None and self.caption_ids is None:
            object.__setattr__(self, "caption_ids", self.captions.unique(dim=0, return_inverse=True)[1])

    def __len__(self) -> int:
        return len(self.dense)

    @property
    def rows(self) -> Tensor:
        """The dense embeddings (n,E) in fp64, of length one beyond the rounding of fp32."""
        return normalize(self.dense.double(), dim=1)

    def subset(self, index: Tensor) -> Reference:
        """The reference of the images at index (m,), which then are the whole gallery."""

        def rows(of: Tensor | None) -> Tensor | None:
            return None if of is None else of[index]

        return Reference(
            self.dense[index],
            self.against,
            rows(self.labels),
            self.classes,
            rows(self.captions),
            rows(self.caption_ids),
        )

    def nearest(self, k: int) -> Tensor:
        """The k other images (n,k) nearest to each by dense embeddings; of equal cosines those with the lower index."""
        if k not in self._nearest:
            self._nearest[k] = torch.cat([_choose(cosines, k) for _, cosines in _others(self.rows)])
        return self._nearest[k]


def per_image(constraint: Constraint, reduced: Tensor, reference: Reference) -> Tensor:
    """Values (n,) fp64 of a figure, one per image or caption: their mean, or first percentile, is the figure.

    An embedding that is not finite, or zero, counts as the worst: its cosine is -1, its class is wrong, it finds
    nothing and nothing finds it.

    Args:
        constraint: one about quality.
        reduced: embeddings (n,E) of the reference's images, in its order.
        reference: the dense embeddings.
    Raises:
        ValueError: a constraint about cost, embeddings of other images, or a reference without labels, captions or
            images enough.
    """
    check_tensors(reduced=reduced)
    check_measurable(constraint, reference)
    if reduced.shape != reference.dense.shape:
        raise ValueError(f"reduced must be (n,E) = {shape_of(reference.dense)} as dense, got {shape_of(reduced)}")
    rows, lost = _unit(reduced)
    dense = reference.rows
    if constraint.name == "accuracy_drop":
        return _accuracy_drop(rows, lost, reference)
    if constraint.name in ("cosine_p1", "cosine_mean"):
        # Rounding would put the cosine of equal embeddings above or below 1.
        return (1 - (rows - dense).square().sum(1) / 2).clamp(-1, 1).masked_fill(lost, -1)
    assert constraint.k is not None
    if constraint.name == "text_recall":
        return _text_recall(rows, lost, reference, constraint.k)
    if reference.against == "dense":
        return _recall_of_dense(rows, lost, dense, constraint.k)
    return _recall_of_same(rows, lost, reference.nearest(constraint.k))


def check_measurable(constraint: Constraint, reference: Reference) -> None:
    """Raise ValueError unless a reference has what a constraint needs."""
    if not constraint.is_quality:
        raise ValueError(f"expected a constraint about embeddings, got {constraint.text}: it is about cost")
    if constraint.name == "accuracy_drop" and reference.labels is None:
        raise ValueError(f"expected labelled images for {constraint.text}, got none: give a folder per class")
    if constraint.name == "text_recall" and reference.captions is None:
        raise ValueError(f"expected captions for {constraint.text}, got none: give a caption of each image")
    if constraint.k is not None and len(reference) <= constraint.k:
        raise ValueError(
            f"expected more than {quantity(constraint.k, 'image')} for {constraint.text}, got {len(reference)}: add "
            "images"
        )


def figure(constraint: Constraint, values: Tensor) -> float:
    """The figure of values (n,) that `per_image` returned: their mean, or their first percentile for cosine_p1."""
    if constraint.name == "cosine_p1":
        return torch.quantile(values, PERCENTILE).item()
    return values.mean().item()


def holds(constraint: Constraint, value: float) -> bool:
    """Return true if a value of a figure keeps its bound; a NaN does not. Rounding of 1e-12 does not count."""
    slack = ROUNDING * max(1.0, abs(constraint.bound))
    return value >= constraint.bound - slack if constraint.direction == ">=" else value <= constraint.bound + slack


def bound_of(
    constraint: Constraint, values: Tensor, seed: int = 0, level: float = 0.95, resamples: int = 2000
) -> float:
    """The bound of a figure on the side that can break the promise: lower, or upper for accuracy_drop.

    Images from the same source have a figure at least that good in a share `level` of all samples. Deterministic.

    The first percentile has the exact bound of order statistics, -1 if the sample is too small for one. A mean has a
    Bayesian bootstrap's, with one worst value added to the sample: 0 for a share, 1 for a drop, the sample's least
    cosine for cosines. For values of 0 and 1 that is the exact bound of a binomial. The plain bootstrap promises too
    much there: without a failure in the sample its bound is 1.

    Args:
        constraint: one about quality.
        values: (n,) from `per_image`.
        seed: seed of the resampling.
        level: confidence, in (0, 1).
        resamples: number of resampled means.
    Source: Bayesian bootstrap, Rubin, 1981; the added value, Learned-Miller and Thomas, arXiv 1905.06208; order
        statistics, David and Nagaraja, Order Statistics, section 7.1.
    """
    check_int("resamples", resamples, 1)
    check_range("level", level, 0, 1, "()")
    values = values.double().cpu()
    if constraint.name == "cosine_p1":
        rank = _rank_below_percentile(len(values), level)
        return values.sort().values[rank - 1].item() if rank else -1.0
    sign = 1 if constraint.direction == ">=" else -1
    worst = values.min().item() if constraint.name == "cosine_mean" else min(0, sign)
    sample = torch.cat([sign * values, values.new_tensor([worst])])
    generator, means = torch.Generator().manual_seed(seed), []
    step = max(1, BLOCK_VALUES // len(sample))
    for start in range(0, resamples, step):
        weights = sample.new_empty(min(step, resamples - start), len(sample)).exponential_(generator=generator)
        means.append((weights @ sample) / weights.sum(1))
    return sign * torch.quantile(torch.cat(means), 1 - level).item()


def sample_warning(constraint: Constraint, n: int, level: float = 0.95) -> str | None:
    """The warning that not even perfect values of n images prove a constraint; None if they do."""
    if constraint.name == "cosine_mean" or (constraint.name == "cosine_p1" and _rank_below_percentile(n, level)):
        return None
    loss = PERCENTILE if constraint.name == "cosine_p1" else abs(float(constraint.direction == ">=") - constraint.bound)
    if loss <= 0:
        return f"{constraint.text} cannot be proved on a sample: allow a loss, such as {RULES[constraint.name].example}"
    needed = math.ceil(math.log(1 - level) / math.log1p(-loss)) if loss < 1 else 1
    if n >= needed:
        return None
    return f"{constraint.text} needs {needed} held-out images for a bound at {level:.0%}, got {n}: add images"


def trend(constraint: Constraint, reduced: Tensor, reference: Reference, seed: int = 0) -> dict[int, float]:
    """A figure by the number of images of the gallery: about n/4, n/2 and n.

    Smaller galleries are the parts of one random division of the images; the figure is the mean over all images. Sizes
    with too few images for k are left out.
    """
    n, figures = len(reference), {}
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(reference.dense.device)
    for parts in (4, 2, 1):
        if constraint.k is not None and n // parts <= constraint.k:
            continue
        galleries = [part.sort().values for part in order.tensor_split(parts)]
        values = [per_image(constraint, reduced[index], reference.subset(index)) for index in galleries]
        figures[n // parts] = figure(constraint, torch.cat(values))
    return figures


def damage(reduced: Tensor, reference: Reference, kind: Literal["mean", "tail"] = "mean") -> float:
    """A smooth stand-in for the loss of every figure: 1 - cosine, its mean over all images or over the worst ones.

    "tail" is the mean over the 2 % of the images with the largest values, at least 5 of them.
    """
    check_choice("kind", kind, "mean", "tail")
    values = 1 - per_image(Constraint("cosine_mean", None, 1.0), reduced, reference)
    if kind == "mean":
        return values.mean().item()
    return values.topk(min(len(values), max(MIN_TAIL, round(TAIL * len(values))))).values.mean().item()


def _rank_below_percentile(n: int, level: float) -> int:
    """The largest r for which the r-th lowest of n values is below the first percentile in a share `level` of samples.

    0 if there is none.
    """
    counts = torch.arange(n + 1, dtype=torch.float64)
    binomial = torch.distributions.Binomial(n, torch.tensor(PERCENTILE, dtype=torch.float64))
    return int((binomial.log_prob(counts).exp().cumsum(0) <= 1 - level).sum())


def _unit_rows(name: str, rows: Tensor) -> Tensor:
    """Rows (n,E) in fp32 of length one; raises unless they are finite and not zero."""
    check_tensors(**{name: rows})
    check_floating(**{name: rows})
    if rows.ndim != 2 or not len(rows):
        raise ValueError(f"{name} must be (n,E) with n ≥ 1, got {shape_of(rows)}")
    rows, lost = _unit(rows)
    if lost.any():
        place = int(lost.int().argmax())
        raise ValueError(f"{name} must be finite and not zero, got row {place}: leave it out")
    return rows.float()


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n,E) in fp64 of length one, and true (n,) for those without a direction, which become zeros."""
    rows = rows.detach().double()
    lost = ~(rows.isfinite().all(1) & (rows != 0).any(1))
    return normalize(rows.masked_fill(lost[:, None], 0), dim=1), lost


def _blocks(queries: Tensor, index: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The cosines of queries (m,E) with an index (n,E), a few queries at a time."""
    step = max(1, BLOCK_VALUES // len(index))
    for start in range(0, len(queries), step):
        place = slice(start, min(start + step, len(queries)))
        yield place, queries[place] @ index.T


def _others(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The cosines of rows (n,E) with each other, -inf with themselves, a few rows at a time."""
    for place, cosines in _blocks(rows, rows):
        cosines.diagonal(place.start).fill_(-torch.inf)
        yield place, cosines


def _kth(cosines: Tensor, k: int) -> Tensor:
    """The k-th largest of each row (m,n), as (m,1)."""
    return cosines.amax(1, keepdim=True) if k == 1 else cosines.topk(k, 1).values[:, -1:]


def _choose(cosines: Tensor, k: int) -> Tensor:
    """The places (m,k) of the k largest of each row (m,n), ascending; of equal ones the lower places."""
    limit = _kth(cosines, k)
    larger, equal = cosines > limit + TIE, (cosines - limit).abs() <= TIE
    chosen = larger | (equal & (equal.cumsum(1) <= k - larger.sum(1, keepdim=True)))
    return chosen.nonzero()[:, 1].view(-1, k)


def _recall_of_dense(rows: Tensor, lost: Tensor, dense: Tensor, k: int) -> Tensor:
    """1 for each image that is among the k nearest dense embeddings of its reduced one, else 0."""
    found = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for place, cosines in _blocks(rows, dense):
        found[place] = (cosines.diagonal(place.start)[:, None] >= _kth(cosines, k) - TIE)[:, 0].double()
    return found.masked_fill(lost, 0)


def _recall_of_same(rows: Tensor, lost: Tensor, nearest: Tensor) -> Tensor:
    """The share of each image's nearest others (n,k) that are among its k nearest others by reduced embeddings."""
    share = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    k = nearest.shape[1]
    for place, cosines in _others(rows):
        cosines[:, lost] = -torch.inf
        own = cosines.gather(1, nearest[place])
        share[place] = ((own >= _kth(cosines, k) - TIE) & (own > -torch.inf)).double().mean(1)
    return share.masked_fill(lost, 0)


def _accuracy_drop(rows: Tensor, lost: Tensor, reference: Reference) -> Tensor:
    """1 for each image that only the dense embedding classifies right, -1 if only the reduced one does, else 0."""
    assert reference.labels is not None and reference.classes is not None
    classes = reference.classes.double()
    dense = (reference.rows @ classes.T).argmax(1) == reference.labels
    reduced = ((rows @ classes.T).argmax(1) == reference.labels) & ~lost
    return dense.double() - reduced.double()


def _text_recall(rows: Tensor, lost: Tensor, reference: Reference, k: int) -> Tensor:
    """1 for each caption with an image of its own among its k nearest reduced embeddings, else 0."""
    assert reference.captions is not None and reference.caption_ids is not None
    ids = reference.caption_ids
    found = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for place, cosines in _blocks(reference.captions.double(), rows):
        cosines[:, lost] = -torch.inf
        best = cosines.masked_fill(ids[place, None] != ids, -torch.inf).amax(1, keepdim=True)
        found[place] = ((best >= _kth(cosines, k) - TIE) & (best > -torch.inf))[:, 0].double()
    return found
