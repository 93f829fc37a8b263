"""Batches of the images of a recovery, decoded when they are needed, and proof that they stay the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from clipkernels.encode import check_images
from clipkernels.images.loaders import Loader
from clipkernels.state_files import digest_table

DIGEST_VALUES = 4096
ABSENT = bytes(32)
"""The digest of an image that is None."""


class Batch(NamedTuple):
    """Images of one batch.

    indices (b,): int64, of all images of the batch.
    digests (b,32): uint8, zeros for an image that is None.
    images (a,3,S,S): those that are not None, in order; None if there is none.
    """

    indices: Tensor
    digests: Tensor
    images: Tensor | None


class Images(Dataset[tuple[int, bytes, Tensor | Exception | None]]):
    """Images by index, each with its digest: a tensor, None, or the error of an image that the tower does not take.

    images: a tensor (n,3,S,S), or a sequence of (3,S,S) and None.
    size: height and width that the tower takes.
    """

    def __init__(self, images: Any, size: tuple[int, int]) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, bytes, Tensor | Exception | None]:
        image = self.images[index]
        if image is None:
            return index, ABSENT, None
        try:
            check_images(image[None] if isinstance(image, Tensor) else image, self.size)
        except (TypeError, ValueError) as error:  # returned, because a loader process would raise it in many lines
            return index, ABSENT, type(error)(f"images[{index}]: {error}")
        return index, digest_of(image), image


def read_batches(
    images: Images, batches: Sequence[Tensor], workers: int, expected: Tensor | None = None
) -> Iterator[Batch]:
    """The batches of images at indices, in order.

    Args:
        images: the images.
        batches: indices (b,) of each batch.
        workers: loader processes; 0 reads in this process.
        expected: digests (n,32) of all images, which those that are read must have; None for any.
    Raises:
        ValueError, TypeError: an image of another size or none at all, or another one than before.
    """
    loader: Loader[Any] = Loader(images, workers, batch_sampler=[batch.tolist() for batch in batches], collate_fn=list)
    for items in loader:
        for _, _, image in items:
            if isinstance(image, Exception):
                raise image
        indices = torch.tensor([index for index, _, _ in items])
        digests = digest_table([digest for _, digest, _ in items])
        if expected is not None:
            changed = (digests != expected[indices]).any(1).nonzero()[:, 0].tolist()
            if changed:
                raise ValueError(
                    f"expected the images that the run began with, got another images[{int(indices[changed[0]])}]: "
                    "pass the same images, or choose another state"
                )
        present = [image for _, _, image in items if image is not None]
        yield Batch(indices, digests, torch.stack(present) if present else None)


def digest_of(image: Tensor) -> bytes:
    """The SHA-256 of an image's shape and of up to 4,096 of its values, evenly spaced, in float32."""
    flat = image.detach().flatten()
    sample = flat[:: max(1, len(flat) // DIGEST_VALUES)][:DIGEST_VALUES].float().cpu().contiguous()
    return sha256(str(tuple(image.shape)).encode() + sample.numpy().tobytes()).digest()


def is_present(digests: Tensor) -> Tensor:
    """True (n,) for the digests (n,32) of images that are not None."""
    return (digests != 0).any(1)
