"""Tokenizers as a tokenizer.json: the host's token ids without the host."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from clipkernels.adapters.tokenizers import ids_of
from clipkernels.data import bundled
from clipkernels.data.tokenizer import ByteTokenizer
from clipkernels.exporting.tokenizer_files import tokenizer_record
from clipkernels.runtime import cleaning
from clipkernels.runtime.cleaning import CLEANERS
from clipkernels.runtime.tokenization import TextTokenizer
from tests.export.texts import odd_texts
from tests.local_transformers import letter_tokenizer, save_clip_tokenizer


def ids(tokenizer: Any, context_length: int | None, folder: Path, texts: list[str]) -> tuple[dict[str, Any], Any]:
    """The record of a tokenizer, and the ids that the runtime gives of texts."""
    record = tokenizer_record(tokenizer, context_length, folder)
    return record, TextTokenizer(folder, json.loads(json.dumps(record)))(texts)


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_ids_of_open_clip_are_equal_on_odd_texts(clean: str, tmp_path: Path) -> None:
    tokenizer, texts = SimpleTokenizer(clean=clean, context_length=40), odd_texts(1000)
    record, actual = ids(tokenizer, 40, tmp_path, texts)
    assert np.array_equal(actual, tokenizer(texts).numpy()) and actual.dtype == np.int64
    assert record == {
        "file": "tokenizer.json", "kind": "clip", "context_length": 40, "pad_id": 0, "start_id": 49406,
        "end_id": 49407, "clean": clean, "zero_id": None,
    }  # fmt: skip
    assert (actual[:, -1] != 0).any() and (actual[:, -1] == 0).any(), "some texts are cut and some padded"


def test_ids_are_equal_without_ftfy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, texts = open_clip.get_tokenizer("ViT-B-32"), odd_texts(1000)
    tokenizer_record(tokenizer, 77, tmp_path)
    monkeypatch.setattr(cleaning, "repair", cleaning._repair_lightly)
    _, actual = ids(tokenizer, 77, tmp_path, texts)
    assert np.array_equal(actual, tokenizer(texts).numpy())


def test_every_letter_is_repaired_as_ftfy_repairs_it() -> None:
    codes = [code for code in range(0x3000) if not 0xA1 <= code < 0x100]  # a letter of Latin-1 alone may be mojibake
    texts = [f"a{chr(code)}b" for code in (*codes, *range(0xFB00, 0xFB07), *range(0xFF01, 0x10000))]
    wrong = [text for text in texts if cleaning._repair_lightly(text).split() != ftfy.fix_text(text).split()]
    assert not wrong


@pytest.mark.parametrize("truncate", [False, True])
def test_ids_of_openai_are_equal_and_cut(truncate: bool, tmp_path: Path) -> None:
    clip = pytest.importorskip("clip", reason="OpenAI's clip is not installed")
    texts = [*odd_texts(200), "word " * 200]
    tokenizer = partial(clip.tokenize, truncate=True) if truncate else clip.tokenize
    _, actual = ids(tokenizer, 77, tmp_path, texts)
    assert np.array_equal(actual, clip.tokenize(texts, truncate=True).numpy())


def test_ids_of_bytes_are_equal(tmp_path: Path) -> None:
    tokenizer, texts = bundled()[2], odd_texts(1000)
    record, actual = ids(tokenizer, None, tmp_path, texts)
    assert np.array_equal(actual, tokenizer(texts).numpy())
    assert record["context_length"] == 64 and record["kind"] == "bytes"


@pytest.mark.parametrize("family", ["clip", "letters"])
def test_ids_of_transformers_are_equal(family: str, tmp_path: Path) -> None:
    tokenizer = save_clip_tokenizer(tmp_path / "saved") if family == "clip" else letter_tokenizer()
    texts = odd_texts(1000)
    record, actual = ids(tokenizer, 24, tmp_path, texts)
    assert np.array_equal(actual, ids_of(tokenizer, texts, 24).numpy()) and actual.shape == (1000, 24)
    assert record["kind"] == "huggingface" and record["pad_id"] == tokenizer.pad_token_id

    class Processor:
        image_processor = None

    Processor.tokenizer = tokenizer  # type: ignore[attr-defined]
    assert tokenizer_record(Processor(), 24, tmp_path) == record


@pytest.mark.parametrize("clean", ["whitespace", "canonicalize"])
def test_open_clips_wrapper_of_transformers_is_read(clean: str, tmp_path: Path) -> None:
    letter_tokenizer(sep_token=".").save_pretrained(tmp_path / "saved")
    tokenizer = HFTokenizer(str(tmp_path / "saved"), context_length=30, clean=clean, strip_sep_token=True)
    texts = odd_texts(1000)
    record, actual = ids(tokenizer, 30, tmp_path, texts)
    assert np.array_equal(actual, tokenizer(texts).numpy())
    assert record["clean"] == clean and record["zero_id"] == tokenizer.tokenizer.sep_token_id


def test_texts_are_cleaned_as_the_names_say() -> None:
    text = "  A &lt;B&gt;_“c”\u00a0É\n"
    assert CLEANERS["none"](text) == text
    assert CLEANERS["whitespace"](text) == 'A <B>_"c" É'
    assert CLEANERS["lower"](text) == 'a <b>_"c" é'
    assert CLEANERS["canonicalize"](text) == "a b c é"
    assert CLEANERS["strip_lower"](text) == "a &lt;b&gt;_“c”\u00a0é"


class Reversed(ByteTokenizer):
    """A tokenizer with a familiar class that gives other ids."""

    def __call__(self, texts: Any, context_length: int | None = None) -> torch.Tensor:
        return super().__call__([text[::-1] for text in texts], context_length)


def words(texts: list[str]) -> torch.Tensor:
    return torch.zeros(len(texts), 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (words, "expected a tokenizer with a tokenizer.json, got function"),
        (Reversed(), "expected the ids of .*Reversed.* from its tokenizer.json, got others of"),
        (SimpleTokenizer(reduction_mask="random"), "got one with a reduction_mask"),
    ],
)
def test_a_tokenizer_without_such_a_file_is_refused(tokenizer: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        tokenizer_record(tokenizer, 16, tmp_path)
    assert "\n" not in str(error.value)


def test_the_runtime_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    record = tokenizer_record(ByteTokenizer(), None, tmp_path)
    with pytest.raises(ValueError, match=r"expected one of the cleanings none, .*, got 'shout'"):
        TextTokenizer(tmp_path, {**record, "clean": "shout"})
    with pytest.raises(TypeError, match="texts must be a list of texts, got 'a'"):
        TextTokenizer(tmp_path, record)("a")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"expected a tokenizer, got .*tokenizer\.json"):
        TextTokenizer(tmp_path, record)
