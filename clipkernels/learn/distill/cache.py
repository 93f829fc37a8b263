"""What a frozen teacher says, kept on disk: encoded once, known again by its content.

FOLDER/….safetensors   a few images: image (n,E), where asked regions (n,P,E) and, where some are gone, regions_mask;
                       or a few texts: text (n,E), where asked words (n,T,E) and words_mask (n,T); and sha256 (n,32)
                       uint8 of each image or text; in the header, by whom
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
from torch import Tensor

from clipkernels.classifier import PROMPTS_PER_BATCH
from clipkernels.files import digest_table, map_tensors, sweep, write_tensors
from clipkernels.identity import abridged, same_tower
from clipkernels.learn.distill.teacher import Answers, Teacher, TeacherFeatures, features_of

Kind = Literal["image", "text"]
Progress = Callable[[str, int, int], object]
"""Called with "image" or "text", how many came, and how many of them were encoded."""

FORMAT, ABOUT = "clipkernels.teacher.1", "clipkernels"
FIELDS: dict[Kind, tuple[str, ...]] = {
    "image": ("image", "regions", "regions_mask"),
    "text": ("text", "words", "words_mask"),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
THREADS = min(8, os.cpu_count() or 1)


class TeacherCache:
    """A teacher that sees and reads nothing twice, in a folder that several processes may use at once.

    Each batch is on disk before the next one is encoded, in a file that is whole or not there: however a process ends,
    it loses no more than the batch in hand. Two that encode the same at the same time both keep it, which is harmless.
    What is looked up is read from where it lies in the files, and no file is held in memory.

    An image is known by the SHA-256 of its preprocessed values, its shape and its dtype, a text by that of its UTF-8.
    Looking up 64 images of a ViT-B/16 with their regions takes some 50 ms of one CPU core, of which 30 are for hashing;
    what is on a GPU is copied for that: give images on the CPU, and a device.

    Args:
        folder: made if it is not there.
        teacher: who says what is not there yet; it is to stay as it is.
        dtype: in which features are kept: torch.float16, torch.bfloat16 or torch.float32.
        batch_size: images that are encoded together, and kept in one file.
    Raises:
        ValueError: a folder with features of another teacher (image tower, text tower, method, tokenizer), or in
            another dtype, or with safetensors files of another kind; another dtype than these.
        OSError: the folder cannot be made or read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        teacher: Teacher,
        dtype: torch.dtype = torch.float16,
        *,
        batch_size: int = 64,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least one, got {batch_size}")
        self.folder, self.teacher, self.dtype = Path(folder), teacher, dtype
        self.sizes: dict[Kind, int] = {"image": batch_size, "text": PROMPTS_PER_BATCH}
        self.about = {**teacher.about, "dtype": str(dtype).removeprefix("torch.")}
        self.joined = teacher.joined
        self.files: dict[Path, dict[str, Tensor]] = {}
        self.places: dict[tuple[Kind, bool], dict[bytes, tuple[Path, int]]] = {
            (kind, whole): {} for kind in FIELDS for whole in (False, True)
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        self._recall()

    @property
    def width(self) -> int:
        """E."""
        return self.teacher.width

    def add(
        self,
        images: Iterable[Tensor] = (),
        texts: Iterable[str] = (),
        *,
        regions: bool = True,
        words: bool = True,
        progress: Progress | None = None,
    ) -> int:
        """How many images and texts were encoded: those that were not there.

        Args:
            images: batches (B,3,S,S) or images (3,S,S), preprocessed, one after the other.
            texts: strings.
            regions: keep what the teacher says of each patch too.
            words: keep what it says of each token too.
            progress: called after each image and each text.
        Raises:
            ValueError: images of another shape, a string in place of texts, or features that are not finite in the
                cache's dtype, which are not kept; a teacher that was patched otherwise meanwhile.
            OSError: a file cannot be written.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts must be strings one after the other, got the string {texts!r}")
        total = self._add("image", _each(images), regions, progress)
        return total + self._add("text", texts, words, progress)

    def __call__(
        self,
        images: Tensor | None = None,
        texts: Sequence[str] | None = None,
        answers: Answers | None = None,
        *,
        regions: bool = True,
        words: bool = True,
        device: torch.device | str | None = None,
    ) -> TeacherFeatures:
        """What the teacher says, as it says it itself, but rounded to the cache's dtype; what is missing is encoded and
        kept, in files of its own.

        Args:
            images, texts, answers, regions, words: as of `Teacher`.
            device: of the result; that of the images if not given, of the teacher where there are none.
        Returns:
            TeacherFeatures, fp32.
        Raises:
            As `Teacher`; and ValueError as `add`.
        """
        found = features_of(self, images, texts, answers, regions, words)
        target = device if device is not None else self.teacher.device if images is None else images.device
        moved = (None if x is None else x.to(target) for x in found)
        return TeacherFeatures(*(x.float() if x is not None and x.is_floating_point() else x for x in moved))

    def see(self, images: Tensor, regions: bool = True) -> TeacherFeatures:
        """`image`, and `regions` with their mask, in the cache's dtype, on the CPU."""
        images = images.detach().cpu()
        with ThreadPoolExecutor(THREADS) as pool:
            digests = list(pool.map(_digest, images))
        self._encode("image", dict(zip(digests, images, strict=True)), regions)
        return self._look_up("image", digests, regions) if digests else self.teacher.see(images, regions)

    def read(self, texts: Sequence[str], words: bool = True) -> TeacherFeatures:
        """`text`, and `words` with their mask, in the cache's dtype, on the CPU."""
        digests = [_digest(text) for text in texts]
        self._encode("text", dict(zip(digests, texts, strict=True)), words)
        return self._look_up("text", digests, words) if digests else self.teacher.read(texts, words)

    def _add(self, kind: Kind, items: Iterable[Any], whole: bool, progress: Progress | None) -> int:
        waiting: dict[bytes, Any] = {}
        came = new = 0
        for item in items:
            came += 1
            digest = _digest(item)
            if digest not in self.places[kind, whole]:
                waiting[digest] = item
            if len(waiting) == self.sizes[kind]:
                new += self._encode(kind, waiting, whole)
                waiting = {}
            if progress is not None:
                progress(kind, came, new)
        new += self._encode(kind, waiting, whole)
        if progress is not None and came:
            progress(kind, came, new)
        return new

    def _encode(self, kind: Kind, items: Mapping[bytes, Any], whole: bool) -> int:
        """Has the teacher say what is not there of some images or texts, batch by batch, and keeps it; how many."""
        there = self.places[kind, whole]
        if all(digest in there for digest in items):
            return 0
        self._recall()  # another process may have them
        missing = [digest for digest in items if digest not in there]
        if missing and self.teacher.method != self.about["method"]:
            raise ValueError(
                f"expected the teacher as it was when its cache was made, with the method {self.about['method']}, got "
                f"{self.teacher.method}"
            )
        for start in range(0, len(missing), self.sizes[kind]):
            digests = missing[start : start + self.sizes[kind]]
            batch = [items[digest] for digest in digests]
            made = self.teacher.see(torch.stack(batch), whole) if kind == "image" else self.teacher.read(batch, whole)
            self._write(kind, digests, made)
        return len(missing)

    def _write(self, kind: Kind, digests: Sequence[bytes], made: TeacherFeatures) -> None:
        tensors = {}
        for name in FIELDS[kind]:
            found: Tensor | None = getattr(made, name)
            if found is None:
                continue
            tensors[name] = found.cpu() if found.dtype == torch.bool else found.to("cpu", self.dtype)
            fine = tensors[name].flatten(1).isfinite().all(1)
            if not fine.all():
                wrong = digests[int(fine.int().argmin())].hex()
                raise ValueError(
                    f"expected {name} features that are finite in {self.about['dtype']}, got others of the {kind} of "
                    f"SHA-256 {wrong}"
                )
        file = self.folder / f"{uuid4().hex}.safetensors"
        header = json.dumps({"format": FORMAT, "teacher": self.about})
        write_tensors(file, {**tensors, "sha256": digest_table(digests)}, {ABOUT: header})
        self._keep(file, digests, tensors)

    def _recall(self) -> None:
        """Takes in what is in the folder and not known yet."""
        for file in sorted(set(self.folder.glob("*.safetensors")) - set(self.files)):
            tensors, header = map_tensors(file)
            self._check(file, header)
            self._keep(file, list(map(bytes, tensors["sha256"].numpy())), tensors)

    def _keep(self, file: Path, digests: Sequence[bytes], tensors: Mapping[str, Tensor]) -> None:
        """Takes in where the features of some images or texts are."""
        self.files[file] = {}
        kind: Kind = "image" if "image" in tensors else "text"
        for whole in (False, True) if FIELDS[kind][1] in tensors else (False,):
            for row, digest in enumerate(digests):
                self.places[kind, whole].setdefault(digest, (file, row))

    def _check(self, file: Path, header: Mapping[str, str]) -> None:
        """Raises ValueError unless a file holds features of this teacher."""
        try:
            said = json.loads(header.get(ABOUT, ""))
        except ValueError:
            said = None
        if not isinstance(said, dict) or said.get("format") != FORMAT:
            raise ValueError(f"expected a folder with features of a teacher alone, got {file} in it: choose another")
        differ = []
        for name, own in self.about.items():
            its = said.get("teacher", {}).get(name)
            if isinstance(own, dict):
                if not same_tower(its or {}, own):
                    differ.append(f"{name} ({abridged(its or {})} instead of {abridged(own)})")
            elif its != own:
                differ.append(f"{name} ({its} instead of {own})")
        if differ:
            raise ValueError(
                f"expected features of this teacher, got {file} by one with another {', '.join(differ)}: choose "
                "another folder"
            )

    def _look_up(self, kind: Kind, digests: Sequence[bytes], whole: bool) -> TeacherFeatures:
        """The rows of these, in their order."""
        rows: dict[Path, tuple[list[int], list[int]]] = {}
        for place, digest in enumerate(digests):
            file, row = self.places[kind, whole][digest]
            places, index = rows.setdefault(file, ([], []))
            places.append(place)
            index.append(row)
        found: dict[str, Tensor] = {}
        for name in FIELDS[kind] if whole else FIELDS[kind][:1]:
            parts = [self._mapped(file).get(name) for file in rows]
            there = [part for part in parts if part is not None]
            if not there:
                continue
            # Texts may have been padded to different lengths.
            longest = max(part.shape[1] for part in there)
            found[name] = there[0].new_zeros(len(digests), longest, *there[0].shape[2:])
            for part, (places, index) in zip(there, rows.values(), strict=True):
                found[name][places, : part.shape[1]] = part[index]
        return TeacherFeatures(**found)

    def _mapped(self, file: Path) -> dict[str, Tensor]:
        """The tensors of a file, where they lie in it."""
        if not self.files[file]:
            self.files[file] = map_tensors(file)[0]
        return self.files[file]


def _each(images: Iterable[Tensor]) -> Iterator[Tensor]:
    """Images (3,S,S) of batches and of images.

    Raises:
        ValueError: something else, or an image of another shape than the first.
    """
    shape = None
    for item in images:
        shape = item.shape[-3:] if shape is None and isinstance(item, Tensor) else shape
        if not isinstance(item, Tensor) or item.ndim not in (3, 4) or item.shape[-3:] != shape:
            came = tuple(item.shape) if isinstance(item, Tensor) else type(item).__name__
            raise ValueError(f"images must be (3,S,S) or (B,3,S,S) one after the other, of one size, got {came}")
        yield from item if item.ndim == 4 else (item,)


def _digest(item: Tensor | str) -> bytes:
    """By what an image or a text is known."""
    if isinstance(item, str):
        return sha256(item.encode()).digest()
    plain = item.detach().cpu().contiguous()
    known = sha256(str((tuple(plain.shape), plain.dtype)).encode())
    known.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return known.digest()
