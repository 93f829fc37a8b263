"""Rankings of images, and how they are kept: whole in one file, and part by part beside it until that is there.

FILE              ranks int16 (n,P), features fp32 (n,S,G), sha256 (n,32) uint8 of what was ranked, the class
                  embeddings text (K,E) fp32 that were asked, if any; in the header, how
FILE.KEY.parts/   the same for a few images each, as they come
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
    """How long each patch stays, and what a predictor sees of it.

    ranks (n,P): int64, 0 for the patch that stays longest, P-1 for the one that goes first.
    features (n,S,G): fp32, the S = prefix + P tokens that enter the block, their channels pooled to G.
    about: how they were ranked, and on which tower.
    sha256 (n,32): uint8, of each image and, where that was asked, its label; None where it is not known.
    new: how many different images were ranked for this, rather than before.
    """

    ranks: Tensor
    features: Tensor
    about: dict[str, Any]
    sha256: Tensor | None = None
    new: int = 0

    def take(self, index: Tensor | slice) -> Rankings:
        """Some of the images."""
        digests = None if self.sha256 is None else self.sha256[index]
        return self._replace(ranks=self.ranks[index], features=self.features[index], sha256=digests)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Rankings:
        """What `golden_ranking` wrote.

        Raises:
            ValueError: the file is none of these.
            OSError: it cannot be read.
        """
        tensors, about = _read(path)
        return cls(tensors["ranks"].long(), tensors["features"], about, tensors["sha256"])


class RankingStore:
    """Rankings by the digest of what was ranked: those on disk already, and those that come.

    Args:
        path: the file, or None to keep them in memory alone.
        about: how these are ranked.
        text: class embeddings (K,E), normalised, that are asked, or None; they are the same if they are nearly so.
    Raises:
        ValueError: the file is there and holds something else, or rankings made otherwise.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, about: Mapping[str, Any], text: Tensor | None = None
    ) -> None:
        self.path, self.about = None if path is None else Path(path), dict(about)
        self.asked = None if text is None else ZeroShot(text)
        self.read: set[Path] = set()
        self.new = 0
        self.rows: dict[bytes, tuple[Tensor, Tensor]] = {}
        if self.path is None:
            return
        key = sha256(json.dumps(self.about).encode()).hexdigest()[:8]
        self.parts = Path(f"{self.path}.{key}.parts")
        self._read_new_files()

    def _read_new_files(self) -> None:
        """Takes in what is on disk and not known yet."""
        assert self.path is not None
        # The whole last: whoever finishes meanwhile writes it before its parts go.
        parts = (part for part in sorted(self.parts.glob("*.safetensors")) if part not in self.read)
        for file in (*parts, self.path):
            try:
                tensors, said = _read(file)
            except FileNotFoundError:  # not there yet, or another run has just put it into the whole
                continue
            wrong = ", ".join(f"{name} {said.get(name)!r}" for name in self.about if said.get(name) != self.about[name])
            if wrong:
                raise ValueError(f"expected rankings made as these are, got {file} with {wrong}: choose another")
            if self.asked is not None and not self.asked.matches(tensors.get("text", torch.empty(0, 0))):
                wanted = "expected rankings by the same classes and prompts"
                raise ValueError(f"{wanted}, got {file}: choose another, or delete it")
            rows = zip(tensors["ranks"].long(), tensors["features"], strict=True)
            for digest, row in zip(map(bytes, tensors["sha256"].numpy()), rows, strict=True):
                self.rows.setdefault(digest, row)
            self.read |= {file} - {self.path}

    def add(self, digests: Sequence[bytes], ranks: Tensor, features: Tensor) -> None:
        """Keeps the rankings of some images, on disk at once."""
        rows = zip(ranks.cpu(), features.float().cpu(), strict=True)
        self.rows.update(zip(digests, rows, strict=True))
        self.new += len(digests)
        if self.path is None:
            return
        part = self.parts / f"{uuid4().hex}.safetensors"
        for last in (False, True):
            self.parts.mkdir(parents=True, exist_ok=True)
            try:
                self._write(part, digests)
                break
            except FileNotFoundError:  # another run has finished and removed the folder
                if last:
                    raise
        self.read.add(part)

    def finish(self, digests: Sequence[bytes]) -> Rankings:
        """The rankings of these images, in their order; the file holds them so, then what it held of others."""
        if self.path is not None:
            self._read_new_files()  # another run may have finished meanwhile
            self._write(self.path, list(dict.fromkeys([*digests, *self.rows])))
            for part in self.read:
                part.unlink(missing_ok=True)
            with suppress(OSError):  # there is none, or another run is writing there
                sweep(self.parts)
                self.parts.rmdir()
        return Rankings(*self._stack(digests), self.about, digest_table(digests), self.new)

    def _write(self, path: Path, digests: Sequence[bytes]) -> None:
        ranks, features = self._stack(digests)
        tensors = {"ranks": ranks.short(), "features": features, "sha256": digest_table(digests)}
        if self.asked is not None:
            tensors["text"] = self.asked.text.float().cpu()
        write_tensors(path, tensors, {METADATA_KEY: json.dumps({"format": FORMAT, **self.about})})

    def _stack(self, digests: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        ranks, features = zip(*(self.rows[digest] for digest in digests), strict=True)
        return torch.stack(ranks), torch.stack(features)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file of rankings, and how they were made."""
    tensors, header = read_tensors(path)
    about = read_metadata(header)
    said = about.pop("format", None)
    if said != FORMAT or not {"ranks", "features", "sha256"} <= set(tensors):
        raise ValueError(f"expected rankings, as golden_ranking writes them, got {path} with format {said!r}")
    return tensors, about
