"""Replace the first words of every prompt by contexts, in the first blocks of a text tower."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clipkernels.messages import quantity


def text_tower(model: Any) -> Any:
    """The module that holds the blocks of a text tower.

    Raises:
        ValueError: a model without open_clip's or OpenAI's text blocks.
    """
    text = getattr(getattr(model, "text", model), "transformer", None)
    if not hasattr(text, "resblocks"):
        raise ValueError(f"coupled tokens need open_clip's or OpenAI's text tower, got {type(model).__name__}")
    return text


@contextmanager
def injected_contexts(model: Any, contexts: Tensor) -> Iterator[None]:
    """Inject contexts (D,T,C) into the first D blocks of the text tower, at the T positions after the first.

    Raises:
        ValueError: a text tower without open_clip's or OpenAI's blocks, or of another width.
    """
    text = text_tower(model)
    if text.width != contexts.shape[2]:
        raise ValueError(f"the contexts are for a text tower of width {contexts.shape[2]}, got {text.width}")
    hooks = []
    try:
        for context, block in zip(contexts, text.resblocks, strict=False):  # the tower may have fewer than D blocks
            hooks.append(block.register_forward_pre_hook(_hook(context, batch_first(text))))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def batch_first(text: Any) -> bool:
    """Return true if a text tower's blocks take (n,T,C); OpenAI's, which hold their mask, take (T,n,C)."""
    return getattr(text, "batch_first", not hasattr(text.resblocks[0], "attn_mask"))


def check_prompts(model: Any, ids: Tensor, sizes: Sequence[int], count: int) -> None:
    """Raise ValueError if replacing `count` words leaves nothing of a prompt, or makes two classes equal.

    Args:
        model: the CLIP whose text tower reads the prompts.
        ids: (n,T) token ids of all prompts, class by class.
        sizes: number of prompts of each class.
        count: positions after the first that are replaced.
    """
    remaining = ids[:, 1 + count :]
    pool = getattr(getattr(model, "text", model), "text_pool_type", "argmax")
    replaces_end = pool == "argmax" and bool((ids.argmax(1) <= count).any())
    classes = [sorted(map(tuple, rows.tolist())) for rows in remaining.split(list(sizes))]
    if not remaining.shape[1] or replaces_end or any(one in classes[:index] for index, one in enumerate(classes)):
        raise ValueError(
            f"prompts must differ after their first {quantity(count, 'token')}, which the contexts replace, and be "
            'longer: use templates such as "a photo of a {}."'
        )


@torch.no_grad()
def first_words(model: Any, ids: Tensor, count: int) -> Tensor:
    """The inputs (count,C) of the text tower's first block for the first `count` words of a prompt (1,T)."""
    inputs: list[Tensor] = []
    text = text_tower(model)
    handle = text.resblocks[0].register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        model.encode_text(ids)
    finally:
        handle.remove()
    x = inputs[0] if batch_first(text) else inputs[0].transpose(0, 1)
    return x[0, 1 : 1 + count]


def _hook(context: Tensor, first: bool) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A forward pre-hook that replaces a block's inputs at the T positions after the first by contexts (T,C)."""
    stop = 1 + len(context)

    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x = arguments[0] if first else arguments[0].transpose(0, 1)
        x = torch.cat([x[:, :1], context.to(x).expand(x.shape[0], -1, -1), x[:, stop:]], 1)
        return (x if first else x.transpose(0, 1), *arguments[1:])

    return hook
