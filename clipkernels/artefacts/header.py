"""clipkernels.json: everything about an artefact but its weights, signed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from clipkernels.artefacts.method_records import Record
from clipkernels.files import hash_of
from clipkernels.formats import Digest, Fingerprint, Format, Line, Precision, Size
from clipkernels.plan_records import PlanRecord
from clipkernels.state_files import read_json, write_json

FILE = "clipkernels.json"
MAX_BYTES = 1 << 22
Library = Literal["open_clip", "transformers", "timm", "openai"]


class TokenizerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tokenizer: the host library's for the folder, or clipkernels' own of bytes, with its length of texts."""

    kind: Literal["library", "bytes"]
    context_length: Size | None = None


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of clipkernels.json.

    library, model: the library, and the name of the model's class in it.
    method, plan: the method that the tower runs and its plan; None for the host's own forward.
    tower, text_tower: fingerprints; None for a model without text.
    precision: dtype of most weights.
    precisions: dtypes of the others, by name.
    fp32_norms: open_clip's norms compute in float32, as with its precisions fp16 and bf16.
    tokenizer: None for none.
    files: the files of the artefact with their SHA-256.
    versions: of the packages that wrote it.
    fidelity: a report of what the method changes, or None.
    """

    library: Library
    model: Line
    method: Record | None
    plan: PlanRecord | None
    tower: Fingerprint
    text_tower: Fingerprint | None
    precision: Precision
    precisions: dict[Line, Precision]
    fp32_norms: bool
    tokenizer: TokenizerRecord | None
    files: Annotated[dict[Line, Digest], msgspec.Meta(min_length=1, max_length=1 << 12)]
    versions: dict[Line, Line | None]
    fidelity: dict[str, Any] | None

    def __post_init__(self) -> None:
        if (self.method is None) != (self.plan is None):
            raise ValueError("a method without a plan, or a plan without a method")


FORMAT = Format("clipkernels.artefact.1", "an artefact of ck.save", Header, lambda header: {})


def is_artefact(folder: str | os.PathLike[str]) -> bool:
    """Return true if a folder has a clipkernels.json, which may be damaged."""
    return os.path.lexists(Path(folder) / FILE)


def write_header(folder: Path, header: Header) -> None:
    """Write clipkernels.json.

    Raises:
        ValueError: a fidelity report that JSON cannot hold, such as with NaN, or of more than 4 MiB.
        OSError: the file cannot be written.
    """
    try:
        write_json(folder / FILE, FORMAT, header, MAX_BYTES)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a fidelity report that JSON can hold, got one with: {error}") from error


def read_header(folder: str | os.PathLike[str]) -> Header:
    """The header of an artefact.

    Raises:
        ValueError: no clipkernels.json, one of a newer or an older format, or not as it was written.
        OSError: the file cannot be read.
    """
    file = Path(folder) / FILE
    if not is_artefact(folder):
        raise ValueError(f"expected a folder that ck.save wrote, got {folder} without {FILE}")
    header: Header = read_json(file, FORMAT, MAX_BYTES)
    return header


def check_files(folder: str | os.PathLike[str], header: Header) -> None:
    """Raise ValueError unless the files of an artefact are those that were written; further files do not count.

    Raises:
        OSError: a file is missing.
    """
    for name, digest in header.files.items():
        if Path(name).name != name:
            raise ValueError(f"expected names of files in {folder}, got {name!r:.60}")
        if hash_of(Path(folder) / name) != digest:
            raise ValueError(
                f"expected the files that ck.save wrote to {folder}, got another {name} (its SHA-256 differs): save "
                "the artefact again from the model that you mean"
            )
