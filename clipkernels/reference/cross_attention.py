"""CALIP's cross-attention without parameters, and the logits it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from clipkernels.reference.precision import autocast_disabled, upcast

# Numbers that a few images' similarities or attended patches may be: they stay in the cache of a CPU.
CACHED = 2**20
# And where there is memory enough, but launches count.
DEVICE = 2**25


class CrossAttended(NamedTuple):
    """visual (B,P,E) patches that have looked at the classes, text (B,K,E) classes that have looked at the patches."""

    visual: Tensor
    text: Tensor


def cross_attention(visual: Tensor, text: Tensor, alpha: float) -> CrossAttended:
    with autocast_disabled(visual):
        classes = upcast(text)

        def attend(patches: Tensor) -> tuple[Tensor, ...]:
            wide = upcast(patches)
            logits = (wide @ classes.T).div_(alpha)
            seen, found = logits.softmax(2) @ classes, logits.softmax(1).mT @ wide
            return seen.to(patches.dtype), found.to(patches.dtype)

        return CrossAttended(*_by_images(attend, text, visual))


def calip_terms(visual: Tensor, pooled: Tensor, text: Tensor, alpha: float) -> Tensor:
    """The three terms of the logits (3,B,K), each × 100, in fp32 or wider."""
    with autocast_disabled(visual):
        classes, image = upcast(text), upcast(pooled)

        def attend(patches: Tensor, image: Tensor) -> tuple[Tensor, ...]:
            wide = upcast(patches)
            logits = (wide @ classes.T).div_(alpha)
            seen = logits.softmax(2) @ classes
            # ⟨F_v, Σ_p w_p·F_s[p]⟩ = Σ_p w_p·⟨F_v, F_s[p]⟩: the attended classes (B,K,E) are never made.
            found = image[:, None] @ wide.mT @ logits.softmax(1)
            return found[:, 0], seen.mean(1) + seen.amax(1)

        second, seen = _by_images(attend, text, visual, image)
        return 100 * torch.stack([image @ classes.T, second, seen @ classes.T])


def _by_images(attend: Callable[..., tuple[Tensor, ...]], text: Tensor, *batches: Tensor) -> tuple[Tensor, ...]:
    """What `attend` makes of the images, a few at a time; of all at once where their similarities are kept anyway, by
    autograd, or where a graph is made of it, which would have the batch's size in it."""
    visual = batches[0]
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return attend(*batches)
    held = CACHED if visual.device.type == "cpu" else DEVICE
    few = max(1, held // (visual.shape[1] * max(text.shape)))
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (text, *batches))
    if learns or len(visual) <= few:
        return attend(*batches)
    made: list[Tensor] = []
    for start in range(0, len(visual), few):
        parts = attend(*(tensor[start : start + few] for tensor in batches))
        made = made or [part.new_empty(len(visual), *part.shape[1:]) for part in parts]
        for whole, part in zip(made, parts, strict=True):
            whole[start : start + few] = part
    return tuple(made)
