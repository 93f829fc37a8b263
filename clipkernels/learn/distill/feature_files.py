"""Files of a teacher's features: several images or several texts, each identified by a hash of its content.

image (n,E)     optionally with regions (n,P,E), and regions_mask (n,P) if a method removed patches; or
text (n,E)      optionally with words (n,t,E) up to the last word of the longest text, and words_mask (n,T)
sha256 (n,32)   uint8, of each image or text
header          the format, the teacher and the dtype
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from clipkernels.files import METADATA_KEY, digest_table, read_metadata, write_tensors
from clipkernels.fingerprint import same_probe, same_tower, short_fingerprint
from clipkernels.learn.distill.features import TeacherFeatures

Kind = Literal["image", "text"]
About = Mapping[str, Any]
"""Everything besides the inputs that determines the features: `Teacher.about` and the dtype."""

FORMAT = "clipkernels.teacher.2"
FIELDS: dict[Kind, tuple[str, ...]] = {
    "image": ("image", "regions", "regions_mask"),
    "text": ("text", "words", "words_mask"),
}


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


def write_features(file: Path, digests: Sequence[bytes], tensors: Mapping[str, Tensor], about: About) -> None:
    """Write a file of features atomically; raise OSError if it cannot be written."""
    header = json.dumps({"format": FORMAT, "teacher": about})
    write_tensors(file, {**tensors, "sha256": digest_table(digests)}, {METADATA_KEY: header})


def check_header(file: Path, header: Mapping[str, str], about: About) -> None:
    """Raise ValueError unless a file holds features of this teacher."""
    metadata = read_metadata(header)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"expected a folder that holds only a teacher's features ({FORMAT!r}), got {file} of format "
            f"{metadata.get('format')!r}: choose another folder"
        )
    differ = differences(metadata.get("teacher", {}), about)
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
