"""Quality of reduced embeddings: figures of a budget, image by image.

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

from typing import Literal

import torch
from torch import Tensor

from clipkernels.arguments import check_choice, check_tensors, shape_of
from clipkernels.tuning.bounds import figure
from clipkernels.tuning.budget import Constraint
from clipkernels.tuning.nearest import TIE, blocks, kth, others, unit
from clipkernels.tuning.reference import Reference, check_measurable

TAIL = 0.02
MIN_TAIL = 5


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
    rows, lost = unit(reduced)
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


def _recall_of_dense(rows: Tensor, lost: Tensor, dense: Tensor, k: int) -> Tensor:
    """1 for each image that is among the k nearest dense embeddings of its reduced one, else 0."""
    found = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for place, cosines in blocks(rows, dense):
        found[place] = (cosines.diagonal(place.start)[:, None] >= kth(cosines, k) - TIE)[:, 0].double()
    return found.masked_fill(lost, 0)


def _recall_of_same(rows: Tensor, lost: Tensor, nearest: Tensor) -> Tensor:
    """The share of each image's nearest others (n,k) that are among its k nearest others by reduced embeddings."""
    share = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    k = nearest.shape[1]
    for place, cosines in others(rows):
        cosines[:, lost] = -torch.inf
        own = cosines.gather(1, nearest[place])
        share[place] = ((own >= kth(cosines, k) - TIE) & (own > -torch.inf)).double().mean(1)
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
    for place, cosines in blocks(reference.captions.double(), rows):
        cosines[:, lost] = -torch.inf
        best = cosines.masked_fill(ids[place, None] != ids, -torch.inf).amax(1, keepdim=True)
        found[place] = ((best >= kth(cosines, k) - TIE) & (best > -torch.inf))[:, 0].double()
    return found
