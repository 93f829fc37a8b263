"""Tokenizers of open_clip, OpenAI's clip, transformers and clipkernels as a tokenizer.json, proved on texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipkernels.adapters.tokenizers import ids_of
from clipkernels.arguments import describe
from clipkernels.artefacts import byte_tokenizer
from clipkernels.data.tokenizer import END, PAD, START, ByteTokenizer
from clipkernels.runtime.tokenization import TextTokenizer

FILE = "tokenizer.json"
PROBES = (
    "a photo of a cat.", "", "  Two\tDOGS,\nin the  snow! ", "it's they'll I'm we've you'd", "3,141 items: 50% off",
    "Café naïve Ångström e\u0301", "“curly” ‘quotes’ – and … dots", "&lt;b&gt; &amp;amp; &quot;x&quot; &eacute;",
    "日本の山", "中文 한국어", "🐶🔥 👩\u200d👩\u200d👧 🇩🇪", "ﬁne ＦＵＬＬ width", "Σίσυφος ΟΔΟΣ İstanbul",
    "snake_case under_scores", "x" * 300, "word " * 300,
)  # fmt: skip
"""Texts whose ids prove a tokenizer.json."""
CLEANINGS = {"_clean_lower": "lower", "_clean_whitespace": "whitespace", "_clean_canonicalize": "canonicalize"}
"""The ways of cleaning, by the names of open_clip's functions."""
WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""The pattern of CLIP's words; numbers are split into digits."""


def tokenizer_record(tokenizer: Any, context_length: int | None, folder: Path) -> dict[str, Any]:
    """The record of a tokenizer in export.json; its tokenizer.json is written to a folder.

    The ids of a few texts have been compared with the tokenizer's.

    Args:
        tokenizer: of open_clip or of OpenAI's clip, clipkernels' tokenizer of bytes, or a tokenizer or a processor of
            transformers, as in `ck.Classifier`.
        context_length: the largest number of tokens that the text tower takes, or None if it does not define it.
        folder: the folder that the file is written to.
    Returns:
        The record, as `clipkernels.runtime.tokenization` describes it.
    Raises:
        ValueError: a tokenizer of another kind, one without a tokenizer.json, or one that gives other ids.
        OSError: the file cannot be written.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer) if hasattr(tokenizer, "image_processor") else tokenizer
    if _is_openai(tokenizer):
        import clip

        tokenizer = partial(clip.tokenize, truncate=True)
        from clip.clip import _tokenizer as words

        record, content = _clip(words, "<|startoftext|>", "<|endoftext|>", "lower")
    elif isinstance(tokenizer, ByteTokenizer):
        content = byte_tokenizer.content()
        record = {"kind": "bytes", "pad_id": PAD, "start_id": START, "end_id": END, "clean": "strip_lower"}
    elif hasattr(tokenizer, "bpe_ranks"):
        if getattr(tokenizer, "reduction_fn", None) is not None:
            raise ValueError("expected a tokenizer that cuts texts at their end, got one with a reduction_mask")
        start, end = (tokenizer.decoder[index] for index in tokenizer.all_special_ids[:2])
        record, content = _clip(tokenizer, start, end, _cleaning(tokenizer))
    else:
        record, content = _transformers(tokenizer)
    ids = ids_of(tokenizer, list(PROBES), context_length)
    record = {"file": FILE, "context_length": ids.shape[1], "zero_id": None} | record
    (folder / FILE).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    _prove(folder, record, ids, tokenizer)
    return record


def _is_openai(tokenizer: Any) -> bool:
    """Return true for `clip.tokenize` and for partials of it."""
    function = getattr(tokenizer, "func", tokenizer)
    return getattr(function, "__module__", None) == "clip.clip" and getattr(function, "__name__", None) == "tokenize"


def _cleaning(tokenizer: Any) -> str:
    """The name of the way in which a tokenizer of open_clip cleans a text.

    Raises:
        ValueError: another function.
    """
    name = getattr(getattr(tokenizer, "clean_fn", None), "__name__", None)
    if name not in CLEANINGS:
        raise ValueError(f"expected a tokenizer with one of open_clip's clean functions, got {name}")
    return CLEANINGS[name]


def _clip(words: Any, start: str, end: str, clean: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record and the tokenizer.json of CLIP's byte pairs."""
    start_id, end_id = words.encoder[start], words.encoder[end]
    record = {"kind": "clip", "pad_id": 0, "start_id": start_id, "end_id": end_id, "clean": clean}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(start, start_id), _added(end, end_id)],
        # For readers that do not clean a text themselves; it leaves a cleaned text as it is.
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                *([] if clean == "whitespace" else [{"type": "Lowercase"}]),
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_mark(start), {"Sequence": {"id": "A", "type_id": 0}}, _mark(end)],
            "pair": [_mark(start), *({"Sequence": {"id": name, "type_id": 0}} for name in "AB"), _mark(end)],
            "special_tokens": {
                mark: {"id": mark, "ids": [words.encoder[mark]], "tokens": [mark]}
                for mark in (start, end)
                for mark, index in ((start, start_id), (end, end_id))
            },
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "vocab": dict(words.encoder),
            "merges": [" ".join(pair) for pair in sorted(words.bpe_ranks, key=words.bpe_ranks.get)],
        },
    }
    return record, content


def _added(mark: str, index: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": mark, **flags, "special": True}


def _mark(mark: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": mark, "type_id": 0}}


def _transformers(tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record and the tokenizer.json of a tokenizer of transformers, or of one that open_clip wraps.

    Raises:
        ValueError: another object, or a tokenizer that is written in Python and has no such file.
    """
    inner, clean, zero_id = tokenizer, "none", None
    if type(tokenizer).__module__.startswith("open_clip") and hasattr(tokenizer, "tokenizer"):
        inner = tokenizer.tokenizer
        clean = "canonicalize" if type(tokenizer).__name__ == "SigLipTokenizer" else _cleaning(tokenizer)
        if getattr(tokenizer, "tokenizer_mode", ""):
            raise ValueError(f"expected a tokenizer without a mode, got open_clip's {tokenizer.tokenizer_mode!r}")
        zero_id = inner.sep_token_id if getattr(tokenizer, "strip_sep_token", False) else None
    backend: Any = getattr(inner, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        raise ValueError(
            f"expected a tokenizer with a tokenizer.json, got {describe(tokenizer)}, which has none: pass a fast one "
            "of transformers (AutoTokenizer)"
        )
    content = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    if inner.pad_token_id is None:
        raise ValueError(f"expected a tokenizer that pads, got {describe(tokenizer)} without a pad_token")
    record = {
        "kind": "huggingface", "pad_id": inner.pad_token_id, "start_id": inner.bos_token_id,
        "end_id": inner.eos_token_id, "clean": clean, "zero_id": zero_id,
    }  # fmt: skip
    return record, content


def _prove(folder: Path, record: Mapping[str, Any], ids: Tensor, tokenizer: Any) -> None:
    """Raise ValueError unless the tokenizer of a folder gives these ids of the probes."""
    actual = torch.from_numpy(TextTokenizer(folder, record)(PROBES))
    wrong = (ids.cpu() != actual).any(1).nonzero().flatten().tolist()
    if wrong:
        text, expected, other = PROBES[wrong[0]], ids[wrong[0]].tolist(), actual[wrong[0]].tolist()
        raise ValueError(
            f"expected the ids of {describe(tokenizer)} from its tokenizer.json, got others of {text!r:.60}: "
            f"{other!r:.100} instead of {expected!r:.100}"
        )
