"""A prompt without the slots of image tokens that are not handed over, and the state that decoding needs of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

STATE = "_clipkernels_prompt"
KEPT = "_clipkernels_kept"
"""Attribute of image outputs: true (B,N) for a token of the prompt that the language model got."""


class Prompt(NamedTuple):
    """The cut of a prompt of N tokens to n.

    order: token (B,n) of the prompt in each place.
    mask: 1 (B,n) for a token, 0 for padding.
    slots: place (B,N) of each token: its own, or for one that was cut that of the last token before it.
    stays: true (B,N) for a token that is in the cut prompt.
    """

    order: Tensor
    mask: Tensor
    slots: Tensor
    stays: Tensor

    def cut(self, x: Tensor) -> Tensor:
        """A tensor (B,N) or (B,N,C) of the prompt, cut."""
        if x.ndim == 2:
            return x.expand(self.order.shape[0], -1).gather(1, self.order)
        return x.gather(1, self.order[..., None].expand(-1, -1, x.shape[2]))

    def restore(self, x: Tensor) -> Tensor:
        """The rows (B,n,C) of the cut prompt at full length (B,N,C)."""
        return x.gather(1, self.slots[..., None].expand(-1, -1, x.shape[2]))


class CacheState(NamedTuple):
    """The cut of the prompt that a cache holds: its mask (B,n), and the length N of the whole prompt."""

    mask: Tensor
    length: int


def make_prompt(dropped: Tensor, visible: Tensor) -> Prompt:
    """The cut of a prompt.

    Rows that lose different numbers of tokens are padded on the side that is padded already, on the left if none is.

    Args:
        dropped: true (B,N) for a slot that is not handed over.
        visible: true (B,N) for a token, false for padding.
    """
    stays = visible & ~dropped
    kept = int(stays.sum(1).max())
    batch, length = stays.shape
    if bool(visible[:, -1].all()):
        order = stays.int().sort(dim=1, stable=True).indices[:, length - kept :]
    else:
        order = (~stays).int().sort(dim=1, stable=True).indices[:, :kept]
    mask = stays.gather(1, order)
    places = torch.arange(kept, device=order.device).expand(batch, -1)
    slots = torch.full_like(stays, -1, dtype=torch.int64).scatter(1, order, places.masked_fill(~mask, -1))
    first = mask.int().argmax(1, keepdim=True)  # of a row that starts with slots that are cut
    slots = torch.maximum(slots.cummax(1).values, first)
    return Prompt(order, mask.long(), slots, stays)


def cache_of(values: Any) -> Any:
    """The cache among arguments or outputs, under either of its names, or None."""
    cache = values.get("cache")
    return values.get("past_key_values") if cache is None else cache


def state_of(cache: Any) -> CacheState | None:
    """The state of a cache that holds a cut prompt, else None."""
    return getattr(cache, STATE, None)


def set_state(cache: Any, state: CacheState) -> None:
    """Set the state of a cache, which copies of the cache share."""
    setattr(cache, STATE, state)
