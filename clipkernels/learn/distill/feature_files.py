"""Files of a teacher's features: several images or several texts, each identified by a hash of its content.

image (n,E)     optionally with regions (n,P,E), and regions_mask (n,P) if a method removed patches; or
text (n,E)      optionally with words (n,t,E) up to the last word of the longest text, and words_mask (n,T)
sha256 (n,32)   uint8, of each image or text
header          the kind, the teacher and the dtype
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor
from torch.nn.functional import pad

from clipkernels.fingerprint import same_probe, same_tower, short_fingerprint
from clipkernels.formats import Fingerprint, Format, Line, TensorSpec
from clipkernels.learn.distill.features import TeacherFeatures
from clipkernels.messages import quantity
from clipkernels.state_files import digest_table, write_state

Kind = Literal["image", "text"]
About = Mapping[str, Any]
"""Everything besides the inputs that determines the features: `Teacher.about` and the dtype."""

FIELDS: dict[Kind, tuple[str, ...]] = {
    "image": ("image", "regions", "regions_mask"),
    "text": ("text", "words", "words_mask"),
}


class TeacherAbout(msgspec.Struct, forbid_unknown_fields=True):
    """Everything besides the inputs that determines the features, as `Teacher.about` names it, and the dtype."""

    image_tower: Fingerprint = msgspec.field(name="image tower")
    text_tower: Fingerprint = msgspec.field(name="text tower")
    probe: Annotated[
        list[Annotated[list[Annotated[float, msgspec.Meta(ge=-1.001, le=1.001)]], msgspec.Meta(max_length=64)]],
        msgspec.Meta(max_length=64),
    ] = msgspec.field(name="reading of a few texts")
    method: Line
    tokenizer: Line
    dtype: Literal["float16", "bfloat16", "float32"]


class TeacherHeader(msgspec.Struct, forbid_unknown_fields=True):
    """The header of a file of a teacher's features; `detailed` says that it has those of patches or words."""

    kind: Kind
    detailed: bool
    teacher: TeacherAbout


def _tensors(header: TeacherHeader) -> dict[str, TensorSpec]:
    dtype = (getattr(torch, header.teacher.dtype),)
    specs = {
        "image": TensorSpec(dtype, "items width"),
        "regions": TensorSpec(dtype, "items patches width"),
        "regions_mask": TensorSpec((torch.bool,), "items patches", optional=True),
        "text": TensorSpec(dtype, "items width"),
        "words": TensorSpec(dtype, "items longest* width"),
        "words_mask": TensorSpec((torch.bool,), "items tokens"),
    }
    fields = FIELDS[header.kind] if header.detailed else FIELDS[header.kind][:1]
    return {name: specs[name] for name in fields} | {"sha256": TensorSpec((torch.uint8,), "items 32")}


def _check(header: TeacherHeader, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the mask of words covers them."""
    if "words" in tensors and tensors["words"].shape[1] > tensors["words_mask"].shape[1]:
        raise ValueError(
            f"{quantity(tensors['words'].shape[1], 'word')} and a mask of {tensors['words_mask'].shape[1]}"
        )


FORMAT = Format("clipkernels.teacher.3", "features of a teacher", TeacherHeader, _tensors, _check)


def content_hash(item: Tensor | str) -> bytes:
    """The SHA-256 of an image's values, shape and dtype, or of a text's UTF-8."""
    if isinstance(item, str):
        return sha256(item.encode()).digest()
    values = item.detach().cpu().contiguous()
    digest = sha256(str((tuple(values.shape), values.dtype)).encode())
    digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def to_tensors(kind: Kind, features: TeacherFeatures, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors to store for features of images or texts, on the CPU; `words` is zero after a text's last word."""
    if features.words is not None and features.words_mask is not None:
        position = torch.arange(features.words.shape[1], device=features.words.device)
        ends = torch.where(features.words_mask, position + 1, 0).amax(1)
        longest = int(ends.max())
        beyond = position[:longest] >= ends[:, None]
        features = features._replace(words=features.words[:, :longest].masked_fill(beyond[..., None], 0))
    tensors = {name: getattr(features, name) for name in FIELDS[kind] if getattr(features, name) is not None}
    return {name: x.to("cpu", x.dtype if x.dtype == torch.bool else dtype) for name, x in tensors.items()}


def finite_rows(tensors: Mapping[str, Tensor]) -> Tensor:
    """The images or texts with finite features, (n,) bool."""
    return torch.stack([x.flatten(1).isfinite().all(1) for x in tensors.values()]).all(0)


def write_features(
    file: Path, kind: Kind, digests: Sequence[bytes], tensors: Mapping[str, Tensor], about: About
) -> None:
    """Write a file of features atomically; raise OSError if it cannot be written."""
    header = {"kind": kind, "detailed": FIELDS[kind][1] in tensors, "teacher": about}
    write_state(file, FORMAT, header, {**tensors, "sha256": digest_table(digests)})


def check_teacher(file: Path, actual: About, about: About) -> None:
    """Raise ValueError unless the teacher that a file names is this one."""
    differ = differences(actual, about)
    if differ:
        raise ValueError(
            f"expected features of this teacher, got {file} by one with another {differ}: choose another folder"
        )


def differences(actual: About, expected: About) -> str:
    """The differences between two teachers as text; "" if there are none."""
    differ = []
    for name, reference in expected.items():
        value = actual.get(name)
        if isinstance(reference, dict):
            if not same_tower(value or {}, reference):
                differ.append(f"{name} ({short_fingerprint(value or {})} instead of {short_fingerprint(reference)})")
        elif isinstance(reference, list):
            if not same_probe(value or [], reference):
                differ.append(f"{name} (other attention heads, another mask or another pooled row)")
        elif value != reference:
            differ.append(f"{name} ({value} instead of {reference})")
    return ", ".join(differ)


def gather_features(
    kind: Kind, detailed: bool, count: int, parts: Iterable[tuple[Mapping[str, Tensor], list[int], list[int]]]
) -> TeacherFeatures:
    """Features of `count` images or texts, gathered from files.

    Rows of different lengths are padded with zeros; `words` is zero after a text's last word.

    Args:
        kind: images or texts.
        detailed: gather all fields, not only the embedding.
        count: number of images or texts.
        parts: per file, its tensors, the rows to take from them, and the positions of these rows in the result.
    """
    features: dict[str, Tensor] = {}
    for tensors, rows, positions in parts:
        for name in FIELDS[kind] if detailed else FIELDS[kind][:1]:
            if name not in tensors:
                continue
            part = tensors[name]
            length = tensors["words_mask" if name == "words" else name].shape[1]
            result = features.get(name)
            if result is None:
                result = part.new_zeros(count, length, *part.shape[2:])
            elif result.shape[1] < length:
                result = pad(result, (0, 0) * (part.ndim - 2) + (0, length - result.shape[1]))
            result[positions, : part.shape[1]] = part[rows]
            features[name] = result
    return TeacherFeatures(**features)
