"""Contexts in place of the first words of every prompt, in the first blocks of a text tower."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def text_tower(model: Any) -> Any:
    """The module that holds the blocks of a text tower.

    Raises:
        ValueError: it has none of open_clip's or OpenAI's.
    """
    text = getattr(getattr(model, "text", model), "transformer", None)
    if not hasattr(text, "resblocks"):
        raise ValueError(f"coupled tokens need a text tower of open_clip's own, got {type(model).__name__}")
    return text


@contextmanager
def injected_contexts(model: Any, contexts: Tensor) -> Iterator[None]:
    """The text tower with contexts (D,T,C) at the T places after the first, in its first D blocks.

    Raises:
        ValueError: a text tower without such blocks, or of another width.
    """
    text = text_tower(model)
    if text.width != contexts.shape[2]:
        raise ValueError(f"the contexts are for a text tower of width {contexts.shape[2]}, got {text.width}")
    hooks = []
    try:
        for context, block in zip(contexts, text.resblocks, strict=False):  # a shallower tower has fewer
            hooks.append(block.register_forward_pre_hook(_hook(context, batch_first(text))))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def batch_first(text: Any) -> bool:
    """Whether a text tower runs (n,T,C); OpenAI's, whose blocks hold their mask, runs (T,n,C)."""
    return getattr(text, "batch_first", not hasattr(text.resblocks[0], "attn_mask"))


def check_prompts(model: Any, ids: Tensor, sizes: Sequence[int], count: int) -> None:
    """Raises ValueError where contexts in place of `count` words leave nothing of a prompt, or two classes alike.

    Args:
        model: whose text tower reads them.
        ids: (n,T) tokens of all prompts.
        sizes: how many of the prompts are of each class.
        count: places after the first.
    """
    left = ids[:, 1 + count :]
    pool = getattr(getattr(model, "text", model), "text_pool_type", "argmax")
    ends = pool == "argmax" and bool((ids.argmax(1) <= count).any())
    classes = [sorted(map(tuple, rows.tolist())) for rows in left.split(list(sizes))]
    if not left.shape[1] or ends or any(one in classes[:at] for at, one in enumerate(classes)):
        raise ValueError(
            f"prompts must differ after their first {count} tokens, which the contexts replace, and be longer: "
            'expected such as "a photo of a {}."'
        )


@torch.no_grad()
def first_words(model: Any, ids: Tensor, count: int) -> Tensor:
    """What enters the first block of the text tower (count,C) for the first words of a prompt (1,T)."""
    seen: list[Tensor] = []
    text = text_tower(model)
    handle = text.resblocks[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        model.encode_text(ids)
    finally:
        handle.remove()
    x = seen[0] if batch_first(text) else seen[0].transpose(0, 1)
    return x[0, 1 : 1 + count]


def _hook(context: Tensor, first: bool) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A hook that puts contexts (T,C) in place of what enters a block at the places after the first."""
    stop = 1 + len(context)

    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x = arguments[0] if first else arguments[0].transpose(0, 1)
        x = torch.cat([x[:, :1], context.to(x).expand(x.shape[0], -1, -1), x[:, stop:]], 1)
        return (x if first else x.transpose(0, 1), *arguments[1:])

    return hook
