"""Tokenizers of every library: token ids of the right length, the marks around words, and texts that are cut."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipkernels.arguments import describe
from clipkernels.messages import quantity

Tokenizer = Callable[[list[str]], Tensor]
"""A function from n texts to token ids (n,T), or a tokenizer or processor of transformers."""

LAST_LETTER = re.compile(r"\w(?=\W*$)")


def ids_of(tokenizer: Any, texts: list[str], context: int | None) -> Tensor:
    """The token ids (n,T) int64 of texts.

    A transformers tokenizer, or a processor's, is called with padding after the text and truncation, to the
    length that the tower was trained with. By default it does neither, and pads on the side that it is set to.

    Args:
        tokenizer: a function from n texts to ids (n,T), or a tokenizer or a processor of transformers.
        texts: n texts.
        context: the largest number of tokens in a text, or None if the text tower does not define it.
    Raises:
        TypeError: the tokenizer is not callable.
        ValueError: the tokenizer returns something else, or pads before a text and has no option to change that.
    """
    if hasattr(tokenizer, "image_processor"):
        tokenizer = tokenizer.tokenizer
    if not callable(tokenizer):
        raise TypeError(f"tokenizer must be callable, or a processor of transformers, got {describe(tokenizer)}")
    if hasattr(tokenizer, "model_max_length"):
        length = min(tokenizer.model_max_length, context or tokenizer.model_max_length)
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": length}
        if "padding_side" in signature(tokenizer).parameters:
            options["padding_side"] = "right"
        elif getattr(tokenizer, "padding_side", "right") != "right":
            raise ValueError(
                f"tokenizer must pad after a text, got {type(tokenizer).__name__}, which pads before it: set its "
                "padding_side to right"
            )
        return tokenizer(texts, return_tensors="pt", **options)["input_ids"]
    ids = tokenizer(texts)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != len(texts):
        actual = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"tokenizer must return ids ({len(texts)},T) for {quantity(len(texts), 'text')}, got {actual}")
    return ids.long()


def find_cut(tokenizer: Any, texts: Sequence[str], ids: Tensor, context: int | None) -> list[int]:
    """The indices of the texts whose end a tokenizer drops because they are too long.

    Such a text has the same ids with another letter at its end. The loss of a full stop alone does not count.

    Args:
        tokenizer: as in `ids_of`.
        texts: n texts.
        ids: (n,T) their ids.
        context: as in `ids_of`.
    """
    # Two equal ids at the end are padding, except after a text whose last words are equal.
    full = [row for row, end in enumerate(ids[:, -2:].tolist()) if len(set(end)) == len(end)]
    full = [row for row in full if LAST_LETTER.search(texts[row])]
    if not full:
        return []
    # In one call, because a tokenizer may pad to the longest text of a call.
    both = [texts[row] for row in full] + [LAST_LETTER.sub(_another, texts[row]) for row in full]
    actual, changed = ids_of(tokenizer, both, context).chunk(2)
    return [row for row, same in zip(full, (actual == changed).all(1).tolist(), strict=True) if same]


def _another(letter: re.Match[str]) -> str:
    """Another letter than that of a match."""
    return "z" if letter[0] in "xX" else "x"


class Marks(NamedTuple):
    """The ids that a tokenizer puts around the words of a text.

    start: number of ids before the words.
    end: the ids after the words.
    padding: the id that fills the rest.
    """

    start: int
    end: tuple[int, ...]
    padding: int

    @classmethod
    def from_ids(cls, ids: Tensor) -> Marks:
        """The marks of a tokenizer, from its ids (n,T) of the empty text, of a short text, and of other texts.

        Raises:
            ValueError: the tokenizer puts no padding after a text, or its marks do not separate words from padding.
        """
        empty, short = ids[0].tolist(), ids[1].tolist()
        padding = empty[-1]
        empty_marks, short_text = _strip_padding(empty, padding), _strip_padding(short, padding)
        start = 0
        while start < len(empty_marks) and empty_marks[start] == short[start]:
            start += 1
        # Padding after a text shrinks as the text grows, and no padding stands before it.
        if not len(empty_marks) < len(short_text) < len(short) or short[start] == padding:
            raise ValueError(
                f"tokenizer must pad after a text, got ids {empty!r:.60} for the empty text and {short!r:.60} for a "
                "short text: set its padding_side to right"
            )
        marks = cls(start, tuple(empty_marks[start:]), padding)
        counts = marks.words(ids).sum(1).tolist()
        if counts[0] or not all(counts[1:]):
            raise ValueError(
                f"tokenizer must put the same marks around each text, got {quantity(counts[0], 'word')} in the empty "
                f"text and {counts[1:]} in the others, from ids {ids.tolist()!r:.200}"
            )
        return marks

    def words(self, ids: Tensor) -> Tensor:
        """A mask (B,T) bool of the words among ids (B,T)."""
        place = torch.arange(ids.shape[1], device=ids.device)
        # The padding id may also be a word's (CLIP's is an exclamation mark), so only a trailing run is padding.
        length = torch.where(ids != self.padding, place + 1, 0).amax(1)
        if self.end:
            ends = (length[:, None] - len(self.end) + place[: len(self.end)]).clamp(min=0)
            matches = ids.gather(1, ends) == torch.tensor(self.end, device=ids.device)
            length = length - len(self.end) * matches.all(1)
        return (place >= self.start) & (place < length[:, None])


def _strip_padding(ids: list[int], padding: int) -> list[int]:
    """Ids without trailing padding."""
    length = len(ids)
    while length and ids[length - 1] == padding:
        length -= 1
    return ids[:length]
