"""Token ids of texts by a tokenizer.json, without the library that trained it.

    {"file": "tokenizer.json", "kind": "clip" | "bytes" | "huggingface", "context_length": L, "pad_id": 0,
     "start_id": 49406, "end_id": 49407, "clean": "lower", "zero_id": null}

A text is cleaned, split, put between the start and the end, cut before its end to L ids, and padded behind it. The
file holds the splitting and the marks. `zero_id` is an id that becomes 0, as open_clip strips a separator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipkernels.runtime.cleaning import CLEANERS
from clipkernels.runtime.packages import required


class TextTokenizer:
    """A tokenizer from n texts to ids (n,L) int64.

    Args:
        folder: the folder of the file.
        record: as in this module's description.
    Raises:
        ImportError: tokenizers is not installed.
        ValueError: a record with another way of cleaning, or a file that is no tokenizer.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any]) -> None:
        if record["clean"] not in CLEANERS:
            raise ValueError(f"expected one of the cleanings {', '.join(CLEANERS)}, got {record['clean']!r:.40}")
        self.clean, self.zero_id = CLEANERS[record["clean"]], record.get("zero_id")
        self.context_length: int = record["context_length"]
        try:
            self._tokenizer = required("tokenizers").Tokenizer.from_file(str(folder / record["file"]))
        except ImportError:
            raise
        except Exception as error:  # tokenizers raises Exception itself
            raise ValueError(f"expected a tokenizer, got {folder / record['file']}: {error}") from error
        self._tokenizer.enable_truncation(self.context_length)
        self._tokenizer.enable_padding(length=self.context_length, pad_id=record["pad_id"])

    def __call__(self, texts: Sequence[str]) -> Any:
        """The ids (n,L) int64 of n texts.

        Raises:
            TypeError: no list of texts.
            ValueError: a text with half of a surrogate pair, as a file's name that is no UTF-8 has.
        """
        items = list(texts) if isinstance(texts, Iterable) else [texts]
        if isinstance(texts, str) or not all(isinstance(text, str) for text in items):
            raise TypeError(f"texts must be a list of texts, got {texts!r:.80}")
        try:
            encodings = self._tokenizer.encode_batch([self.clean(text) for text in items])
        except TypeError as error:
            raise ValueError(f"texts must be Unicode without lone surrogates, got {items!a:.80}") from error
        ids = np.array([encoding.ids for encoding in encodings], np.int64).reshape(len(items), self.context_length)
        return ids if self.zero_id is None else np.where(ids == self.zero_id, 0, ids)
