"""Few-shot draws: seeded, and nested, so that fewer shots are a part of more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipkernels.arguments import check_int
from clipkernels.messages import quantity


def draw_shots(labels: Tensor, classes: int, shots: int, seed: int) -> Tensor:
    """The indices of `shots` random images of each class, in the order of the classes; all of a class that has fewer.

    Draws of one seed are nested: those of fewer shots are a part of those of more.

    Args:
        labels: (n,) int64, the classes of the images.
        classes: K, the number of classes.
        shots: images per class.
        seed: seed of the draw.
    """
    check_int("shots", shots, 1)
    chosen = []
    for label in range(classes):
        # A generator for each class, because a class must not change with the size of another one.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + label)
        members = (labels == label).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:shots]])
    return torch.cat(chosen)


def shortage_note(labels: Sequence[int], classes: int, shots: int) -> str | None:
    """The sentence about classes that have fewer images than `shots`; None if there are enough."""
    counts = torch.bincount(torch.tensor(labels, dtype=torch.int64), minlength=classes)
    few = int((counts < shots).sum())
    if not few:
        return None
    return (
        f"{few} of the {quantity(classes, 'class')} have fewer than {shots} images to draw from, the least "
        f"{int(counts.min())}: they give all of them"
    )


def draw_order(n: int, seed: int) -> Tensor:
    """A random order (n,) of n images, for heads that read a stream."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
