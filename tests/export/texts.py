"""Texts that tokenizers may read differently: emoji, entities, accents, scripts, quotes and white space."""

from __future__ import annotations

import random
from collections.abc import Sequence

WORDS = (
    "a", "photo", "of", "the", "cat's", "DOG", "don't", "WON'T", "it's", "I'M", "they'll", "3rd", "12,345", "50%",
    "naïve", "façade", "Zürich", "São", "e\u0301tude", "o\u0308l", "ǅungla", "ﬁne", "ﬂag", "ＦＵＬＬ", "ｶﾀｶﾅ",
    "“curly”", "‘single’", "don’t", "—", "–", "…", "&amp;", "&lt;b&gt;", "&eacute;", "&#233;", "&rdquo;", "&amp;amp;",
    "<b>bold</b>", "日本", "山", "中文字", "한국어", "русский", "Ελληνικά", "Σίσυφος", "العربية", "हिन्दी", "ไทย",
    "🐶", "🔥🔥", "👩\u200d👩\u200d👧", "🇩🇪", "❤️", "👍🏽", "™", "©", "€9", "$5.00", "C++", "@user", "#tag", "a_b",
    "http://x.y/z?a=1&b=2", "¿qué?", "!!", "?!", "...", "--", "~", "`", "^", "|", "\\", "/", "{}", "[]", "İstanbul",
    "½", "x²", "ß", "Ⅳ", "snake_case",
)  # fmt: skip
GAPS = (" ", " ", " ", "", "  ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "\u2028", "\u200b", "\ufeff", "\x07")


def odd_texts(count: int, words: Sequence[str] = WORDS) -> list[str]:
    """Texts of up to 16 words, always the same ones."""
    rng = random.Random(0)
    return ["".join(rng.choice(words) + rng.choice(GAPS) for _ in range(rng.randrange(17))) for _ in range(count)]
