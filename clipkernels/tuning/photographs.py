"""The photographs of a tuning: those that are there, and their halves, which do not depend on their order."""

from __future__ import annotations

from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipkernels.encode import check_images
from clipkernels.learn.recovery.batches import digest_of

MIN_IMAGES = 8
"""Fewer photographs cannot be halved into anything that says something."""


class Halves(NamedTuple):
    """The indices of the photographs.

    search, held_out: those of each half, in the order of their digests.
    skipped: those that are None.
    digest: SHA-256 of all photographs, whatever their order.
    """

    search: Tensor
    held_out: Tensor
    skipped: tuple[int, ...]
    digest: str


def halve(images: Any, size: tuple[int, int], share: float, seed: int) -> Halves:
    """Halve photographs by the digests of their pixels, so that neither order nor names matter.

    Args:
        images: (n,3,S,S) preprocessed, or a sequence of (3,S,S) and None.
        size: height and width that the tower takes.
        share: share of the search half.
        seed: seed of the halves.
    Raises:
        ValueError: fewer than MIN_IMAGES photographs, or one of another size.
        TypeError: one that is no tensor.
    """
    digests: list[tuple[bytes, bytes, int]] = []
    skipped = []
    for index in range(len(images)):
        image = images[index]
        if image is None:
            skipped.append(index)
            continue
        try:
            check_images(image[None] if isinstance(image, Tensor) else image, size)
        except (TypeError, ValueError) as error:
            raise type(error)(f"images[{index}]: {error}") from error
        digest = digest_of(image)
        digests.append((sha256(f"halves {seed}".encode() + digest).digest(), digest, index))
    if len(digests) < MIN_IMAGES:
        raise ValueError(
            f"images must hold at least {MIN_IMAGES} photographs, of which one half is held out, got {len(digests)}"
        )
    digests.sort()
    order = torch.tensor([index for _, _, index in digests])
    whole = sha256(b"".join(sorted(digest for _, digest, _ in digests))).hexdigest()
    first = round(share * len(order))
    return Halves(order[:first], order[first:], tuple(skipped), whole)


def digest_of_values(*tensors: Tensor | None) -> str | None:
    """The SHA-256 of tensors that belong to the photographs; None if the first is None."""
    if tensors[0] is None:
        return None
    digest = sha256()
    for values in tensors:
        if values is not None:
            rows = values.detach().cpu().contiguous()
            digest.update(str((rows.dtype, tuple(rows.shape))).encode())
            digest.update(rows.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
