"""Formats of state files: the schema of their headers and tensors, and headers as signed JSON.

    sha256 of a header  SHA-256 of its canonical JSON, the digests of the tensors included

One digest therefore stands for a whole file, and a reader of a part of it hashes that part alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

MAX_HEADER_ITEMS = 1 << 21
"""Limit of the values in a header, because small ones take 30 times their text in memory."""
# Types of header fields. JSON has no infinities and no NaN, so a float is finite.
Size = Annotated[int, Meta(ge=1, le=1 << 20)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]
Line = Annotated[str, Meta(max_length=1 << 16)]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Precision = Annotated[str, Meta(pattern=r"^(float32|float16|bfloat16)\Z")]
Fingerprint = Annotated[dict[Precision, Digest], Meta(min_length=1)]
"""Of a tower, by precision, as `clipkernels.fingerprint` gives it."""
REMEDY = "delete it, then make it again"
"""Advice for a file that is refused; who makes it anew may read the old one first."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class TensorSpec(NamedTuple):
    """A tensor of a format.

    dtypes: the dtypes that it may have. Floats must be finite.
    shape: sizes separated by spaces: ints, fields of the header, and names that mean the same size in all tensors. A
        size must be at least one, unless its name ends in *.
    low, high: range of the values, both included.
    optional: the tensor may be absent.
    """

    dtypes: tuple[torch.dtype, ...]
    shape: str
    low: float = -math.inf
    high: float = math.inf
    optional: bool = False


class Format(NamedTuple):
    """A kind of state file.

    name: its name, which ends in the format number.
    title: its name in messages, such as "a reservoir".
    header: the schema of the header, a msgspec.Struct that forbids unknown fields.
    tensors: a function of the header, an instance of that schema, to the tensors by name.
    check: further checks of header and tensors; raises ValueError. It runs only if all tensors are read.
    """

    name: str
    title: str
    header: type[msgspec.Struct]
    tensors: Callable[[Any], Mapping[str, TensorSpec]]
    check: Callable[[Any, Mapping[str, Tensor]], None] = lambda header, tensors: None


def to_struct(form: Format, header: Mapping[str, Any]) -> msgspec.Struct:
    """A header as an instance of its schema; raises ValueError, which names the first wrong field."""
    try:
        struct: msgspec.Struct = msgspec.convert(dict(header), form.header)
        return struct
    except msgspec.MsgspecError as error:
        raise ValueError(f"a wrong header: {error}") from error


def encode_header(
    form: Format, header: msgspec.Struct, digests: Mapping[str, str], *, limit: int, indent: int | None = None
) -> str:
    """The JSON of a header: its format, its fields, the digests of the tensors, and the digest of all of these.

    Raises:
        ValueError: numbers that are not finite, or JSON of more than `limit` characters.
    """
    content = _content(form, header, digests)
    text = json.dumps({**content, "sha256": _digest_of(content)}, allow_nan=False, indent=indent)
    if len(text) > limit:
        raise ValueError(f"a header of {len(text)} characters, more than {limit}")
    return text


def decode_header(form: Format, text: str) -> tuple[msgspec.Struct, dict[str, str]]:
    """The header that `encode_header` wrote as JSON, and the digests of the tensors.

    Raises:
        ValueError: another format, other fields than the schema's, or another digest.
    """
    content = parse_object(text)
    actual = content.pop("format", None)
    if actual != form.name:
        raise ValueError(f"format {actual!r:.60}{_advice(form, actual)}")
    written = content.pop("sha256", None)
    try:
        digests: dict[str, str] = msgspec.convert(content.pop("tensors", {}), dict[str, Digest])
    except msgspec.MsgspecError as error:
        raise ValueError(f"a wrong header: {error} in `tensors`") from error
    struct = to_struct(form, content)
    # Of the fields as the schema converts them, because 1 and 1.0 are one number.
    if written != _digest_of(_content(form, struct, digests)):
        raise ValueError(f"another header than was written (its SHA-256 differs): {REMEDY}")
    return struct, digests


def _content(form: Format, header: msgspec.Struct, digests: Mapping[str, str]) -> dict[str, Any]:
    """A header's JSON as a dict, without its own digest."""
    tensors = {"tensors": dict(sorted(digests.items()))} if digests else {}
    return {"format": form.name, **msgspec.to_builtins(header), **tensors}


def _digest_of(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(canonical.encode()).hexdigest()


def parse_object(text: str) -> dict[str, Any]:
    """JSON text as a dict, of a bounded number of values and a bounded depth.

    The standard library reads it, because file names that are no UTF-8 are lone surrogates, which msgspec refuses.

    Raises:
        ValueError: other text.
    """
    if sum(map(text.count, ",[{")) > MAX_HEADER_ITEMS:
        raise ValueError(f"JSON of more than {MAX_HEADER_ITEMS} values")

    def refuse(number: str) -> float:
        raise ValueError(f"the number {number:.20}")

    def finite(number: str) -> float:
        return float(number) if math.isfinite(float(number)) else refuse(number)

    try:
        content = json.loads(text, parse_constant=refuse, parse_float=finite)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"text that is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"a JSON {type(content).__name__} instead of an object")
    return content


def _advice(form: Format, actual: object) -> str:
    """The end of a message about another format than `form`."""
    stem, _, number = form.name.rpartition(".")
    other_stem, _, other = actual.rpartition(".") if isinstance(actual, str) else ("", "", "")
    if stem != other_stem or not other.isdecimal():
        return ""
    if int(other[:9]) < int(number):
        return f", which an older clipkernels wrote: {REMEDY}"
    return ", which a newer clipkernels wrote: update this one"
