"""Few-shot draws: seeded, and nested, so that fewer shots are a part of more."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkernels.arguments import check_int


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


def draw_order(n: int, seed: int) -> Tensor:
    """A random order (n,) of n images, for heads that read a stream."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
