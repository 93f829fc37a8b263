"""The layer of the module that owns tower, projector and language model, which hands image tokens over.

    get_image_features   the host's rows, NaN in each slot that is not handed over
    forward              the host's merge of text and image; the prompt without NaN rows, at the original positions;
                         hidden states at full length, each slot that was cut with the row before it

Only the host's own methods are called. The state of a prompt is in the cache that the host returns.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from clipkernels.messages import quantity
from clipkernels.methods import Select
from clipkernels.slot import SLOT, WeakContainer
from clipkernels.vlm.counts import check_counts, choose_packed, method_of, tower_of
from clipkernels.vlm.families import family_of
from clipkernels.vlm.prompt import CacheState, Prompt, cache_of, make_prompt, set_state, set_stays, state_of


def handed_over(base: Any) -> dict[str, Any]:
    """The layer of a container's class."""
    features, signature = inspect.signature(base.get_image_features), inspect.signature(base.forward)

    @wraps(base.get_image_features)
    def get_image_features(self: Any, *args: Any, **kwargs: Any) -> Any:
        values = _arguments(features, self, args, kwargs)
        as_tuple = values.pop("return_dict", None) is False
        if not family_of(self).packs:
            outputs = base.get_image_features(self, **values, return_dict=True)
            check_counts(self, outputs.pooler_output, values)
        elif isinstance(method_of(self), Select):
            rankings: list[Any] = []
            outputs = base.get_image_features(self, **values, return_dict=True, ranking=rankings)
            choose_packed(self, outputs, rankings, values)
        else:  # Dense
            outputs = base.get_image_features(self, **values, return_dict=True)
        return outputs.to_tuple() if as_tuple else outputs

    @wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        values = _arguments(signature, self, args, kwargs)
        pixels, images = values.get("pixel_values"), values.get("mm_encoder_outputs", {})
        both = pixels is not None and "mm_encoder_outputs" in values
        if both or not isinstance(images, Mapping) or ("input_ids" in values) == ("inputs_embeds" in values):
            return base.forward(self, **values)  # which refuses them
        if values.get("pixel_values_videos") is not None or images.get("video") is not None:
            raise ValueError("hand_over=True takes images, got a video: patch without hand_over")
        shows = (pixels is not None and len(pixels) > 0) or images.get("image") is not None
        cache = cache_of(values)
        state = state_of(cache)
        if not shows and state is None:
            return base.forward(self, **values)
        _check_cache(cache, shows)
        as_dict = values.pop("return_dict", None)
        as_dict = self.config.return_dict if as_dict is None else as_dict
        if state is not None:
            outputs = base.forward(self, **_continued(self, values, cache, state), return_dict=True)
        else:
            outputs = _begin(self, base, features, values)
        return outputs if as_dict else outputs.to_tuple()

    def __setstate__(self: Any, state: Any) -> None:
        base.__setstate__(self, state)
        slots = vars(tower_of(self).owner)
        slots[SLOT] = slots[SLOT]._replace(container=WeakContainer(self))

    return {"get_image_features": get_image_features, "forward": forward, "__setstate__": __setstate__}


def _arguments(signature: inspect.Signature, self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a call by name, those that are None left out."""
    bound = signature.bind(self, *args, **kwargs).arguments
    _, *named = bound.items()
    values = {name: value for name, value in named if name != "kwargs"} | bound.get("kwargs", {})
    return {name: value for name, value in values.items() if value is not None}


def _check_cache(cache: Any, shows: bool) -> None:
    """Raise ValueError for a cache that cannot hold a cut prompt."""
    if cache is not None and getattr(cache, "is_compileable", False):
        raise ValueError(
            "a prompt with fewer image tokens takes a cache that grows, got a static one: omit cache_implementation"
        )
    length = 0 if cache is None else cache.get_seq_length()
    if shows and length:
        raise ValueError(
            f"images belong in the first forward of a cache, got a cache that holds {quantity(length, 'token')}: start "
            "a new cache for each prompt with images, and omit prefill_chunk_size"
        )


def _begin(self: Any, base: Any, features: inspect.Signature, values: dict[str, Any]) -> Any:
    """The outputs for a prompt with images."""
    visible = _mask_of(values)
    images = dict(values.pop("mm_encoder_outputs", None) or {})
    if images.get("image") is None:
        names = [name for name in features.parameters if name in values]
        if family_of(self).passes_options:  # a patched tower returns no attentions
            named = {"output_attentions", *inspect.signature(base.forward).parameters}
            names += [name for name in values if name not in (*names, *named)]
        images["image"] = self.get_image_features(**{name: values[name] for name in names}, return_dict=True)
    images["image"] = copy.copy(images["image"])  # the same may be given with several prompts
    for name in features.parameters:
        values.pop(name, None)
    embeds = values.get("inputs_embeds")
    embeds = _embed(self, values["input_ids"]) if embeds is None else embeds
    merged = _merge(self, values.get("input_ids"), embeds, images["image"].pooler_output)
    batch, length = merged.shape[:2]
    visible = torch.ones(batch, length, dtype=torch.bool, device=merged.device) if visible is None else visible.bool()
    slots = values["input_ids"] == self.config.image_token_id if "input_ids" in values else ~embeds[..., 0].isnan()
    dropped = merged[..., 0].isnan() & slots
    if not bool(dropped.any()):
        outputs = base.forward(self, **values, mm_encoder_outputs=images, return_dict=True)
        set_stays(outputs, images["image"], visible)
        return outputs
    prompt = make_prompt(dropped, visible)
    positions = values.pop("position_ids", None)
    if positions is None:
        positions = torch.arange(length, device=merged.device)[None] + family_of(self).first_position
    kinds = values.pop("token_type_ids", None)
    if kinds is not None:
        values["token_type_ids"] = prompt.cut(kinds)
    for name in ("input_ids", "inputs_embeds", "attention_mask"):
        values.pop(name, None)
    outputs = base.forward(
        self,
        inputs_embeds=prompt.cut(merged).masked_fill(prompt.mask[..., None] == 0, 0),
        attention_mask=prompt.mask,
        position_ids=prompt.cut(positions),
        return_dict=True,
        **values,
    )
    return _restored(outputs, images["image"], prompt, length)


def _restored(outputs: Any, image_outputs: Any, prompt: Prompt, length: int) -> Any:
    """The outputs at full length, with those of the images, and their cache with the state of the prompt."""
    cache = cache_of(outputs)
    if cache is not None:
        set_state(cache, CacheState(prompt.mask, length, prompt.tail))
    outputs.last_hidden_state = prompt.restore(outputs.last_hidden_state)
    set_stays(outputs, image_outputs, prompt.stays)
    return outputs


def _continued(self: Any, values: dict[str, Any], cache: Any, state: CacheState) -> dict[str, Any]:
    """The arguments of a forward that continues a cut prompt.

    Raises:
        ValueError: other tokens than those that follow what the cache holds, or a cache without the whole prompt.
    """
    after = cache.get_seq_length() - state.mask.shape[1]
    if -after > state.tail:
        raise ValueError(
            f"expected a cache cropped by at most the last {quantity(state.tail, 'token')} of its prompt, got one "
            f"cropped by {-after}: start a new cache"
        )
    state = state.cropped(max(-after, 0))
    tokens = values["inputs_embeds"] if "input_ids" not in values else values["input_ids"]
    batch, new = tokens.shape[:2]
    start = state.length + max(after, 0)
    mask, positions = _mask_of(values), values.get("position_ids")
    # One token cannot overlap with what the cache holds.
    follows = (
        new == 1 or positions is None or mask is not None or bool((positions[..., 0] == _first(self, start)).all())
    )
    if batch != state.mask.shape[0] or (mask is not None and mask.shape[1] != start + new) or not follows:
        raise ValueError(
            f"expected {quantity(state.mask.shape[0], 'row')} of tokens that follow the {start} of the cache, got "
            f"{batch} × {quantity(new, 'token')}: a cache of a prompt with fewer image tokens continues in its own "
            "generate alone, so start a new cache"
        )
    grown = state.mask.new_ones(batch, start + new - state.length) if mask is None else mask[:, state.length :].long()
    if positions is None:
        values["position_ids"] = torch.arange(new, device=tokens.device)[None] + _first(self, start)
    return {**values, "attention_mask": torch.cat([state.mask, grown], 1)}


def _first(self: Any, start: int) -> int:
    """The position of a token at index `start` of a prompt without padding."""
    return start + family_of(self).first_position


def _mask_of(values: Mapping[str, Any]) -> Tensor | None:
    """The padding mask (B,N), or None.

    Raises:
        ValueError: a mask of another kind.
    """
    mask = values.get("attention_mask")
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    kind = f"one of {mask.ndim} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(f"a prompt with fewer image tokens takes an attention mask (B,N), got {kind}")


def _embed(self: Any, input_ids: Tensor) -> Tensor:
    """The embedded tokens; an image token beyond the vocabulary becomes token 0, as in the host."""
    if self.config.image_token_id >= getattr(self, "vocab_size", self.config.image_token_id + 1):
        input_ids = input_ids.masked_fill(input_ids == self.config.image_token_id, 0)
    embeds: Tensor = self.get_input_embeddings()(input_ids)
    return embeds


def _merge(self: Any, input_ids: Tensor | None, embeds: Tensor, image_features: Any) -> Tensor:
    """The host's merge of embedded tokens (B,N,C) and image tokens."""
    rows = image_features if isinstance(image_features, Tensor) else torch.cat(list(image_features))
    rows = rows.to(embeds.device, embeds.dtype)
    merged: Tensor
    if hasattr(self, "inputs_merger"):
        merged = self.inputs_merger(input_ids=input_ids, inputs_embeds=embeds, image_hidden_states=rows)
    else:
        mask = self.get_placeholder_mask(input_ids, inputs_embeds=embeds, image_features=rows)
        merged = embeds.masked_scatter(mask[0] if isinstance(mask, tuple) else mask, rows)  # with videos in some
    return merged
