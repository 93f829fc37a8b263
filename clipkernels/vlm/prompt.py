"""A prompt without the slots of image tokens that are not handed over, and the state that decoding needs of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipkernels.layered_class import Layer, add_layer, remove_layer

STATE = "_clipkernels_prompt"
KEPT = "_clipkernels_kept"
"""Attribute of image outputs: true (B,N) for a token of the prompt that the language model got."""


class Prompt(NamedTuple):
    """The cut of a prompt of N tokens to n.

    order: token (B,n) of the prompt in each place.
    mask: 1 (B,n) for a token, 0 for padding.
    slots: place (B,N) of each token: its own, or for one that was cut that of the last token before it.
    stays: true (B,N) for a token that is in the cut prompt.
    tail: the number of last tokens that stay in every row.
    """

    order: Tensor
    mask: Tensor
    slots: Tensor
    stays: Tensor
    tail: int

    def cut(self, x: Tensor) -> Tensor:
        """A tensor (B,N) or (B,N,C) of the prompt, cut."""
        if x.ndim == 2:
            return x.expand(self.order.shape[0], -1).gather(1, self.order)
        return x.gather(1, self.order[..., None].expand(-1, -1, x.shape[2]))

    def restore(self, x: Tensor) -> Tensor:
        """The rows (B,n,C) of the cut prompt at full length (B,N,C)."""
        return x.gather(1, self.slots[..., None].expand(-1, -1, x.shape[2]))


class CacheState(NamedTuple):
    """The cut of the prompt that a cache holds.

    mask: 1 (B,n) for a token, 0 for padding.
    length: tokens N of the whole prompt.
    tail: the number of last tokens that every row holds, so that a cache may be cropped by them.
    """

    mask: Tensor
    length: int
    tail: int

    def cropped(self, tokens: int) -> CacheState:
        """The state without its last tokens, of which there are at most `tail`."""
        if not tokens:
            return self
        return CacheState(self.mask[:, :-tokens], self.length - tokens, self.tail - tokens)


def make_prompt(dropped: Tensor, visible: Tensor) -> Prompt:
    """The cut of a prompt.

    Rows that lose different numbers of tokens are padded on the side that is padded already, on the left if none is.

    Args:
        dropped: true (B,N) for a slot that is not handed over.
        visible: true (B,N) for a token, false for padding.
    """
    stays = visible & ~dropped
    kept, tail = torch.stack([stays.sum(1).max(), stays.all(0).flip(0).int().cumprod(0).sum()]).tolist()
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
    return Prompt(order, mask.long(), slots, stays, tail)


def cache_of(values: Any) -> Any:
    """The cache among arguments or outputs, under either of its names, or None."""
    cache = values.get("cache")
    return values.get("past_key_values") if cache is None else cache


def state_of(cache: Any) -> CacheState | None:
    """The state of a cache that holds a cut prompt, else None."""
    return getattr(cache, STATE, None)


def set_state(cache: Any, state: CacheState) -> None:
    """Set the state of a cache, which its copies have too. It follows the cache's rows, and ends when that is empty."""
    setattr(cache, STATE, state)
    add_layer(cache, Layer(0, followed))


def followed(base: Any) -> dict[str, Any]:
    """The layer of the class of a cache whose state follows it."""

    def follow(name: str, rows_of: Callable[[Tensor, Any], Tensor] | None) -> Any:
        @wraps(getattr(base, name))
        def change(self: Any, *args: Any, **kwargs: Any) -> None:
            getattr(base, name)(self, *args, **kwargs)
            state: CacheState = getattr(self, STATE)
            if rows_of is not None:
                setattr(self, STATE, state._replace(mask=rows_of(state.mask, *args, *kwargs.values())))
            elif not self.get_seq_length():
                delattr(self, STATE)
                remove_layer(self, followed)

        return change

    changes = {
        "reorder_cache": _selected,
        "batch_select_indices": _selected,
        "batch_repeat_interleave": lambda mask, repeats: mask.repeat_interleave(repeats, 0),
        "crop": None,
        "reset": None,
    }
    return {name: follow(name, rows_of) for name, rows_of in changes.items() if hasattr(base, name)}


def _selected(mask: Tensor, rows: Any) -> Tensor:
    """The rows of a mask at an index."""
    return mask[rows.to(mask.device) if isinstance(rows, Tensor) else rows]


def set_stays(outputs: Any, images: Any, stays: Tensor) -> None:
    """Set the outputs of the images, and the tokens (B,N) of the prompt that the language model got.

    Transformers 5.23 has the rows of the images in place of their outputs.
    """
    if "image_outputs" in type(outputs).__dataclass_fields__:
        setattr(images, KEPT, stays)
        outputs.image_outputs = images
    else:
        rows = images.pooler_output
        outputs.image_hidden_states = rows.clone() if isinstance(rows, Tensor) else torch.cat(list(rows))
        setattr(outputs.image_hidden_states, KEPT, stays)


def stays_of(outputs: Any) -> Tensor | None:
    """The tokens that `set_stays` has set, of outputs or of those that another module made of them."""
    images = outputs.get("image_outputs") if isinstance(outputs, dict) else None
    images = outputs.get("image_hidden_states") if images is None and isinstance(outputs, dict) else images
    return getattr(images, KEPT, None)
