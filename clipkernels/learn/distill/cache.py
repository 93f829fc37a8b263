"""What a frozen teacher says, kept on disk: encoded once, known again by its content."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from clipkernels.classifier import PROMPTS_PER_BATCH
from clipkernels.files import TEMPORARY, map_tensors, sweep
from clipkernels.learn.distill import feature_files
from clipkernels.learn.distill.feature_files import FIELDS, Kind, content_hash
from clipkernels.learn.distill.features import Answers, TeacherFeatures, features_of
from clipkernels.learn.distill.teacher import Teacher

Progress = Callable[[str, int, int], object]
"""Called with "image" or "text", how many came, and how many of them were encoded."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
THREADS = min(8, os.cpu_count() or 1)
MAX_MAPPED_FILES = 256
"""Files that are mapped at a time: a process may map some 65,000, all libraries and tensors among them."""


class TeacherCache:
    """A teacher that sees and reads nothing twice, in a folder that several processes may use at once.

    Each batch is on disk before the next one is encoded, in a file that is whole or not there: however a process ends,
    it loses no more than the batch in hand. Two that encode the same at the same time both keep it, which is harmless.
    What is looked up is read from where it lies in the files, and no file is held in memory.

    `add` first what is known beforehand: it is kept in files of a batch each. What is missing in a call is kept at once
    in files of its own, up to three a call, which are never joined: another process may be reading them.

    An image is known by the SHA-256 of its preprocessed values, its shape and its dtype, a text by that of its UTF-8.
    What is on a GPU is copied for that: give images on the CPU, and a device. Of a text nothing is kept behind its last
    word: there `words` are zeros, where the teacher has its end and its padding. They are as many as the teacher's; of
    a tokenizer that pads to the longest of its batch, there may be more.

    Args:
        folder: made if it is not there.
        teacher: who says what is not there yet; it is to stay as it is, but may move, or lose precision.
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
        self.folder, self.teacher, self.dtype = Path(folder).resolve(), teacher, dtype
        self.sizes: dict[Kind, int] = {"image": batch_size, "text": PROMPTS_PER_BATCH}
        self.stamp, self.about = teacher.stamp, self._about()
        self.joined = teacher.joined
        self.files: set[str] = set()
        self.maps: dict[Path, dict[str, Tensor]] = {}  # the least recently used first
        self.listed = -1
        self.places: dict[tuple[Kind, bool], dict[bytes, tuple[Path, int]]] = {
            (kind, whole): {} for kind in FIELDS for whole in (False, True)
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        self._read_new_files()
        sweep(self.folder, TEMPORARY)

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
            ValueError: images of another shape, something else than strings for texts; features that are not finite in
                the cache's dtype, which are not kept, while the others of their batch are; a teacher that was patched
                otherwise or has other weights than when the cache was opened.
            OSError: a file cannot be written.
        """
        for name, given in (("images", images), ("texts", texts)):
            if isinstance(given, str) or not isinstance(given, Iterable):
                raise ValueError(f"{name} must come one after the other, got {given!r:.100}")
        total = self._add("image", _single_images(images), regions, progress)
        return total + self._add("text", _checked_strings(texts), words, progress)

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
        """What the teacher says, as it says it itself, but rounded to the cache's dtype, and with zeros for `words`
        behind a text's last; what is missing is encoded and kept.

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
            digests = list(pool.map(content_hash, images))
        named: dict[bytes, tuple[str, Tensor]] = {}
        for place, (digest, image) in enumerate(zip(digests, images, strict=True)):
            named.setdefault(digest, (f"image {place}, counted from 0", image))
        self._encode("image", named, regions)
        return self._look_up("image", digests, regions) if digests else self.teacher.see(images, regions)

    def read(self, texts: Sequence[str], words: bool = True) -> TeacherFeatures:
        """`text`, and `words` with their mask, in the cache's dtype, on the CPU."""
        digests = [content_hash(text) for text in texts]
        named = ((f"the text {text!r:.60}", text) for text in texts)
        self._encode("text", dict(zip(digests, named, strict=True)), words)
        return self._look_up("text", digests, words) if digests else self.teacher.read(texts, words)

    def _about(self) -> dict[str, Any]:
        return {**self.teacher.about, "dtype": str(self.dtype).removeprefix("torch.")}

    def _add(self, kind: Kind, items: Iterable[Any], whole: bool, progress: Progress | None) -> int:
        waiting: dict[bytes, tuple[str, Any]] = {}
        came = new = 0
        for item in items:
            if progress is not None and came:
                progress(kind, came, new)
            # A loader may fill the same memory again, and a view would hold the whole batch.
            own = item if isinstance(item, str) else item.detach().to("cpu", copy=True)
            digest = content_hash(own)
            if digest not in self.places[kind, whole]:
                waiting.setdefault(digest, (f"{kind} {came}, counted from 0", own))
            came += 1
            if len(waiting) == self.sizes[kind]:
                new += self._encode(kind, waiting, whole)
                waiting = {}
        new += self._encode(kind, waiting, whole)
        if progress is not None and came:
            progress(kind, came, new)
        return new

    def _encode(self, kind: Kind, items: Mapping[bytes, tuple[str, Any]], whole: bool) -> int:
        """Has the teacher say what is not there of some images or texts, each with its name, batch by batch, and keeps
        it; how many."""
        there = self.places[kind, whole]
        if all(digest in there for digest in items):
            return 0
        self._read_new_files()  # another process may have them
        missing = [digest for digest in items if digest not in there]
        for start in range(0, len(missing), self.sizes[kind]):
            self._check_teacher()
            digests = missing[start : start + self.sizes[kind]]
            names, batch = zip(*(items[digest] for digest in digests), strict=True)
            made = self.teacher.see(torch.stack(batch), whole) if kind == "image" else self.teacher.read(batch, whole)
            self._write(kind, names, digests, made)
        return len(missing)

    def _check_teacher(self) -> None:
        """Raises ValueError unless the teacher is the one that files name."""
        stamp = self.teacher.stamp
        if stamp == self.stamp:
            return
        differ = feature_files.differences(self._about(), self.about)
        if differ:
            raise ValueError(
                f"expected the teacher as it was when its cache was opened, got one with another {differ}: open one in "
                "another folder"
            )
        self.stamp = stamp  # it has moved, or was cast

    def _write(self, kind: Kind, names: Sequence[str], digests: Sequence[bytes], made: TeacherFeatures) -> None:
        """Keeps what is finite; raises ValueError where something is not."""
        tensors = feature_files.to_tensors(kind, made, self.dtype)
        fine = feature_files.finite_rows(tensors).tolist()
        rows = [row for row, each in enumerate(fine) if each]
        if len(rows) < len(fine):
            tensors = {name: found[rows] for name, found in tensors.items()}
        if rows:
            own, before = [digests[row] for row in rows], self.folder.stat().st_mtime_ns
            file = self.folder / f"{uuid4().hex}.safetensors"
            feature_files.write_features(file, own, tensors, self.about)
            self._index_file(file, own, tensors)
            # Nobody else has written since; one that writes meanwhile is seen after the next change, or encoded again.
            if before == self.listed:
                self.listed = self.folder.stat().st_mtime_ns
        if len(rows) < len(fine):
            first, wrong = fine.index(False), len(fine) - len(rows)
            raise ValueError(
                f"expected features that are finite in {self.about['dtype']}, got others of {names[first]} (SHA-256 "
                f"{digests[first].hex()}), one of {wrong} in its batch; the other {len(rows)} are kept"
            )

    def _read_new_files(self) -> None:
        """Takes in what is in the folder and not known yet."""
        changed = self.folder.stat().st_mtime_ns
        if changed == self.listed:
            return
        for name in sorted(set(os.listdir(self.folder)) - self.files):
            if name.endswith(".safetensors"):
                tensors, header = map_tensors(self.folder / name)
                feature_files.check_header(self.folder / name, header, self.about)
                self._index_file(self.folder / name, list(map(bytes, tensors["sha256"].numpy())), tensors)
        self.listed = changed

    def _index_file(self, file: Path, digests: Sequence[bytes], tensors: Mapping[str, Tensor]) -> None:
        """Takes in where the features of some images or texts are."""
        self.files.add(file.name)
        kind: Kind = "image" if "image" in tensors else "text"
        for whole in (False, True) if FIELDS[kind][1] in tensors else (False,):
            for row, digest in enumerate(digests):
                self.places[kind, whole].setdefault(digest, (file, row))

    def _look_up(self, kind: Kind, digests: Sequence[bytes], whole: bool) -> TeacherFeatures:
        """The rows of these, in their order."""
        found: dict[Path, tuple[list[int], list[int]]] = {}
        for place, digest in enumerate(digests):
            file, row = self.places[kind, whole][digest]
            rows, places = found.setdefault(file, ([], []))
            rows.append(row)
            places.append(place)
        return feature_files.gather_features(
            kind, whole, len(digests), ((self._map_file(file), *each) for file, each in found.items())
        )

    def _map_file(self, file: Path) -> dict[str, Tensor]:
        """The tensors of a file, where they lie in it."""
        tensors = self.maps.pop(file, None) or map_tensors(file)[0]
        self.maps[file] = tensors
        for oldest in list(self.maps)[:-MAX_MAPPED_FILES]:
            self.maps.pop(oldest, None)
        return tensors


def _single_images(images: Iterable[Tensor]) -> Iterator[Tensor]:
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


def _checked_strings(texts: Iterable[str]) -> Iterator[str]:
    """Texts as they come; raises ValueError for what is none."""
    for place, each in enumerate(texts):
        if not isinstance(each, str):
            raise ValueError(f"texts must be strings one after the other, got {each!r:.100} at {place}")
        yield each
