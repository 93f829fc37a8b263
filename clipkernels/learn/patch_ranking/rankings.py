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
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from torch import Tensor

from clipkernels.files import METADATA_KEY, digest_table, read_metadata, read_tensors, sweep, write_tensors
from clipkernels.heads import ZeroShot

FORMAT = "clipkernels.rankings.1"


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
            ValueError: the file holds no rankings.
            OSError: the file cannot be read.
        """
        tensors, about = _read(path)
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
                tensors, about = _read(file)
            except FileNotFoundError:  # not written yet, or another run has just merged the part into the file
                continue
            wrong = ", ".join(f"{key} {about.get(key)!r}" for key in self.about if about.get(key) != self.about[key])
            if wrong:
                raise ValueError(f"expected rankings with the same options, got {file} with {wrong}: choose another")
            if self.head is not None and not self.head.matches(tensors.get("text", torch.empty(0, 0))):
                raise ValueError(
                    f"expected rankings with the same classes and prompts, got {file} with others: choose another "
                    "file, or delete it"
                )
            rows = zip(tensors["ranks"].long(), tensors["features"], strict=True)
            for digest, row in zip(map(bytes, tensors["sha256"].numpy()), rows, strict=True):
                self.rows.setdefault(digest, row)
            self.parts_read |= {file} - {self.path}

    def add(self, digests: Sequence[bytes], ranks: Tensor, features: Tensor) -> None:
        """Store the rankings of some images, on disk at once."""
        rows = zip(ranks.cpu(), features.float().cpu(), strict=True)
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
        write_tensors(path, tensors, {METADATA_KEY: json.dumps({"format": FORMAT, **self.about})})

    def _stack(self, digests: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        ranks, features = zip(*(self.rows[digest] for digest in digests), strict=True)
        return torch.stack(ranks), torch.stack(features)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file of rankings, and the options of the ranking."""
    tensors, header = read_tensors(path)
    about = read_metadata(header)
    version = about.pop("format", None)
    if version != FORMAT or not {"ranks", "features", "sha256"} <= set(tensors):
        raise ValueError(f"expected rankings, as golden_ranking writes them, got {path} with format {version!r}")
    return tensors, about
