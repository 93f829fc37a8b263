"""The targets of a recovery: dense embeddings of all images, computed once, so that training needs no second tower."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from clipkernels.learn.recovery.batches import Images, is_present, read_batches
from clipkernels.learn.recovery.results import Progress
from clipkernels.learn.recovery.state import State

PART_ROWS = 1024
"""Images of a part that is written at once, rounded up to whole batches."""


class Targets(NamedTuple):
    """The dense embeddings of n images.

    embeddings (n,E): fp32, L2-normalised; zeros for an image that is None.
    digests (n,32): uint8, zeros for an image that is None.
    """

    embeddings: Tensor
    digests: Tensor

    @property
    def present(self) -> Tensor:
        """The indices (m,) of the images that are not None."""
        return is_present(self.digests).nonzero()[:, 0]


@torch.no_grad()
def dense_targets(
    encode: Callable[[Tensor], Tensor],
    images: Images,
    batch_size: int,
    workers: int,
    state: State,
    progress: Callable[[Progress], bool],
) -> Targets | None:
    """The targets of images, or None if `progress` returns true. Parts that are on disk are read.

    Args:
        encode: L2-normalised embeddings (b,E) of images (b,3,S,S), by the dense tower.
        images: the images.
        batch_size: images per forward.
        workers: loader processes.
        state: keeps each part as soon as it is complete.
        progress: called after each batch.
    Raises:
        ValueError: embeddings that are not finite, or images that the tower does not take.
    """
    parts = list(state.targets())
    done = sum(len(digests) for _, digests in parts)
    errors = sum(int((~is_present(digests)).sum()) for _, digests in parts)
    rows: list[tuple[Tensor, Tensor]] = []
    batches = torch.arange(done, len(images)).split(batch_size) if done < len(images) else ()
    for number, batch in enumerate(read_batches(images, batches, workers), 1):
        present = is_present(batch.digests)
        if batch.images is None:
            rows.append((torch.empty(0), batch.digests))
        else:
            embedding = encode(batch.images).float().cpu()
            if not embedding.isfinite().all():
                wrong = batch.indices[present][~embedding.isfinite().all(1)]
                raise ValueError(
                    f"expected finite dense embeddings, got others for images[{int(wrong[0])}]: leave it out"
                )
            spread = embedding.new_zeros(len(present), embedding.shape[1])
            spread[present] = embedding
            rows.append((spread, batch.digests))
        done += len(present)
        errors += int((~present).sum())
        if number * batch_size % (-(-PART_ROWS // batch_size) * batch_size) == 0 or done == len(images):
            parts.append(_joined(rows))
            state.add_targets(done - len(parts[-1][1]), *parts[-1])
            rows = []
        if progress(Progress("embedding", done, len(images), errors)):
            return None
    return Targets(*_joined(parts))


def _joined(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Embeddings and digests as one tensor each; the embeddings of images that are all None are zeros."""
    width = max((embeddings.shape[-1] for embeddings, _ in rows), default=0) or 1
    filled = [
        embeddings if embeddings.shape[-1] == width and embeddings.ndim == 2 else torch.zeros(len(digests), width)
        for embeddings, digests in rows
    ]
    return torch.cat(filled), torch.cat([digests for _, digests in rows])
