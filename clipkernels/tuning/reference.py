"""The dense embeddings that the quality of reduced ones is measured against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkernels.arguments import check_choice, check_floating, check_tensors, shape_of
from clipkernels.messages import quantity
from clipkernels.tuning.budget import Constraint
from clipkernels.tuning.nearest import choose, others, unit

Against = Literal["dense", "same"]


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
            self._nearest[k] = torch.cat([choose(cosines, k) for _, cosines in others(self.rows)])
        return self._nearest[k]


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


def _unit_rows(name: str, rows: Tensor) -> Tensor:
    """Rows (n,E) in fp32 of length one; raises unless they are finite and not zero."""
    check_tensors(**{name: rows})
    check_floating(**{name: rows})
    if rows.ndim != 2 or not len(rows):
        raise ValueError(f"{name} must be (n,E) with n ≥ 1, got {shape_of(rows)}")
    rows, lost = unit(rows)
    if lost.any():
        place = int(lost.int().argmax())
        raise ValueError(f"{name} must be finite and not zero, got row {place}: leave it out")
    return rows.float()
