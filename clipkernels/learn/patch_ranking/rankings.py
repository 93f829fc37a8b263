"""Rankings of images, stored in one file; during a run, in parts next to it.

FILE              ranks int16 (n,P), features fp32 (n,S,G), sha256 (n,32) uint8 of each image and label, and the class
                  embeddings text (K,E) fp32, if the score uses them; the options are in the header
FILE.KEY.parts/   the same for a few images each, written as soon as they are ranked
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from uuid import uuid4

import msgspec
import torch
from torch import Tensor

from clipkernels.files import sweep
from clipkernels.formats import Count, Fingerprint, Format, Line, Size, TensorSpec
from clipkernels.heads import ZeroShot
from clipkernels.messages import quantity
from clipkernels.state_files import digest_table, read_state, write_state


class RankingOptions(msgspec.Struct, forbid_unknown_fields=True):
    """The header of a file of rankings: the options of the search, and its tower."""

    score: Literal["label", "confidence", "feature"]
    window: Size
    stride: Size
    step: Size
    block: Count
    tower: Fingerprint
    image_size: Annotated[list[Size], msgspec.Meta(min_length=2, max_length=2)]
    tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 15)]
    prefix: Count
    width: Size
    blocks: Size
    reader: Line | None

    def __post_init__(self) -> None:
        for name, limit in (("prefix", self.tokens), ("block", self.blocks)):
            if getattr(self, name) >= limit:
                raise ValueError(f"{name} {getattr(self, name)} of {limit}")


def _tensors(header: RankingOptions) -> dict[str, TensorSpec]:
    patches = header.tokens - header.prefix
    text = {"text": TensorSpec((torch.float32,), "classes embedding", -1.001, 1.001)}
    return {
        "ranks": TensorSpec((torch.int16,), f"images {patches}", 0, patches - 1),
        "features": TensorSpec((torch.float32,), "images tokens channels"),
        "sha256": TensorSpec((torch.uint8,), "images 32"),
        **({} if header.score == "feature" else text),
    }


def _check(header: RankingOptions, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless every row of ranks is an order of the patches."""
    ranks = tensors["ranks"].sort(1).values
    wrong = int((ranks != torch.arange(ranks.shape[1])).any(1).sum())
    if wrong:
        raise ValueError(f"{wrong} of {quantity(len(ranks), 'row')} of ranks that repeat a rank")


FORMAT = Format("clipkernels.rankings.2", "rankings, as golden_ranking writes them", RankingOptions, _tensors, _check)


class Rankings(NamedTuple):
    """Rankings of n images, and the input of the predictor that learns them.

    ranks (n,P): int64, 0 for the patch that stays longest, P-1 for the one that is removed first.
    features (n,S,G): fp32, the S = prefix + P tokens that enter the block, their channels pooled to G.
    about: the options of the ranking and the fingerprint of the tower.
    sha256 (n,32): uint8, of each image and, if the score uses it, its label; None if unknown.
    new: number of different images that this call ranked, without those that were on disk.
    """

    ranks: Tensor
    features: Tensor
    about: dict[str, Any]
    sha256: Tensor | None = None
    new: int = 0

    def take(self, index: Tensor | slice) -> Rankings:
        """The rankings of the images at `index`."""
        digests = None if self.sha256 is None else self.sha256[index]
        return self._replace(ranks=self.ranks[index], features=self.features[index], sha256=digests)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Rankings:
        """The rankings of a file that `golden_ranking` wrote.

        Raises:
            ValueError: the file holds no rankings, or not those that were written.
            OSError: the file cannot be read.
        """
        about, tensors = read_state(path, FORMAT)
        return cls(tensors["ranks"].long(), tensors["features"], about, tensors["sha256"])


class RankingStore:
    """Rankings by the digest of image and label: those already on disk, and those added.

    Args:
        path: the file, or None to hold the rankings in memory only.
        about: the options of the ranking.
        text: normalised class embeddings (K,E) of the score, or None; compared up to rounding with those of the file.
    Raises:
        ValueError: the file exists and holds something else, or rankings with other options.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, about: Mapping[str, Any], text: Tensor | None = None
    ) -> None:
        self.path, self.about = None if path is None else Path(path), dict(about)
        self.head = None if text is None else ZeroShot(text)
        self.parts_read: set[Path] = set()
        self.new = 0
        self.rows: dict[bytes, tuple[Tensor, Tensor]] = {}
        if self.path is None:
            return
        key = sha256(json.dumps(self.about).encode()).hexdigest()[:8]
        self.parts = Path(f"{self.path}.{key}.parts")
        self._read_new_files()

    def _read_new_files(self) -> None:
        """Read the rankings on disk that are not in memory yet."""
        assert self.path is not None
        # The file itself comes last, because a run that finishes meanwhile writes it before it removes its parts.
        parts = (part for part in sorted(self.parts.glob("*.safetensors")) if part not in self.parts_read)
        for file in (*parts, self.path):
            try:
                about, tensors = read_state(file, FORMAT)
            except FileNotFoundError:  # not written yet, or another run has just merged the part into the file
                continue
            wrong = ", ".join(f"{key} {about.get(key)!r}" for key in self.about if about.get(key) != self.about[key])
            if wrong:
                raise ValueError(f"expected rankings with the same options, got {file} with {wrong}: choose another")
            if self.head is not None and not self.head.matches(tensors["text"]):
                raise ValueError(
                    f"expected rankings with the same classes and prompts, got {file} with others: choose another "
                    "file, or delete it"
                )
            rows = zip(tensors["ranks"].long(), tensors["features"], strict=True)
            for digest, row in zip(map(bytes, tensors["sha256"].numpy()), rows, strict=True):
                self.rows.setdefault(digest, row)
            self.parts_read |= {file} - {self.path}

    def add(self, digests: Sequence[bytes], ranks: Tensor, features: Tensor) -> None:
        """Store the rankings of some images, on disk at once.

        Raises:
            ValueError: features that are not finite, which no file may hold; the rankings of the others are stored.
        """
        features = features.float().cpu()
        is_finite = features.flatten(1).isfinite().all(1)
        if self.path is not None and not is_finite.all():
            finite = is_finite.nonzero()[:, 0].tolist()
            if finite:
                self.add([digests[row] for row in finite], ranks[finite], features[finite])
            wrong = digests[is_finite.tolist().index(False)].hex()
            raise ValueError(
                f"expected features that are finite, got others for {len(digests) - len(finite)} of {len(digests)} "
                f"images, such as that of SHA-256 {wrong}: leave it out"
            )
        rows = zip(ranks.cpu(), features, strict=True)
        self.rows.update(zip(digests, rows, strict=True))
        self.new += len(digests)
        if self.path is None:
            return
        part = self.parts / f"{uuid4().hex}.safetensors"
        for last_try in (False, True):
            self.parts.mkdir(parents=True, exist_ok=True)
            try:
                self._write(part, digests)
                break
            except FileNotFoundError:  # another run has finished and removed the folder
                if last_try:
                    raise
        self.parts_read.add(part)

    def finish(self, digests: Sequence[bytes]) -> Rankings:
        """The rankings of these images, in their order; the file holds these first, then those of other images."""
        if self.path is not None:
            self._read_new_files()  # another run may have finished meanwhile
            self._write(self.path, list(dict.fromkeys([*digests, *self.rows])))
            for part in self.parts_read:
                part.unlink(missing_ok=True)
            with suppress(OSError):  # no folder, or another run is writing to it
                sweep(self.parts)
                self.parts.rmdir()
        return Rankings(*self._stack(digests), self.about, digest_table(digests), self.new)

    def _write(self, path: Path, digests: Sequence[bytes]) -> None:
        ranks, features = self._stack(digests)
        tensors = {"ranks": ranks.short(), "features": features, "sha256": digest_table(digests)}
        if self.head is not None:
            tensors["text"] = self.head.text.float().cpu()
        write_state(path, FORMAT, self.about, tensors)

    def _stack(self, digests: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        ranks, features = zip(*(self.rows[digest] for digest in digests), strict=True)
        return torch.stack(ranks), torch.stack(features)
