"""Cleaning of texts before they are split into tokens, as open_clip cleans them.

ftfy repairs a text if it is installed. Otherwise the standard library does what most texts need: quotes, ligatures,
width of letters, control characters and composed accents. It does not repair text that was decoded wrongly (mojibake).
"""

from __future__ import annotations

import html
import re
import string
import unicodedata
from collections.abc import Callable
from contextlib import suppress

ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
TERMINAL_ESCAPE = re.compile(r"\x1b\[[\d;]*[a-zA-Z]")
LIGATURES = [0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB05), 0xFB06]
WIDTHS = [0x3000, *range(0xFF01, 0xFFF0)]
CONTROLS = [*range(9), 0xB, *range(0xE, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
REPLACEMENTS: dict[int, str] = {code: unicodedata.normalize("NFKC", chr(code)) for code in (*LIGATURES, *WIDTHS)}
REPLACEMENTS |= dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
REPLACEMENTS |= dict.fromkeys(CONTROLS, "") | {0xFB05: "ſt"}
for _code in range(0x80, 0xA0):
    with suppress(UnicodeDecodeError):  # five of them mean nothing in Windows-1252 either
        REPLACEMENTS[_code] = bytes([_code]).decode("cp1252")
PUNCTUATION = dict.fromkeys(map(ord, string.punctuation), "") | {ord("_"): " "}


def repair(text: str) -> str:
    """A text with straight quotes, composed accents, and letters in place of their ligatures, widths and entities."""
    try:
        from ftfy import fix_text
    except ImportError:
        return _repair_lightly(text)
    repaired: str = fix_text(text)
    return repaired


def _repair_lightly(text: str) -> str:
    """A text as ftfy repairs it, but without the repair of wrong decodings."""
    lines, entities = [], True
    for line in text.split("\n"):
        entities = entities and "<" not in line  # as ftfy, which reads no entities from the first tag on
        lines.append(_repair_line(line, entities))
    return "\n".join(lines)


def _repair_line(text: str, entities: bool) -> str:
    before = None
    while text != before:
        before = text
        if entities:
            text = ENTITY.sub(lambda match: html.unescape(match[0]), text)
        text = TERMINAL_ESCAPE.sub("", text).translate(REPLACEMENTS)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = unicodedata.normalize("NFC", text)
    return text


def _unescaped(text: str) -> str:
    return html.unescape(html.unescape(repair(text)))


CLEANERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "strip_lower": lambda text: text.strip().lower(),
    "whitespace": lambda text: " ".join(_unescaped(text).split()),
    "lower": lambda text: " ".join(_unescaped(text).split()).lower(),
    "canonicalize": lambda text: " ".join(_unescaped(text).translate(PUNCTUATION).lower().split()),
}
"""Functions of a text by the names that the record of a tokenizer gives them."""
REPAIRING = ("whitespace", "lower", "canonicalize")
"""The cleaners that use ftfy if it is installed."""
