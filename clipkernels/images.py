"""Image files: the one walker that finds them and the one reader that opens them.

The walker takes files with the suffix of a format that is read, follows linked folders, and skips hidden names. A link
to one of its own ancestors is skipped; a folder with two names is read under both.

The reader opens regular files of an allow-list of formats as 8-bit RGB. It turns an image as its EXIF orientation says
and drops alpha. 16-bit grey is shifted to 8 bits. A file of more than 512 MiB, an image of more pixels than Pillow's
limit and one with sides beyond 200 : 1 are refused. Whatever goes wrong with a file costs that file alone.
"""

from __future__ import annotations

import glob
import io
import os
import random
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, features
from PIL.ExifTags import Base
from torch import Tensor
from torch.utils.data import Dataset

FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heif", ".hif", ".heics", ".heifs"),
}
"""Pillow's names of the formats that are read, with their suffixes."""
OPTIONAL = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}
"""Formats that a Pillow may lack, with the names of their decoders in `PIL.features`."""
REMEDIES = dict.fromkeys(OPTIONAL, "install a Pillow that reads it") | {"HEIF": "install pillow-heif"}
MAX_BYTES = 512 * 2**20
MAX_RATIO = 200
"""The longer side of an image over the shorter one, at most."""
RULES = "1"
"""The version of the reader; it changes when a file gives other pixels than before."""
NO_EXIF = ", no EXIF"
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that undoes each EXIF orientation."""
RECURSIVE = re.compile(rf"(?:^|(?<=[/{re.escape(os.sep)}]))\*\*(?:[/{re.escape(os.sep)}]+|$)")
MAX_SUFFIXES_SHOWN = 8


class Found(NamedTuple):
    """Image files, and a count by suffix of the other files in their folders."""

    paths: list[str]
    others: Counter[str]

    @property
    def note(self) -> str | None:
        """One line that counts the other files and says how to read those that are images; None without any."""
        counts: dict[str, list[str]] = {}
        shown = sorted(self.others.items(), key=lambda item: (-item[1], item[0]))[:MAX_SUFFIXES_SHOWN]
        rest = self.others.total() - sum(count for _, count in shown)
        for suffix, count in [*shown, *([("of other kinds", rest)] if rest else [])]:
            name = next((name for name, suffixes in FORMATS.items() if suffix in suffixes), "")
            counts.setdefault(REMEDIES.get(name, "not images"), []).append(f"{count} {suffix}")
        return "skipped " + "; ".join(f"{', '.join(c)}: {why}" for why, c in counts.items()) if counts else None


@cache
def readable_formats() -> tuple[str, ...]:
    """The names in `FORMATS` that this Pillow reads; pillow-heif, if installed, is registered with Pillow."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    known = (name for name in FORMATS if name in Image.OPEN)
    return tuple(name for name in known if name not in OPTIONAL or features.check(OPTIONAL[name]))


def is_image_name(name: str) -> bool:
    """Return true if a file's name has the suffix of a format that is read and is not hidden."""
    return not name.startswith(".") and name.lower().endswith(_suffixes_of(readable_formats()))


@cache
def _suffixes_of(formats: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(suffix for form in formats for suffix in FORMATS[form])


def find_images(sources: Sequence[str]) -> Found:
    """The files named by files, folders and globs, in order; those of a folder or a glob are sorted.

    A file that is named, or matched by a glob, is taken whatever its name. A glob takes no hidden files and folders,
    unless it spells the dot.

    Raises:
        ValueError: a path that does not exist, a glob that matches nothing, a folder without images.
        OSError: a folder cannot be read.
    """
    found = Found([], Counter())
    for source in sources:
        matches = [source] if os.path.lexists(source) else sorted(_expand(source))
        if not matches:
            raise ValueError(f"expected a file, a folder or a glob, got {source!r}, which matches nothing")
        files: dict[str, None] = {}  # a glob may match a folder and the files in it
        for path in matches:
            if not os.path.isdir(path):
                files[path] = None
                continue
            below = images_below(path)
            if not below.paths:
                suffixes = ", ".join(FORMATS[name][0] for name in readable_formats())
                reason = f": {below.note}" if below.note else ""
                raise ValueError(f"expected images ({suffixes}, …), got none under {path!r}{reason}")
            files.update(dict.fromkeys(below.paths))
            found.others.update(below.others)
        found.paths.extend(files)
    return found


def images_below(folder: str, skip: Callable[[str], bool] | None = None) -> Found:
    """The image files below a folder, sorted.

    Args:
        folder: the folder.
        skip: of a folder's path: true leaves out a folder below this one.
    Raises:
        OSError: a folder cannot be read.
    """
    paths, others = [], Counter[str]()
    for path, names in walk(folder, skip):
        for name in names:
            if is_image_name(name):
                paths.append(os.path.join(path, name))
            else:
                suffix = os.path.splitext(name)[1].lower()
                others[suffix if re.fullmatch(r"\.\w{1,12}", suffix) else "without a suffix"] += 1
    return Found(sorted(paths), others)


def walk(folder: str, skip: Callable[[str], bool] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and the folders below it, links included, each with the names of its files; no hidden ones.

    A link to a folder above it is skipped, so the walk ends.
    """
    stack: list[tuple[str, tuple[str, ...]]] = [(folder, (os.path.realpath(folder),))]
    while stack:
        path, chain = stack.pop()
        names = []
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if not _is_folder(entry):
                    names.append(entry.name)
                    continue
                real = os.path.realpath(entry.path)
                if not any(_holds(real, visited) for visited in chain) and not (skip and skip(entry.path)):
                    stack.append((entry.path, (*chain, real)))
        yield path, names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return true for a folder or a link to one; most entries know it without a further call of the system."""
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def _holds(folder: str, path: str) -> bool:
    """Return true if a path is a folder or lies below it; both are real paths."""
    return path == folder or path.startswith(os.path.join(folder, ""))


def _expand(pattern: str) -> set[str]:
    """The matches of a glob; `**` stands for the folders that `walk` yields, because glob's own follows links round."""
    match = RECURSIVE.search(pattern)
    if match is None:
        return set(glob.glob(pattern))
    head, tail = pattern[: match.start()], pattern[match.end() :]
    folders = [path for path in (glob.glob(head) if head else [os.curdir]) if os.path.isdir(path)]
    if not tail:
        return set(folders)
    every = (path for folder in folders for path, _ in walk(folder))
    matches = {path for folder in every for path in _expand(os.path.join(glob.escape(folder), tail))}
    return matches if head else {os.path.normpath(path) for path in matches}


def draw_images(paths: Sequence[str], limit: int | None, seed: int | None) -> list[str]:
    """Return at most `limit` paths, drawn at random; a larger limit adds to the same draw.

    Args:
        paths: the paths to draw from.
        limit: the number of paths, or None for all.
        seed: of the order; None is 0 with a limit, and keeps the order of `paths` without one.
    """
    order = list(paths)
    if limit is not None or seed is not None:
        random.Random(seed or 0).shuffle(order)
    return order[:limit]


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file of at most 512 MiB. Nothing else is opened, because that may block or have effects.

    Raises:
        ValueError: a FIFO, a device, a socket or a folder, or a link to one; a larger file.
        OSError: the file cannot be opened.
    """
    _check_file(os.stat(path))
    return open(path, "rb", opener=_open_at_once)


def _open_at_once(path: str, flags: int) -> int:
    # The path may lead to a FIFO since the check; without O_NONBLOCK that would block.
    number = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    try:
        _check_file(os.fstat(number))
    except ValueError:
        os.close(number)
        raise
    return number


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file; raises as `open_regular`."""
    with open_regular(path) as file:
        return file.read(os.fstat(file.fileno()).st_size)  # no more, because files of /proc may be endless


def _check_file(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES // 2**20} MiB")


@dataclass(frozen=True)
class Reader:
    """Opens image files as RGB, under the rules of this module.

    Alpha is dropped: the colours of transparent pixels count.

    exif: turn an image as its EXIF orientation says, in every format that carries one. Pillow turns TIFF in any case.
    """

    exif: bool = True

    @property
    def rules(self) -> str:
        """The name of everything that determines the pixels of a file, for the keys of caches."""
        return RULES if self.exif else RULES + NO_EXIF

    @classmethod
    def of(cls, rules: str) -> Reader:
        """The reader that has these `rules`, or the one that comes nearest."""
        return cls(exif=not rules.endswith(NO_EXIF))

    def read(self, path: str | os.PathLike[str]) -> Image.Image:
        """The image of a file, upright, in mode RGB; of an animation, the first frame.

        Raises:
            ValueError, OSError: the file is refused or cannot be read.
            Exception: of any kind, as Pillow's decoders raise it for a broken file.
        """
        with open_regular(path) as file:
            return self.decode(file)

    def decode(self, file: IO[bytes]) -> Image.Image:
        """The image of an open file, as `read`."""
        try:
            image = Image.open(file, formats=readable_formats())
        except UnidentifiedImageError:
            raise ValueError("not an image (no format that is read)") from None
        with image:
            _check_size(*image.size)
            image.load()
            turn = _turn(image) if self.exif else None
            picture = _to_8_bits(image).convert("RGB")
        return picture if turn is None else picture.transpose(turn)

    def prepare(
        self, file: str | os.PathLike[str] | bytes, preprocess: Callable[[Image.Image], Tensor]
    ) -> Tensor | str:
        """A file, or its content, as preprocessed tensor (3,S,S), or the reason why there is none, in one line."""
        try:
            image = self.decode(io.BytesIO(file)) if isinstance(file, bytes) else self.read(file)
        except Exception as error:
            return reason_of(error)
        try:
            pixels = preprocess(image)
        except Exception as error:
            return f"preprocessing failed ({reason_of(error)})"
        return pixels if isinstance(pixels, Tensor) else f"preprocessing gave no tensor but a {type(pixels).__name__}"


def _check_size(width: int, height: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(f"{width}×{height} pixels, more than Pillow's limit of {limit}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"{width}×{height} pixels, sides beyond {MAX_RATIO}:1")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The transposition that turns an image upright; None if it is upright, or if its EXIF orientation is unreadable.

    `ImageOps.exif_transpose` would also write the other tags back, and fail for a broken one.
    """
    try:
        return TURNS.get(image.getexif().get(Base.Orientation, 1))
    except Exception:  # Pillow's parsers raise exceptions of many kinds
        return None


def _to_8_bits(image: Image.Image) -> Image.Image:
    """A deep grey image with 8 bits, others unchanged; Pillow would clip it to white or black.

    Raises:
        ValueError: values whose range is unknown: integers outside 0 to 65535, floats outside 0 to 1.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # NaN included
            raise ValueError(f"grey floats from {low} to {high}, expected 0 to 1")
        return Image.fromarray((values * 255).round().astype(np.uint8))
    if not (low >= 0 and high <= 65535):
        raise ValueError(f"grey integers from {low} to {high}, expected 0 to 65535")
    bits = 16
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # those two have 16 bits in this mode
        bits = 8 if high <= 255 else 16
    elif image.mode != "I":
        bits = 12 if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,) else 16
        white_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        if white_is_zero:  # Pillow inverts 8 bits only
            values = (1 << bits) - 1 - values
    return Image.fromarray((values >> (bits - 8)).astype(np.uint8))


class Loaded(NamedTuple):
    """A batch: indices and images (B,3,S,S) of the readable files, index and reason of the others."""

    indices: list[int]
    images: Tensor | None
    failed: list[tuple[int, str]]


class Pictures(Dataset[tuple[int, Tensor | str]]):
    """Preprocessed images (3,S,S) by index, or the reason why there is none."""

    def __init__(self, paths: Sequence[str], preprocess: Callable[[Image.Image], Tensor], *, exif: bool = True) -> None:
        self.paths, self.preprocess, self.reader = paths, preprocess, Reader(exif)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        return index, self.reader.prepare(self.paths[index], self.preprocess)


def collate(items: Sequence[tuple[int, Tensor | str]]) -> Loaded:
    """Stack the images of a batch, apart from the files that could not be read."""
    good = [(index, image) for index, image in items if isinstance(image, Tensor)]
    failed = [(index, reason) for index, reason in items if isinstance(reason, str)]
    images = torch.stack([image for _, image in good]) if good else None
    return Loaded([index for index, _ in good], images, failed)


def skip_message(path: str, reason: str) -> str:
    """Return the line that reports a file that is left out."""
    return f"skipped {path}: {reason}"


def reason_of(error: Exception) -> str:
    """Return why a file was not read, in one line without its name."""
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def first_line(error: Exception) -> str:
    """Return an exception's message in one line of at most 200 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
