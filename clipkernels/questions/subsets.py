"""Low-shot subsets, nested and class-stratified, and splits by a field, such as a film: a shift of domain [ours]."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from operator import index

import torch
from torch import Tensor

from clipkernels.arguments import check_int, check_range, describe
from clipkernels.messages import list_names

MAX_SEED = 2**40


def low_shot_order(labels: Sequence[int], seed: int) -> Tensor:
    """An order (n,) int64 of n items whose first m are a random subset of every size m, stratified by class.

    The subsets are nested, because each is a beginning of the order. The first m items have at least one of each class
    if m is at least the number of classes; of a share t of the items, a class of c items has about t·c.

    Args:
        labels: the class of each item, an int.
        seed: seed of the order.
    Raises:
        ValueError: another label than an int, or a seed out of its range.
    """
    check_int("seed", seed, 0, MAX_SEED)
    members: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        try:
            members.setdefault(index(label), []).append(place)
        except TypeError as error:
            raise ValueError(f"labels must be ints, got {describe(label)}") from error
    keys = []
    for label, items in members.items():
        # A generator for each class, because its order must not change with the size of another one.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + label)
        order = torch.randperm(len(items), generator=generator).tolist()
        for place, position in enumerate(order):
            # First one of each class, the largest first; then each class at its own rate.
            keys.append((place > 0, place / len(items), -len(items), label, items[position]))
    return torch.tensor([key[-1] for key in sorted(keys)], dtype=torch.int64)


def low_shot(labels: Sequence[int], share: float, seed: int) -> Tensor:
    """The indices (m,) int64, ascending, of a share of n items, m = share·n rounded, at least 1.

    Args:
        labels: the class of each item, n ≥ 1.
        share: in (0, 1].
        seed: seed of the draw; draws of one seed are nested.
    Raises:
        ValueError: no item, another label than an int, or a share out of its range.
    """
    check_range("share", share, 0, 1, "(]")
    if not len(labels):
        raise ValueError("expected items to draw from, got none")
    return low_shot_order(labels, seed)[: max(1, round(share * len(labels)))].sort().values


def held_out_values(values: Sequence[str], share: float, seed: int) -> tuple[str, ...]:
    """The values of a field, drawn at random, that have at least a share of the items; at least one value stays.

    Args:
        values: the value of each item.
        share: in (0, 1).
        seed: seed of the draw.
    Raises:
        ValueError: fewer than two different values.
    """
    check_range("share", share, 0, 1, "()")
    counts = Counter(values)
    names = sorted(counts)
    if len(names) < 2:
        raise ValueError(f"expected a field with two different values or more, got {list_names(names) or 'none'}")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: list[str] = []
    for place in order[:-1]:
        if sum(counts[name] for name in chosen) >= share * len(values):
            break
        chosen.append(names[place])
    return tuple(sorted(chosen))


def split_by_value(values: Sequence[str], held_out: Collection[str]) -> tuple[list[int], list[int]]:
    """The indices of the items with other values, and of those with the values that are held out."""
    sides: tuple[list[int], list[int]] = ([], [])
    for place, value in enumerate(values):
        sides[value in held_out].append(place)
    return sides
