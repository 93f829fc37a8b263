"""Altered state files: signed again, so that their content alone is wrong, or altered byte by byte."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CODES = {torch.float32: "F32", torch.float16: "F16", torch.float64: "F64", torch.bfloat16: "BF16", torch.bool: "BOOL"}
CODES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.uint8: "U8"}
DEEP: Any = json.loads("[" * 900 + "]" * 900)


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header, its digests left out, and the tensors of a state file; a manifest has no tensors."""
    tensors: dict[str, Tensor] = {}
    if file.suffix == ".json":
        header = json.loads(file.read_text())
    else:
        with safe_open(file, "pt") as stored:
            header = json.loads(stored.metadata()["clipkernels"])
            tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118
    return {name: value for name, value in header.items() if name not in ("sha256", "tensors")}, tensors


def write(file: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor], infinity: str = "Infinity") -> None:
    """Write a state file with right digests, whatever its content; infinities are spelt `infinity`."""
    content = dict(header)
    if tensors:
        content["tensors"] = {name: digest(name, tensor) for name, tensor in tensors.items()}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    text = json.dumps({**content, "sha256": sha256(canonical.encode()).hexdigest()}).replace("Infinity", infinity)
    if file.suffix == ".json":
        file.write_text(text)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"clipkernels": text})


def digest(name: str, tensor: Tensor) -> str:
    values = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return sha256(json.dumps([name, CODES[tensor.dtype], list(tensor.shape)]).encode() + values).hexdigest()


class Kind(NamedTuple):
    """A kind of state file.

    file: a good one.
    load: reads it, and everything in it.
    absent: beginnings of paths in the header, joined by dots, that may be absent.
    free: beginnings of paths that may hold anything.
    unbounded: floating-point tensors without a range.
    separate: tensors whose number of rows nothing else has.
    """

    file: Path
    load: Callable[[], object]
    absent: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    unbounded: tuple[str, ...] = ()
    separate: tuple[str, ...] = ()


def mutants(kind: Kind, seed: int, count: int = 200) -> Iterator[str]:
    """Replace the file of a kind by `count` altered ones, one after another; yields descriptions."""
    draw, good = random.Random(seed), kind.file.read_bytes()
    contents = list(_contents(kind))
    draw.shuffle(contents)
    for number in range(count):
        if number % 2 and contents:
            name, change = contents.pop()
            header, tensors = read(kind.file)
            infinity = change(header, tensors)
            write(kind.file, header, tensors, infinity or "Infinity")
        else:
            name, altered = _bytes(good, draw)
            kind.file.write_bytes(altered)
        yield name
        kind.file.write_bytes(good)


def _bytes(good: bytes, draw: random.Random) -> tuple[str, bytes]:
    """A file with one bit flipped, cut off, extended or partly zeroed."""
    place = draw.randrange(len(good) if draw.random() < 0.5 else min(len(good), 2000))
    form = draw.randrange(10)
    if form == 0:
        place = min(place, len(good.rstrip()) - 1)  # JSON without the newline at its end is whole
        return f"cut at {place}", good[:place]
    if form == 1:
        return f"{place} bytes more", good + bytes(place + 1)
    if form == 2 and any(good[place : place + 16]):
        return f"zeros at {place}", good[:place] + bytes(len(good[place : place + 16])) + good[place + 16 :]
    bit = 1 << draw.randrange(8)
    return f"bit {bit} at {place} flipped", good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :]


def _contents(kind: Kind) -> Iterator[tuple[str, Callable[[Any, Any], str | None]]]:
    """Named changes of header and tensors that make them wrong; a change may return the spelling of infinity."""
    header, tensors = read(kind.file)
    for path, value in _leaves(header):
        dotted = ".".join(part for part in path if isinstance(part, str))
        if dotted.startswith(kind.free):
            continue
        for wrong in (*_wrong(value), DEEP):
            yield f"{path}: {str(wrong)[:20]}", lambda h, t, path=path, wrong=wrong: _set(h, path, wrong)
        if isinstance(value, float | int):
            yield f"{path}: 1e400", lambda h, t, path=path: _set(h, path, float("inf")) or "1e400"
        if isinstance(path[-1], str) and not dotted.startswith(kind.absent):
            yield f"{path}: absent", lambda h, t, path=path: _set(h, path, _set)
    yield "an unknown field", lambda h, t: h.update(unknown=1)
    for name, tensor in tensors.items():
        yield f"no {name}", lambda h, t, name=name: t.__delitem__(name)
        yield f"{name} in int32", lambda h, t, name=name: t.update({name: t[name].int()})
        yield f"{name} flat", lambda h, t, name=name: t.update({name: t[name].flatten()[:, None, None, None, None]})
        if tensor.ndim > 1 and name not in kind.separate:
            yield f"{name} longer", lambda h, t, name=name: t.update({name: torch.cat([t[name], t[name][:1]])})
            yield f"{name} empty", lambda h, t, name=name: t.update({name: t[name][:0]})
        if tensor.is_floating_point():
            values = ["nan", "inf", "-inf", *([] if name in kind.unbounded else ["1e38", "-1e38"])]
            for value in values:
                yield f"{value} in {name}", lambda h, t, name=name, value=value: _put(t[name], float(value))
        elif tensor.dtype in (torch.int64, torch.int16):
            for number in (-5, 30000):
                yield f"{number} in {name}", lambda h, t, name=name, number=number: _put(t[name], number)
    yield "an unknown tensor", lambda h, t: t.update(unknown=torch.zeros(1))


def _put(tensor: Tensor, value: float) -> None:
    tensor.view(-1)[len(tensor.view(-1)) // 2] = value


def _wrong(value: object) -> list[object]:
    """Values that a field with a right value never has."""
    if isinstance(value, bool):
        return ["x", 2, None, []]
    if isinstance(value, int):
        return ["x", 2.5, -1, 1 << 62, None, True, [1]]
    if isinstance(value, float):
        return ["x", None, True, [0.5], float("nan")]
    if isinstance(value, str):
        return [5, True, {}, [value]]
    return ["x", 5, True, None]


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every value of a header with its path, but of each list only the first and the last item."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and value:
        items = [(place, value[place]) for place in sorted({0, len(value) - 1})]
    for key, item in items:
        if item is not None:
            yield (*path, key), item
            yield from _leaves(item, (*path, key))


def _set(header: Any, path: tuple[str | int, ...], value: object) -> None:
    """Set a value of a header; the function itself stands for no value."""
    for part in path[:-1]:
        header = header[part]
    if value is _set:
        del header[path[-1]]
    else:
        header[path[-1]] = value
