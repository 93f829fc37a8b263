"""Parts of messages, each in one line: reasons, lists, quantities, names of files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

MAX_LISTED = 10
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def first_line(error: BaseException) -> str:
    """An exception's message in one line of at most 200 characters."""
    return one_line(str(error))[:200] or type(error).__name__


def reason_of(error: Exception) -> str:
    """The reason why a file was not read or written, in one line without its name."""
    if not isinstance(error, OSError):
        return first_line(error)
    # The text of an OSError with a file name but no number is "[Errno None] None".
    return error.strerror or one_line(" ".join(map(str, error.args)))[:200] or type(error).__name__


def skip_message(path: str, reason: str) -> str:
    """The line that reports a file that is left out."""
    return f"skipped {printable(path)}: {reason}"


def one_line(text: str) -> str:
    """A text with its whitespace as single spaces, and without characters that a terminal would obey."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """A text with its control characters, such as newlines, escaped."""
    return UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)


def quantity(count: int, noun: str) -> str:
    """A count with its noun, whose plural ends in s or, after s or tch, in es: "1 class", "2 classes"."""
    plural = f"{noun}es" if noun.endswith(("s", "tch")) else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"


def list_names(names: Sequence[str] | set[str]) -> str:
    """The first ten names, quoted, and the number of the others."""
    return list_items([repr(name) for name in (sorted(names) if isinstance(names, set) else names)])


def list_items(items: Iterable[object]) -> str:
    """The first ten items, separated by commas, and the number of the others."""
    texts = [text if len(text) <= 120 else f"{text[:119]}…" for text in map(str, items)]
    more = f" and {len(texts) - MAX_LISTED} more" if len(texts) > MAX_LISTED else ""
    return ", ".join(texts[:MAX_LISTED]) + more


def join_sizes(sizes: Iterable[object]) -> str:
    """Sizes separated by commas: "2,3"."""
    return ",".join(str(size) for size in sizes)
