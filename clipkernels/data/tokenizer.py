"""A byte-level tokenizer: every string is valid, and the vocabulary has 259 entries.

Token ids: 0 padding, 1 + b for the byte b, 257 start, 258 end. The end has the largest id because open_clip's `argmax`
text pooling uses the position of the largest id.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clipkernels.arguments import check_int, describe, is_list

PAD, START, END = 0, 257, 258
VOCABULARY = 259


class ByteTokenizer:
    """A tokenizer from texts to token ids, called like open_clip's.

    Args:
        context_length: tokens per text, start and end included; longer texts are cut after the last byte that
            fits.
    """

    def __init__(self, context_length: int = 64) -> None:
        check_int("context_length", context_length, 2)
        self.context_length = context_length

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> torch.Tensor:
        """Token ids (n, context_length) int64 of n texts, which are stripped, lower-cased and padded with zeros."""
        length = self.context_length if context_length is None else context_length
        check_int("context_length", length, 2)
        texts = [texts] if isinstance(texts, str) else texts
        if not is_list(texts) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"texts must be a text or a list of texts, got {describe(texts)}")
        ids = torch.full((len(texts), length), PAD, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            data = text.strip().lower().encode()[: length - 2]
            row[: len(data) + 2] = torch.tensor([START, *(1 + byte for byte in data), END])
        return ids
