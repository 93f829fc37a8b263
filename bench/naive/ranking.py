"""Golden rankings as they are described: one image, one round, one window at a time, the whole tower for each."""

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
    """Ranks (n,P) of images (n,3,S,S), by the host's own blocks; class embeddings (K,E) are normalised."""
    tower: Any = ck.tower_of(model)
    side, prefix, ranks = tower.image_size[0] // tower.patch, tower.prefix, []
    edge = side - window
    starts = sorted({*range(0, edge + 1, stride), edge})

    def embed(image: Tensor, patches: set[int]) -> Tensor:
        x, rope = tower.embed(image[None])
        for host in tower.blocks[:block]:
            x = tower.run_block(host, x, rope)
        x = x[:, [*range(prefix), *(prefix + patch for patch in sorted(patches))]]
        for host in tower.blocks[block:]:
            x = tower.run_block(host, x, None if rope is None else rope[..., sorted(patches), :])
        return normalize(tower.pool(x)[0], dim=0)

    for at, image in enumerate(images):
        left, gone = set(range(side * side)), list[int]()
        whole = embed(image, left)
        while left:
            tried: dict[int, list[float]] = {}
            for top in starts:
                for across in starts:
                    within = {(top + i) * side + across + j for i in range(window) for j in range(window)} & left
                    if not within:
                        continue
                    value = float("-inf")  # what has no token has no embedding
                    if prefix or left - within:
                        z = embed(image, left - within)
                        if score == "feature" or classes is None:
                            value = float(z @ whole)
                        else:
                            shares = (100 * z @ classes.T).softmax(0)
                            value = float(shares.max() if labels is None or score != "label" else shares[labels[at]])
                    for patch in within:
                        tried.setdefault(patch, []).append(value)
            means = {patch: sum(values) / len(values) for patch, values in tried.items()}
            leaving = sorted(left, key=lambda patch: (-means[patch], patch))[:step]
            gone += leaving
            left -= set(leaving)
        ranks.append([side * side - 1 - gone.index(patch) for patch in range(side * side)])
    return torch.tensor(ranks)
