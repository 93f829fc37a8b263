"""The modules that are exported: images to embeddings, and token ids to embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipkernels import adapters
from clipkernels.adapters import UnsupportedTower
from clipkernels.adapters.text import find_text_encoder
from clipkernels.adapters.tokenizers import ids_of
from clipkernels.encode import encode_image
from clipkernels.patching import method_of

TEXTS = (
    "", "a photo of a cat.", "two dogs in the snow", "Ärger? 7 days, <x> & co!", "a red bus", "THE END", "x",
    "a very long sentence about nothing at all, which goes on and on", "日本の山", "a child's drawing of a house",
    "10 apples", "a photo of a photo",
)  # fmt: skip
"""Texts whose ids the text tower is traced and compared with."""


class ImageEmbedding(nn.Module):
    """A module from preprocessed images (B,3,S,S) to the embeddings (B,E) of the host's own encode_image.

    A patched tower whose forward returns every token gives the embedding alone, so that its last block computes only
    the rows that are pooled.

    Args:
        model: a model with an image tower.
        unit: normalise the embeddings to length one.
    """

    def __init__(self, model: nn.Module, unit: bool = False) -> None:
        super().__init__()
        self.model, self.unit = model, unit

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The embeddings (B,E) of images (B,3,S,S)."""
        embeddings = self._encode(pixel_values)
        return normalize(embeddings, dim=-1) if self.unit else embeddings

    def _encode(self, images: Tensor) -> Tensor:
        model: Any = self.model
        try:
            tower = adapters.find_tower(model)
        except UnsupportedTower:  # such as a ResNet
            embeddings: Tensor = model.encode_image(images) if hasattr(model, "encode_image") else model(images)
            return embeddings
        if method_of(model) is None or not tower.returns_tokens:
            return tower.encode(images)
        return encode_image(model, images).embedding


class TextEmbedding(nn.Module):
    """A module from token ids (B,L) to the embeddings (B,E) of the host's own encode_text.

    Args:
        model: a model with a text tower.
        unit: normalise the embeddings to length one.
    """

    def __init__(self, model: nn.Module, unit: bool = False) -> None:
        super().__init__()
        self.model, self.unit = model, unit
        self.encode = find_text_encoder(model).encode

    def forward(self, input_ids: Tensor) -> Tensor:
        """The embeddings (B,E) of ids (B,L) int64 or int32."""
        embeddings = self.encode(input_ids.long())
        return normalize(embeddings, dim=-1) if self.unit else embeddings


def example_ids(model: nn.Module, tokenizer: Any) -> Tensor:
    """The ids (12,L) int64 of a few texts, of the full length that the text tower takes.

    Without a tokenizer they are arbitrary ids, the largest of which ends a text.

    Raises:
        ValueError: neither the text tower nor a tokenizer has a length, or the tokenizer's ids are not of one length,
            or longer than the text tower takes.
    """
    context = find_text_encoder(model).context
    if tokenizer is not None:
        ids = ids_of(tokenizer, list(TEXTS), context)
        if not torch.equal(ids_of(tokenizer, list(TEXTS[:1]), context), ids[:1]):
            raise ValueError("tokenizer must pad every text to one length, got one that pads to the longest of a call")
        if context is not None and ids.shape[1] > context:
            raise ValueError(f"tokenizer must give texts of at most {context} tokens, got {ids.shape[1]}")
        return ids
    if context is None:
        raise ValueError("expected tokenizer=, because the text tower does not say how long a text is, got None")
    tables = [(name.rpartition(".")[2], part) for name, part in model.named_modules() if isinstance(part, nn.Embedding)]
    sizes = [part.num_embeddings for name, part in tables if "token" in name or "word" in name]
    last = max(sizes, default=3) - 1
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, max(last, 2), (len(TEXTS), context), generator=generator)
    ends = torch.arange(1, len(TEXTS) + 1).clamp(max=context - 1)[:, None]
    position = torch.arange(context)
    return torch.where(position < ends, ids, torch.where(position == ends, last, 0))
