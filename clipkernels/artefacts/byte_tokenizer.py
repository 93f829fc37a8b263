"""clipkernels' tokenizer of bytes in the files of `tokenizers`, so that open_clip and transformers can load it.

The ids are those of `ByteTokenizer`. The cleaning of a text is the reader's: open_clip also joins white space.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clipkernels.data.tokenizer import END, PAD, START

MARKS = {"<pad>": PAD, "<start>": START, "<end>": END}
FILES = ("tokenizer.json", "tokenizer_config.json")


def write(folder: Path, context_length: int) -> None:
    """Write the tokenizer's files to a folder."""
    (folder / FILES[0]).write_text(json.dumps(content(), ensure_ascii=False), encoding="utf-8")
    names = dict(zip(("pad_token", "bos_token", "eos_token"), MARKS, strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length, **names}
    (folder / FILES[1]).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def content() -> dict[str, Any]:
    """The content of tokenizer.json."""
    vocabulary = {letter: 1 + byte for byte, letter in enumerate(byte_letters())}
    added = [
        {"id": index, "content": mark, "special": True, **dict.fromkeys(("single_word", "lstrip", "rstrip"), False)}
        | {"normalized": False}
        for mark, index in MARKS.items()
    ]
    special = {mark: {"id": mark, "ids": [index], "tokens": [mark]} for mark, index in MARKS.items()}
    text: list[dict[str, Any]] = [{"SpecialToken": {"id": "<start>", "type_id": 0}}]
    text += [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<end>", "type_id": 0}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Strip", "strip_left": True, "strip_right": True}, {"type": "Lowercase"}],
        },
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": text,
            "pair": [*text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": special,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "vocab": {**MARKS, **vocabulary}, "merges": [], "unk_token": None},
    }


def byte_letters() -> list[str]:
    """The letters that `tokenizers` writes the bytes 0 to 255 as: printable ones as themselves, others from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
