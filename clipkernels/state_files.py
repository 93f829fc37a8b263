"""State files: safetensors and JSON of a known format, signed when they are written and checked when they are read.

    digest of a tensor  SHA-256 of its name, dtype, shape and bytes

Reading checks, in this order: the size of the header, its format, its fields, its digest, and the names, dtypes,
shapes, digests and values of the tensors. No claim of a file is acted upon before it is checked. A file whose sizes are
refused has taken neither memory nor time; a digest is known only when its tensor is read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from clipkernels.files import atomic_write, naming, open_named
from clipkernels.formats import REMEDY, Format, TensorSpec, decode_header, encode_header, to_struct
from clipkernels.messages import list_items, one_line

METADATA_KEY = "clipkernels"
"""The only key of a file's safetensors metadata; its value is the header as JSON."""
MAX_HEADER_BYTES = 1 << 20
CODES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int16: "I16", torch.uint8: "U8", torch.bool: "BOOL"},
}


def write_state(
    path: str | os.PathLike[str], form: Format, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write tensors and a header to a safetensors file, atomically; equal content gives equal files.

    Raises:
        ValueError: a header or tensors that do not fit the format, such as weights that are not finite.
        OSError: the file cannot be written.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        struct = to_struct(form, header)
        shapes = {name: (CODES.get(tensor.dtype), tuple(tensor.shape)) for name, tensor in stored.items()}
        specs = _check_shapes(form, struct, shapes)
        _check_values(specs, stored)
        form.check(struct, stored)
        digests = {name: tensor_digest(name, tensor) for name, tensor in stored.items()}
        text = encode_header(form, struct, digests, limit=MAX_HEADER_BYTES // 2)  # safetensors escapes the quotes
    except ValueError as error:
        raise ValueError(f"expected {form.title} to write to {path}, got one with {error}") from error
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        # One metadata entry, because safetensors writes several in any order and equal content must give equal files.
        file.write(save(stored, {METADATA_KEY: text}))
        file.flush()
        os.fsync(file.fileno())


def read_state(
    path: str | os.PathLike[str],
    form: Format,
    names: Collection[str] | None = None,
    *,
    copy: bool = True,
    trusted: bool = False,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header of a state file, and its tensors on the CPU.

    Args:
        path: the file.
        form: the format that the file must have.
        names: read these tensors only, those of them that the file has; None reads all.
        copy: copy the tensors to memory; otherwise they are memory-mapped and read on access.
        trusted: skip the digests and values of the tensors, for a file that this process has checked before.
    Raises:
        ValueError: a file of another kind or an older format, or a header or tensors that are not those written. The
            message names the file and the first fault.
        OSError: the file cannot be read.
    """
    _check_header_size(path)
    try:
        with naming(path), safe_open(path, "pt") as file:
            struct, digests = decode_header(form, _metadata(file))
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            specs = _check_shapes(form, struct, shapes)
            if digests.keys() != shapes.keys():
                raise ValueError(f"digests of other tensors: {list_items(digests.keys() ^ shapes.keys())}")
            tensors = {name: file.get_tensor(name) for name in shapes if names is None or name in names}
            if not trusted:
                for name, tensor in tensors.items():
                    if tensor_digest(name, tensor) != digests[name]:
                        raise ValueError(f"another {name} than was written (its SHA-256 differs): {REMEDY}")
                _check_values(specs, tensors)
                if names is None:
                    form.check(struct, tensors)
    except SafetensorError as error:
        raise ValueError(f"expected a safetensors file, got {path}: {one_line(str(error)):.200}") from error
    except ValueError as error:
        raise ValueError(f"expected {form.title} ({form.name}), got {path} with {error}") from error
    # A copy is aligned, which a place in the file may not be: products of aligned rows are faster.
    copied = {name: tensor.clone() for name, tensor in tensors.items()} if copy else tensors
    return msgspec.to_builtins(struct), copied


def write_json(path: str | os.PathLike[str], form: Format, header: msgspec.Struct, limit: int) -> None:
    """Write a header of a format without tensors as a JSON file, atomically.

    Raises:
        ValueError: numbers that are not finite, or a header of more than `limit` characters.
        OSError: the file cannot be written.
    """
    text = encode_header(form, header, {}, limit=limit, indent=1)
    with naming(path), atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text + "\n")


def read_json(path: str | os.PathLike[str], form: Format, limit: int) -> Any:
    """The header that `write_json` wrote, as an instance of its schema.

    Raises:
        ValueError: no regular file, one of more than `limit` bytes, another format, or not as it was written.
        OSError: the file cannot be read.
    """
    with open_named(path, form.title, limit) as stream:
        content = stream.read()
    try:
        header, digests = decode_header(form, content.decode())
        if digests:
            raise ValueError("digests of tensors, of which it has none")
    except ValueError as error:
        raise ValueError(f"expected {form.title} ({form.name}), got {path} with {error}") from error
    return header


def tensor_digest(name: str, tensor: Tensor) -> str:
    """The SHA-256 of a tensor's name, dtype, shape and bytes."""
    digest = sha256(json.dumps([name, CODES[tensor.dtype], list(tensor.shape)]).encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_table(digests: Sequence[bytes]) -> Tensor:
    """SHA-256 digests as rows of a tensor (n,32) uint8."""
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, 32)


def _check_header_size(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless the path is a regular file with a header of a bounded size."""
    with open_named(path, "a safetensors file") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER_BYTES:
        raise ValueError(
            f"expected a safetensors file, got {path}, whose header would have {size} bytes, more than "
            f"{MAX_HEADER_BYTES}"
        )


def _metadata(file: Any) -> str:
    """The JSON header of an open safetensors file; raises ValueError for a file that clipkernels did not write."""
    metadata = file.metadata() or {}
    if "format" in metadata and METADATA_KEY not in metadata:  # as some older formats have it
        return json.dumps({"format": metadata["format"]})
    if set(metadata) != {METADATA_KEY}:
        raise ValueError(f"format None: its metadata is {list_items(metadata) or 'empty'}, not {METADATA_KEY}")
    text: str = metadata[METADATA_KEY]
    return text


def _check_shapes(
    form: Format, header: msgspec.Struct, shapes: Mapping[str, tuple[str | None, tuple[int, ...]]]
) -> Mapping[str, TensorSpec]:
    """The specs of a format, if tensors with these dtypes and shapes fit them; otherwise raise ValueError."""
    specs = form.tensors(header)
    missing = [name for name, spec in specs.items() if name not in shapes and not spec.optional]
    unknown = sorted(shapes.keys() - specs.keys())
    if missing or unknown:
        raise ValueError(f"no {list_items(missing)}" if missing else f"the unknown tensors {list_items(unknown)}")
    sizes: dict[str, int] = {}
    for name, (dtype, shape) in shapes.items():
        spec = specs[name]
        if dtype not in [CODES[allowed] for allowed in spec.dtypes]:
            allowed = " or ".join(CODES[allowed] for allowed in spec.dtypes)
            raise ValueError(f"{name} in {dtype} instead of {allowed}")
        words = spec.shape.split()
        expected = [int(word) if word.isdecimal() else getattr(header, word, sizes.get(word)) for word in words]
        fits = len(shape) == len(words)
        for word, size, known in zip(words, shape, expected, strict=False):
            wanted = sizes.setdefault(word, size) if known is None else known  # a name may occur twice in one shape
            fits = fits and size == wanted and (size > 0 or word.endswith("*"))
        if not fits:
            shown = [word if known is None else known for word, known in zip(words, expected, strict=True)]
            raise ValueError(f"{name} of shape ({list_items(shape)}) instead of ({list_items(shown)})")
    return specs


def _check_values(specs: Mapping[str, TensorSpec], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless all floats are finite and all values within the ranges of their specs."""
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        spec = specs[name]
        numbers = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
        least, most = (x.item() for x in numbers.aminmax())
        low, high = (0, 1) if tensor.dtype == torch.bool else (spec.low, spec.high)
        if not (math.isfinite(least) and math.isfinite(most)):
            raise ValueError(f"infinite or NaN values in {name}")
        if least < low or most > high:
            wrong = least if least < low else most
            raise ValueError(f"the value {wrong:g} in {name} instead of numbers from {low:g} to {high:g}")
