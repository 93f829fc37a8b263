"""Golden rankings, transcribed literally: one image, one round, one window at a time, with the whole tower for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import clipkernels as ck


def literal_ranking(
    model: nn.Module,
    images: Tensor,
    score: str,
    classes: Tensor | None,
    labels: Sequence[int] | Tensor | None,
    window: int,
    stride: int,
    step: int,
    block: int,
) -> Tensor:
    """Return ranks (n,P) of images (n,3,S,S), by the host's own blocks; class embeddings (K,E) are normalised."""
    tower: Any = ck.tower_of(model)
    side, prefix, ranks = tower.image_size[0] // tower.patch, tower.prefix, []
    edge = side - window
    window_starts = sorted({*range(0, edge + 1, stride), edge})

    def embed(image: Tensor, patches: set[int]) -> Tensor:
        x, rope = tower.embed(image[None])
        for host in tower.blocks[:block]:
            x = tower.run_block(host, x, rope)
        x = x[:, [*range(prefix), *(prefix + patch for patch in sorted(patches))]]
        for host in tower.blocks[block:]:
            x = tower.run_block(host, x, None if rope is None else rope[..., sorted(patches), :])
        return normalize(tower.pool(x)[0], dim=0)

    for index, image in enumerate(images):
        remaining, removed = set(range(side * side)), list[int]()
        full_embedding = embed(image, remaining)
        while remaining:
            by_patch: dict[int, list[float]] = {}
            for row in window_starts:
                for column in window_starts:
                    within = {(row + i) * side + column + j for i in range(window) for j in range(window)} & remaining
                    if not within:
                        continue
                    value = float("-inf")  # without any token there is no embedding
                    if prefix or remaining - within:
                        z = embed(image, remaining - within)
                        if score == "feature" or classes is None:
                            value = float(z @ full_embedding)
                        else:
                            shares = (100 * z @ classes.T).softmax(0)
                            value = float(shares.max() if labels is None or score != "label" else shares[labels[index]])
                    for patch in within:
                        by_patch.setdefault(patch, []).append(value)
            means = {patch: sum(values) / len(values) for patch, values in by_patch.items()}
            next_patches = sorted(remaining, key=lambda patch: (-means[patch], patch))[:step]
            removed += next_patches
            remaining -= set(next_patches)
        ranks.append([side * side - 1 - removed.index(patch) for patch in range(side * side)])
    return torch.tensor(ranks)
