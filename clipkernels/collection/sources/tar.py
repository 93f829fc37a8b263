"""WebDataset tars as a source: consecutive members with one key are an item."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, TYPE_CHECKING, NamedTuple

from clipkernels.collection.sources.containers import CHANGED, TAR, containers_of, stamped
from clipkernels.collection.sources.folder import MAX_SIDECAR, column_type, column_value
from clipkernels.collection.sources.items import BATCH_ROWS, Answers, Item, escape, make_batch
from clipkernels.files import open_named
from clipkernels.images import is_image_name
from clipkernels.images.reader import MAX_BYTES
from clipkernels.messages import first_line, list_names, printable, reason_of

if TYPE_CHECKING:
    import pyarrow as pa

KIND = "an uncompressed tar"
BLOCK = 512


class Sample(NamedTuple):
    """A sample of a tar: its key, the offset of its first member, and its members by suffix."""

    key: str
    offset: int
    members: dict[str, tarfile.TarInfo]


@dataclass
class TarSource:
    """The samples of a WebDataset tar, or of the tars below a folder or of a glob.

    An id is "name.tar/key"; a key is everything before the first dot of a member's base name. The columns are the
    suffixes behind that dot.
    """

    name: str
    files: dict[str, str]
    image_column: str | None = None
    note: str | None = None
    skipped: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, name: str, image_column: str | None) -> TarSource:
        """The source that a file, a folder or a glob names."""
        return cls(name, containers_of(name, TAR), image_column)

    def list(self, columns: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        """Yield the samples, tar by tar, in the order of their members."""
        self.skipped = Counter()
        empty = True
        for name in self.files:
            samples = self._samples_of(name)
            while chunk := list(islice(samples, BATCH_ROWS)):
                empty = False
                keys = [f"{escape(name)}/{escape(sample.key)}" for sample, _, _ in chunk]
                offsets, sizes = [sample.offset for sample, _, _ in chunk], [size for _, size, _ in chunk]
                yield make_batch(keys, offsets, sizes, [time for _, _, time in chunk])
        counts = [f"{kind} ({count})" for kind, count in sorted(self.skipped.items())]
        self.note = f"skipped {', '.join(counts)}" if counts else None
        if empty:
            raise ValueError(f"expected images, got none in {printable(self.name)}{_because(self.note)}")

    def _samples_of(self, name: str) -> Iterator[tuple[Sample, int, int]]:
        """The samples of a tar that have an image, its size, and the time of the tar's last change."""
        path = self.files[name]
        with open_named(path, KIND) as stream:
            modified = os.fstat(stream.fileno()).st_mtime_ns
            try:
                for sample in read_samples(stream, self.skipped):
                    suffix = self._image_of(sample)
                    if suffix is None:
                        self.skipped["samples without an image"] += 1
                    else:
                        yield sample, sample.members[suffix].size, modified
            except (tarfile.TarError, ValueError) as error:
                raise ValueError(f"expected {KIND}, got {printable(path)}: {first_line(error)}") from error

    def _image_of(self, sample: Sample) -> str | None:
        """The suffix of a sample's image.

        Raises:
            ValueError: several.
        """
        if self.image_column is not None:
            return self.image_column if self.image_column in sample.members else None
        images = [suffix for suffix in sample.members if is_image_name(f"x.{suffix}")]
        images = [suffix for suffix in images if "." not in suffix] or images
        if len(images) > 1:
            raise ValueError(
                f"{sample.key!r} has several images: name one of {list_names(sorted(images))} by image_column"
            )
        return images[0] if images else None

    def columns(self) -> dict[str, pa.DataType]:
        """The suffixes of the members of all tars."""
        suffixes = set[str]()
        for path in self.files.values():
            with open_named(path, KIND) as stream:
                for sample in read_samples(stream, Counter()):
                    suffixes.update(sample.members)
        return {suffix: column_type(suffix) for suffix in sorted(suffixes)}

    def fetch(self, ids: Sequence[str], places: Sequence[int], columns: Sequence[str]) -> Answers:
        """Read samples by the offsets of their first members."""
        answers: Answers = []
        names = {escape(name): name for name in self.files}
        for key, place in zip(ids, places, strict=True):
            # A key may hold slashes, and so may a name.
            heads = [key[:index] for index, letter in enumerate(key) if letter == "/" and key[:index] in names]
            answer: Item | str = CHANGED
            for head in heads:
                try:
                    answer = self._fetch_sample(names[head], key[len(head) + 1 :], place, columns)
                except Exception as error:
                    answer = reason_of(error)
                if not isinstance(answer, str):
                    break
            answers.append(answer)
        return answers

    def _fetch_sample(self, name: str, key: str, place: int, columns: Sequence[str]) -> Item | str:
        stream, size, modified = stamped(self.files[name], KIND, lambda stream: stream)
        if place >= size:
            return CHANGED
        stream.seek(place)
        sample = next(read_samples(stream, Counter()), None)
        if sample is None or sample.offset != place or escape(sample.key) != key:
            return CHANGED
        suffix = self._image_of(sample)
        if suffix is None:
            return CHANGED
        values = {}
        for column in columns:
            member = sample.members.get(column)
            content = None if member is None else _content(stream, member, MAX_SIDECAR)
            values[column] = None if content is None else column_value(content, column)
        image = sample.members[suffix]
        return Item(_content(stream, image, MAX_BYTES), image.size, modified, values)


def read_samples(stream: IO[bytes], skipped: Counter[str]) -> Iterator[Sample]:
    """Yield the samples of an open tar, from its position on.

    Args:
        stream: the tar.
        skipped: counts the members that are left out, by kind.
    Raises:
        tarfile.TarError, ValueError: the tar is truncated or corrupt.
    """
    sample: Sample | None = None
    with tarfile.TarFile(fileobj=stream, encoding="utf-8", errors="surrogateescape") as tar:
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # else it keeps a million of them
            kind = _kind_of(member)
            if kind is not None:
                skipped[kind] += 1
            if kind is not None or member.isdir():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if sample is None or key != sample.key:
                if sample is not None:
                    yield sample
                sample = Sample(key, member.offset, {})
            if suffix.lower() in sample.members:
                raise ValueError(f"{member.name!r} is there twice")
            sample.members[suffix.lower()] = member
        _check_end(stream, tar.offset)
    if sample is not None:
        yield sample


def _kind_of(member: tarfile.TarInfo) -> str | None:
    """The kind of a member that is left out; None for a file of a sample, and for a folder."""
    base = member.name.rpartition("/")[2]
    if member.isdir():
        return None
    if member.issym() or member.islnk():
        return "links"
    if member.issparse():
        return "sparse members"
    if not member.isreg():
        return "devices and FIFOs"
    return None if base.partition(".")[0] and "." in base else "members without a key and a suffix"


def _check_end(stream: IO[bytes], offset: int) -> None:
    """Check that a tar ends with zeros or the file. `tarfile` also ends, without a word, at a corrupt header."""
    stream.seek(offset)
    if stream.read(BLOCK).strip(b"\0"):
        raise ValueError(f"the header at byte {offset} is corrupt")


def _content(stream: IO[bytes], member: tarfile.TarInfo, limit: int) -> bytes:
    if member.size > limit:
        raise ValueError(f"larger than {limit // 2**20} MiB")
    stream.seek(member.offset_data)
    content = stream.read(member.size)
    if len(content) < member.size:
        raise ValueError("the tar ends within the member")
    return content


def _because(note: str | None) -> str:
    return f": {note}" if note else ""
