"""A file of a teacher's features: some images or some texts, each known by its content.

image (n,E)     with regions (n,P,E) where asked, and regions_mask (n,P) where some are gone; or
text (n,E)      with words (n,t,E) where asked, up to the last word of any of them, and words_mask (n,T)
sha256 (n,32)   uint8, of each image or text
header          the format, and by which teacher, in which dtype
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
"""What features depend on besides what is seen and read: `Teacher.about` and the dtype."""

FORMAT = "clipkernels.teacher.2"
FIELDS: dict[Kind, tuple[str, ...]] = {
    "image": ("image", "regions", "regions_mask"),
    "text": ("text", "words", "words_mask"),
}


def content_hash(item: Tensor | str) -> bytes:
    """The SHA-256 of an image's values, shape and dtype, or of a text's UTF-8."""
    if isinstance(item, str):
        return sha256(item.encode()).digest()
    plain = item.detach().cpu().contiguous()
    known = sha256(str((tuple(plain.shape), plain.dtype)).encode())
    known.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return known.digest()


def to_tensors(kind: Kind, made: TeacherFeatures, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a file holds of some images or texts, on the CPU: nothing of what is behind the last word of a text."""
    if made.words is not None and made.words_mask is not None:
        place = torch.arange(made.words.shape[1], device=made.words.device)
        ends = torch.where(made.words_mask, place + 1, 0).amax(1)
        longest = int(ends.max())
        beyond = place[:longest] >= ends[:, None]
        made = made._replace(words=made.words[:, :longest].masked_fill(beyond[..., None], 0))
    found = {name: getattr(made, name) for name in FIELDS[kind] if getattr(made, name) is not None}
    return {name: x.to("cpu", x.dtype if x.dtype == torch.bool else dtype) for name, x in found.items()}


def finite_rows(tensors: Mapping[str, Tensor]) -> Tensor:
    """Which of n images or texts have finite features; (n,) bool."""
    return torch.stack([x.flatten(1).isfinite().all(1) for x in tensors.values()]).all(0)


def write_features(file: Path, digests: Sequence[bytes], tensors: Mapping[str, Tensor], about: About) -> None:
    """Writes a file, whole or not at all; raises OSError where it cannot be written."""
    header = json.dumps({"format": FORMAT, "teacher": about})
    write_tensors(file, {**tensors, "sha256": digest_table(digests)}, {METADATA_KEY: header})


def check_header(file: Path, header: Mapping[str, str], about: About) -> None:
    """Raises ValueError unless a file holds features of this teacher."""
    said = read_metadata(header)
    if said.get("format") != FORMAT:
        raise ValueError(
            f"expected a folder with features of a teacher alone, got {file} in it, of format {said.get('format')!r} "
            f"instead of {FORMAT!r}: choose another"
        )
    differ = differences(said.get("teacher", {}), about)
    if differ:
        raise ValueError(
            f"expected features of this teacher, got {file} by one with another {differ}: choose another folder"
        )


def differences(came: About, expected: About) -> str:
    """In what one teacher differs from another; "" for nothing."""
    differ = []
    for name, own in expected.items():
        its = came.get(name)
        if isinstance(own, dict):
            if not same_tower(its or {}, own):
                differ.append(f"{name} ({short_fingerprint(its or {})} instead of {short_fingerprint(own)})")
        elif isinstance(own, list):
            if not same_probe(its or [], own):
                differ.append(f"{name} (as by other heads, another mask or another row that is pooled)")
        elif its != own:
            differ.append(f"{name} ({its} instead of {own})")
    return ", ".join(differ)


def gather_features(
    kind: Kind, whole: bool, count: int, parts: Iterable[tuple[Mapping[str, Tensor], list[int], list[int]]]
) -> TeacherFeatures:
    """Features of so many images or texts: of each file some rows, and the places where they go.

    What is behind the last word of a text is zeros, and so is what one was padded less than another.
    """
    found: dict[str, Tensor] = {}
    for tensors, rows, places in parts:
        for name in FIELDS[kind] if whole else FIELDS[kind][:1]:
            if name not in tensors:
                continue
            part = tensors[name]
            length = tensors["words_mask" if name == "words" else name].shape[1]
            room = found.get(name)
            if room is None:
                room = part.new_zeros(count, length, *part.shape[2:])
            elif room.shape[1] < length:
                room = pad(room, (0, 0) * (part.ndim - 2) + (0, length - room.shape[1]))
            room[places, : part.shape[1]] = part[rows]
            found[name] = room
    return TeacherFeatures(**found)
