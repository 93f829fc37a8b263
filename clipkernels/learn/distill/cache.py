"""A frozen teacher's features on disk: each image and text is encoded once and identified by its content."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from clipkernels.arguments import check_callable, check_device, check_flags, check_int, check_path, describe
from clipkernels.classifier import PROMPTS_PER_BATCH
from clipkernels.files import TEMPORARY, sweep
from clipkernels.learn.distill import feature_files
from clipkernels.learn.distill.feature_files import FIELDS, Kind, content_hash
from clipkernels.learn.distill.features import Answers, TeacherFeatures, features_of
from clipkernels.learn.distill.teacher import Teacher
from clipkernels.state_files import read_state

Progress = Callable[[str, int, int], object]
"""Called with "image" or "text", the number of items processed, and the number of those that were encoded."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
THREADS = min(8, os.cpu_count() or 1)
MAX_MAPPED_FILES = 256
"""Limit of the files mapped at a time, because a process may hold about 65,000 maps, libraries and tensors included."""


class TeacherCache:
    """A teacher that encodes nothing twice: its features are stored in a folder that several processes may share.

    Each batch is written atomically before the next one is encoded, so a process that is killed loses at most its
    current batch. If two processes encode the same items at the same time, both store them, which is harmless. Features
    are read through memory maps of the files; no file is held in memory. Each file has its own SHA-256, which is
    checked when the process first reads features of the file.

    `add` the items that are known beforehand: they are stored in files of one batch each. Items missing in a call are
    stored at once in files of their own, up to three per call. These are never merged, because another process may be
    reading them.

    An image is identified by the SHA-256 of its preprocessed values, shape and dtype, so the way in which a file was
    read is part of the key; a text is identified by the SHA-256 of its UTF-8.
    Images on a GPU are copied to the CPU for the hash, so pass CPU images and a device. Only tokens up to a text's last
    word are stored; `words` is zero at end-of-text and padding positions. T is the teacher's, or larger if the
    tokenizer pads to the longest text of its batch.

    Args:
        folder: created if it does not exist.
        teacher: encodes the missing items. Its weights and method must stay the same; it may move or be cast.
        dtype: dtype of the stored features: torch.float16, torch.bfloat16 or torch.float32.
        batch_size: images that are encoded together and stored in one file.
    Raises:
        ValueError: a folder with features of another teacher (image tower, text tower, method, tokenizer), in another
            dtype, or with other or damaged safetensors files; another dtype than the three.
        OSError: the folder cannot be created or read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        teacher: Teacher,
        dtype: torch.dtype = torch.float16,
        *,
        batch_size: int = 64,
    ) -> None:
        check_path(folder=folder)
        if isinstance(teacher, type) or not all(hasattr(teacher, name) for name in ("stamp", "about", "joined")):
            raise TypeError(f"teacher must be a Teacher, got {describe(teacher)}")
        if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {describe(dtype)}")
        check_int("batch_size", batch_size, 1)
        self.folder, self.teacher, self.dtype = Path(folder).resolve(), teacher, dtype
        self.sizes: dict[Kind, int] = {"image": batch_size, "text": PROMPTS_PER_BATCH}
        self.stamp, self.about = teacher.stamp, self._about()
        self.joined = teacher.joined
        self.files: set[str] = set()
        self.maps: dict[Path, dict[str, Tensor]] = {}  # least recently used first
        self.checked: set[Path] = set()
        self.folder_mtime = -1
        self.locations: dict[tuple[Kind, bool], dict[bytes, tuple[Path, int]]] = {
            (kind, detailed): {} for kind in FIELDS for detailed in (False, True)
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        self._read_new_files()
        sweep(self.folder, TEMPORARY)

    @property
    def width(self) -> int:
        """Width E of the embeddings."""
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
        """Encode and store the missing images and texts; return the number of those that were encoded.

        Args:
            images: iterable of preprocessed batches (B,3,S,S) or images (3,S,S).
            texts: iterable of strings.
            regions: also store the features of each patch.
            words: also store the features of each token.
            progress: called after each image and each text.
        Raises:
            ValueError: images of another shape or texts that are not strings; features that are not finite in the
                cache's dtype, which are not stored, while the others of their batch are; a teacher whose method or
                weights changed since the cache was opened.
            OSError: a file cannot be written.
        """
        check_flags(regions=regions, words=words)
        check_callable(progress=progress)
        for name, items in (("images", images), ("texts", texts)):
            if (
                isinstance(items, str)
                or not isinstance(items, Iterable)
                or (isinstance(items, Tensor) and not items.ndim)
            ):
                raise ValueError(f"{name} must be an iterable of {name}, got {describe(items)}")
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
        """The teacher's features, rounded to the cache's dtype and with zero `words` after a text's last word.

        Missing items are encoded and stored.

        Args:
            images, texts, answers, regions, words: as of `Teacher`.
            device: device of the result; by default the images', or the teacher's if there are no images.
        Returns:
            TeacherFeatures, fp32.
        Raises:
            As `Teacher`; and ValueError as `add`, or for a file whose features are not those that were written.
        """
        given = None if device is None else check_device(device)
        features = features_of(self, images, texts, answers, regions, words)
        target = given if given is not None else self.teacher.device if images is None else images.device
        moved = (None if x is None else x.to(target) for x in features)
        return TeacherFeatures(*(x.float() if x is not None and x.is_floating_point() else x for x in moved))

    def see(self, images: Tensor, regions: bool = True) -> TeacherFeatures:
        """`image`, and `regions` with their mask, in the cache's dtype, on the CPU."""
        images = images.detach().cpu()
        with ThreadPoolExecutor(THREADS) as pool:
            digests = list(pool.map(content_hash, images))
        named: dict[bytes, tuple[str, Tensor]] = {}
        for index, (digest, image) in enumerate(zip(digests, images, strict=True)):
            named.setdefault(digest, (f"image {index}, counted from 0", image))
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

    def _add(self, kind: Kind, items: Iterable[Any], detailed: bool, progress: Progress | None) -> int:
        batch: dict[bytes, tuple[str, Any]] = {}
        count = new = 0
        for item in items:
            if progress is not None and count:
                progress(kind, count, new)
            # Copy, because a loader may reuse the memory and a view would keep the whole batch alive.
            value = item if isinstance(item, str) else item.detach().to("cpu", copy=True)
            digest = content_hash(value)
            if digest not in self.locations[kind, detailed]:
                batch.setdefault(digest, (f"{kind} {count}, counted from 0", value))
            count += 1
            if len(batch) == self.sizes[kind]:
                new += self._encode(kind, batch, detailed)
                batch = {}
        new += self._encode(kind, batch, detailed)
        if progress is not None and count:
            progress(kind, count, new)
        return new

    def _encode(self, kind: Kind, items: Mapping[bytes, tuple[str, Any]], detailed: bool) -> int:
        """Encode and store the missing ones of `items`, digest to (name, image or text); return their number."""
        stored = self.locations[kind, detailed]
        if all(digest in stored for digest in items):
            return 0
        self._read_new_files()  # another process may have stored them
        missing = [digest for digest in items if digest not in stored]
        for start in range(0, len(missing), self.sizes[kind]):
            self._check_teacher()
            digests = missing[start : start + self.sizes[kind]]
            names, batch = zip(*(items[digest] for digest in digests), strict=True)
            features = (
                self.teacher.see(torch.stack(batch), detailed)
                if kind == "image"
                else self.teacher.read(batch, detailed)
            )
            self._write(kind, names, digests, features)
        return len(missing)

    def _check_teacher(self) -> None:
        """Raise ValueError unless the teacher is still the one that the files name."""
        stamp = self.teacher.stamp
        if stamp == self.stamp:
            return
        differ = feature_files.differences(self._about(), self.about)
        if differ:
            raise ValueError(
                f"expected the teacher as it was when its cache was opened, got one with another {differ}: open a "
                "cache in another folder"
            )
        self.stamp = stamp  # the model was moved or cast

    def _write(self, kind: Kind, names: Sequence[str], digests: Sequence[bytes], features: TeacherFeatures) -> None:
        """Store the finite features; raise ValueError if any are not finite."""
        tensors = feature_files.to_tensors(kind, features, self.dtype)
        is_finite = feature_files.finite_rows(tensors).tolist()
        rows = [row for row, finite in enumerate(is_finite) if finite]
        if len(rows) < len(is_finite):
            tensors = {name: tensor[rows] for name, tensor in tensors.items()}
        if rows:
            row_digests, mtime = [digests[row] for row in rows], self.folder.stat().st_mtime_ns
            file = self.folder / f"{uuid4().hex}.safetensors"
            feature_files.write_features(file, kind, row_digests, tensors, self.about)
            self._index_file(file, kind, row_digests, FIELDS[kind][1] in tensors)
            # No other process had written before. A file written meanwhile is noticed after the next change of the
            # folder, or its items are encoded again.
            if mtime == self.folder_mtime:
                self.folder_mtime = self.folder.stat().st_mtime_ns
        if len(rows) < len(is_finite):
            first, wrong = is_finite.index(False), len(is_finite) - len(rows)
            raise ValueError(
                f"expected features that are finite in {self.about['dtype']}, got others for {names[first]} (SHA-256 "
                f"{digests[first].hex()}), one of {wrong} in its batch; the other {len(rows)} are stored"
            )

    def _read_new_files(self) -> None:
        """Index the files of the folder that are not indexed yet."""
        changed = self.folder.stat().st_mtime_ns
        if changed == self.folder_mtime:
            return
        for name in sorted(set(os.listdir(self.folder)) - self.files):
            if name.endswith(".safetensors"):
                file = self.folder / name
                header, tensors = read_state(file, feature_files.FORMAT, ("sha256",), copy=False)
                feature_files.check_teacher(file, header["teacher"], self.about)
                digests = list(map(bytes, tensors["sha256"].numpy()))
                self._index_file(file, header["kind"], digests, header["detailed"])
        self.folder_mtime = changed

    def _index_file(self, file: Path, kind: Kind, digests: Sequence[bytes], has_details: bool) -> None:
        """Record the file and row of each image or text of a file."""
        self.files.add(file.name)
        for detailed in (False, True) if has_details else (False,):
            for row, digest in enumerate(digests):
                self.locations[kind, detailed].setdefault(digest, (file, row))

    def _look_up(self, kind: Kind, digests: Sequence[bytes], detailed: bool) -> TeacherFeatures:
        """The features of these digests, in their order."""
        by_file: dict[Path, tuple[list[int], list[int]]] = {}
        for position, digest in enumerate(digests):
            file, row = self.locations[kind, detailed][digest]
            rows, positions = by_file.setdefault(file, ([], []))
            rows.append(row)
            positions.append(position)
        parts = ((self._map_file(file), rows, positions) for file, (rows, positions) in by_file.items())
        return feature_files.gather_features(kind, detailed, len(digests), parts)

    def _map_file(self, file: Path) -> dict[str, Tensor]:
        """The memory-mapped tensors of a file, checked when they are first read."""
        tensors = self.maps.pop(file, None)
        if tensors is None:
            _, tensors = read_state(file, feature_files.FORMAT, copy=False, trusted=file in self.checked)
            self.checked.add(file)
        self.maps[file] = tensors
        for oldest in list(self.maps)[:-MAX_MAPPED_FILES]:
            self.maps.pop(oldest, None)
        return tensors


def _single_images(images: Iterable[Tensor]) -> Iterator[Tensor]:
    """The images (3,S,S) of an iterable of batches and single images, one by one.

    Raises:
        ValueError: items of another kind, or an image of another shape than the first.
    """
    shape = None
    for item in images:
        shape = item.shape[-3:] if shape is None and isinstance(item, Tensor) else shape
        if not isinstance(item, Tensor) or item.ndim not in (3, 4) or item.shape[-3:] != shape:
            actual = tuple(item.shape) if isinstance(item, Tensor) else type(item).__name__
            raise ValueError(f"images must be an iterable of (3,S,S) or (B,3,S,S) of one size, got {actual}")
        yield from item if item.ndim == 4 else (item,)


def _checked_strings(texts: Iterable[str]) -> Iterator[str]:
    """The texts, one by one; raise ValueError for an item that is not a string."""
    for index, item in enumerate(texts):
        if not isinstance(item, str):
            raise ValueError(f"texts must be an iterable of strings, got {describe(item)} at {index}")
        yield item
