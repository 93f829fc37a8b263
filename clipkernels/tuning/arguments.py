"""Checks of the arguments of `ck.tune`, made before anything is encoded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipkernels.arguments import check_choice, check_floating, check_path, check_tensors, describe, is_list, shape_of
from clipkernels.tuning.budget import Constraint, parse_budget
from clipkernels.tuning.cost_table import CostTable
from clipkernels.tuning.effects import FAMILIES


def read_budget(budget: Any) -> tuple[Constraint, ...]:
    """The constraints of a budget, which is text or a sequence of them.

    Raises:
        ValueError: text that is no budget, or no constraint at all.
        TypeError: neither text nor a sequence of constraints.
    """
    if isinstance(budget, str):
        return parse_budget(budget)
    if not is_list(budget) or not all(isinstance(term, Constraint) for term in budget):
        raise TypeError(f"budget must be text such as 'recall@1>=.99' or a list of constraints, got {describe(budget)}")
    if not budget:
        raise ValueError("budget must have at least one term, got none")
    return tuple(budget)


def check_families(families: Any) -> None:
    """Raise ValueError unless families are a sequence of known kinds of steps, at least one of them."""
    if not is_list(families) or not families:
        raise ValueError(f"families must be a list of {', '.join(FAMILIES)}, got {describe(families)}")
    for name in families:
        check_choice("families", name, *FAMILIES)


def check_cost(cost: Any) -> None:
    """Raise TypeError unless a cost is a table, a path, "gmacs" or None."""
    if cost is not None and not isinstance(cost, CostTable):
        check_path(cost=cost)


def check_annotations(
    images: int, labels: Tensor | None, classes: Tensor | None, captions: Tensor | None, caption_ids: Tensor | None
) -> None:
    """Raise ValueError or TypeError unless what is known of n images has their number, and the right dtypes.

    Args:
        images: n.
        labels, caption_ids: (n,) int64, or None.
        classes: (K,E) floating, or None.
        captions: (n,E) floating, or None.
    """
    for name, values in (("labels", labels), ("caption_ids", caption_ids)):
        if values is None:
            continue
        check_tensors(**{name: values})
        if values.dtype != torch.int64 or tuple(values.shape) != (images,):
            raise ValueError(f"{name} must be ({images},) int64, got {shape_of(values)} {values.dtype}")
    for name, values, rows in (("classes", classes, None), ("captions", captions, images)):
        if values is None:
            continue
        check_tensors(**{name: values})
        if values.ndim != 2 or rows not in (None, len(values)):
            raise ValueError(f"{name} must be ({'K' if rows is None else rows},E), got {shape_of(values)}")
        check_floating(**{name: values})
    if labels is not None and classes is not None and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise ValueError(f"labels must be in [0, {len(classes) - 1}], got {int(labels.min())} to {int(labels.max())}")
