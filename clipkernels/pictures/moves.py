"""Distances of embeddings under methods from the dense ones, by their cosines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from clipkernels.encode import encode_image, tower_weight
from clipkernels.images.batches import Loaded, Pictures, collate
from clipkernels.images.reader import preprocessed
from clipkernels.methods import Dense, Method
from clipkernels.patching import patched

BATCH = 32


class Moves(NamedTuple):
    """Cosines (n,M) of the embeddings of n images under M methods with the dense ones, not finite counting as 0.

    indices: the places of the n images among all that were given.
    failed: the places of the images that cannot be used, with the reasons.
    """

    indices: list[int]
    cosines: np.ndarray
    failed: list[tuple[int, str]]

    def worst(self, count: int) -> Moves:
        """The `count` images with the least cosine under any method, least first; ties stay in order."""
        order = self.cosines.min(1).argsort(kind="stable")[:count]
        return Moves([self.indices[place] for place in order], self.cosines[order], self.failed)


class Inputs(Pictures):
    """As `Pictures`, of paths, PIL images and preprocessed tensors (3,S,S)."""

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        item: Any = self.paths[index]
        if isinstance(item, Tensor):
            return index, item.float().cpu() if tuple(item.shape) == self.shape else f"a tensor {tuple(item.shape)}"
        if isinstance(item, Image.Image):
            return index, preprocessed(item.convert("RGB"), self.preprocess, self.shape)
        return super().__getitem__(index)


def batches_of(dataset: Pictures, size: int = BATCH) -> Iterator[Loaded]:
    """The images of a data set in batches."""
    items = (dataset[index] for index in range(len(dataset)))
    while batch := list(islice(items, size)):
        yield collate(batch)


@torch.no_grad()
def measure_moves(
    model: nn.Module,
    batches: Iterable[Loaded],
    methods: Mapping[str, Method],
    after_batch: Callable[[Loaded], object] = lambda batch: None,
) -> Moves:
    """The cosines of embeddings under methods with the dense ones.

    Args:
        model: as in `show`.
        batches: preprocessed images, and the reasons why there are no others.
        methods: by name.
        after_batch: called with each batch.
    """
    indices, cosines, failed = [], [np.empty((0, len(methods)))], []
    weight = tower_weight(model)
    with patched(model, Dense()):
        for batch in batches:
            failed += batch.failed
            if batch.images is not None:
                images = batch.images.to(weight)
                dense = encode_image(model, images).embedding.cpu().double()
                columns = []
                for method in methods.values():
                    with patched(model, method):
                        embedding = encode_image(model, images).embedding.cpu().double()
                    columns.append(cosine_similarity(embedding, dense).nan_to_num(0).clamp(-1, 1))
                cosines.append(torch.stack(columns, 1).numpy())
                indices += batch.indices
            after_batch(batch)
    return Moves(indices, np.concatenate(cosines), failed)
