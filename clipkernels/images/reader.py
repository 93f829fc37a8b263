"""The reader: image files as 8-bit RGB.

It opens regular files of an allow-list of formats. It turns an image as its EXIF orientation says and drops alpha.
16-bit grey is shifted to 8 bits. A file of more than 512 MiB, an image of more pixels than Pillow's limit and one with
sides beyond 200 : 1 are refused. Whatever goes wrong with a file costs that file alone.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError
from PIL.ExifTags import Base

from clipkernels.files import open_regular
from clipkernels.images.formats import REMEDIES, SIGNATURES, readable_formats
from clipkernels.messages import join_sizes, reason_of

if TYPE_CHECKING:
    from torch import Tensor

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
        with open_regular(path, MAX_BYTES) as file:
            return self.decode(file)

    def decode(self, file: IO[bytes]) -> Image.Image:
        """The image of an open file, as `read`."""
        try:
            image = Image.open(file, formats=readable_formats())
        except UnidentifiedImageError:
            raise ValueError(_unread_format(file)) from None
        with image:
            _check_size(*image.size)
            image.load()
            turn = _turn(image) if self.exif else None
            picture = _to_8_bits(image).convert("RGB")
        return picture if turn is None else picture.transpose(turn)

    def prepare(
        self, file: str | os.PathLike[str] | bytes, preprocess: Callable[[Image.Image], Tensor], shape: tuple[int, ...]
    ) -> Tensor | str:
        """A file, or its content, as preprocessed tensor of a `shape`, or the reason why there is none, in one line."""
        try:
            image = self.decode(io.BytesIO(file)) if isinstance(file, bytes) else self.read(file)
        except Exception as error:
            return reason_of(error)
        return preprocessed(image, preprocess, shape)


def preprocessed(
    image: Image.Image, preprocess: Callable[[Image.Image], Tensor], shape: tuple[int, ...]
) -> Tensor | str:
    """An image as preprocessed tensor of a `shape`, or the reason why there is none, in one line."""
    from torch import Tensor  # here, because the reader alone runs without torch

    try:
        pixels = preprocess(image)
    except Exception as error:
        return f"preprocessing failed ({reason_of(error)})"
    if not isinstance(pixels, Tensor):
        return f"preprocessing gave no tensor but a {type(pixels).__name__}"
    if tuple(pixels.shape) != shape:
        return f"preprocessing gave ({join_sizes(pixels.shape)}) instead of ({join_sizes(shape)})"
    return pixels


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of an image file, for `Reader.prepare`.

    Raises:
        ValueError, OSError: as `open_regular`.
    """
    with open_regular(path, MAX_BYTES) as file:
        return file.read(os.fstat(file.fileno()).st_size)  # no more, because files of /proc may be endless


def _unread_format(file: IO[bytes]) -> str:
    """The reason why no decoder takes a file, with a remedy if its first bytes are those of a known format."""
    file.seek(0)
    start = file.read(16)
    unread = (name for name in SIGNATURES if name not in readable_formats() and re.match(SIGNATURES[name], start))
    return next((f"{name}: {REMEDIES[name]}" for name in unread), "not an image (no format that is read)")


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
