"""CALIP's parameter-free cross-attention, and its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from clipkernels.reference.precision import autocast_disabled, upcast

# Elements per chunk of images on a CPU: fits in cache.
CPU_CHUNK_ELEMENTS = 2**20
# Elements per chunk of images on a GPU: few launches.
DEVICE_CHUNK_ELEMENTS = 2**25


class CrossAttended(NamedTuple):
    """visual (B,P,E), patches that attended to the classes, and text (B,K,E), classes that attended to the patches."""

    visual: Tensor
    text: Tensor


def cross_attention(visual: Tensor, text: Tensor, alpha: float) -> CrossAttended:
    with autocast_disabled(visual):
        classes = upcast(text)

        def attend(patches: Tensor) -> tuple[Tensor, ...]:
            wide = upcast(patches)
            logits = (wide @ classes.T).div_(alpha)
            attended_visual, attended_text = logits.softmax(2) @ classes, logits.softmax(1).mT @ wide
            return attended_visual.to(patches.dtype), attended_text.to(patches.dtype)

        return CrossAttended(*_map_chunks(attend, text, visual))


def calip_terms(visual: Tensor, pooled: Tensor, text: Tensor, alpha: float) -> Tensor:
    """Return the three terms of the logits (3,B,K), each × 100, in fp32 (fp64 for fp64 inputs)."""
    with autocast_disabled(visual):
        classes, image = upcast(text), upcast(pooled)

        def attend(patches: Tensor, image: Tensor) -> tuple[Tensor, ...]:
            wide = upcast(patches)
            logits = (wide @ classes.T).div_(alpha)
            attended_visual = logits.softmax(2) @ classes
            # ⟨F_v, Σ_p w_p·F_s[p]⟩ = Σ_p w_p·⟨F_v, F_s[p]⟩, so the attended classes (B,K,E) are never needed.
            second = image[:, None] @ wide.mT @ logits.softmax(1)
            return second[:, 0], attended_visual.mean(1) + attended_visual.amax(1)

        second, pooled_visual = _map_chunks(attend, text, visual, image)
        return 100 * torch.stack([image @ classes.T, second, pooled_visual @ classes.T])


def _map_chunks(attend: Callable[..., tuple[Tensor, ...]], text: Tensor, *batches: Tensor) -> tuple[Tensor, ...]:
    """Return the results of `attend` on the batches, computed on a chunk of images at a time."""
    visual = batches[0]
    # Chunks would put the size of the batch into a graph.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return attend(*batches)
    elements = CPU_CHUNK_ELEMENTS if visual.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    chunk = max(1, elements // (visual.shape[1] * max(text.shape)))
    # Chunks save no memory if autograd saves the similarities.
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (text, *batches))
    if needs_grad or len(visual) <= chunk:
        return attend(*batches)
    results: list[Tensor] = []
    for start in range(0, len(visual), chunk):
        parts = attend(*(tensor[start : start + chunk] for tensor in batches))
        results = results or [part.new_empty(len(visual), *part.shape[1:]) for part in parts]
        for result, part in zip(results, parts, strict=True):
            result[start : start + chunk] = part
    return tuple(results)
