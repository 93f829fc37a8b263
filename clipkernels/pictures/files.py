"""Files of pictures, their colours and their letters."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from clipkernels.files import atomic_write

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_SIDES = {"JPEG": 65_500, "WEBP": 16_383}  # pixels
PAPER, INK, GREY = (255, 255, 255), (20, 20, 20), (225, 225, 225)
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless the name of a picture ends like a format that is written."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"expected a picture that ends in {', '.join(SUFFIXES)}, got {path}")


def save_picture(picture: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a picture, atomically, in the format that the name ends in.

    Raises:
        ValueError: another format, or a picture that is too large for it.
        OSError: the file cannot be written.
    """
    check_suffix(path)
    form = SUFFIXES[Path(path).suffix.lower()]
    limit = MAX_SIDES.get(form)
    if limit is not None and max(picture.size) > limit:
        actual = f"{picture.width} x {picture.height}"
        raise ValueError(f"expected sides of at most {limit} pixels for {form}, got {actual}: write a .png")
    with atomic_write(path) as temporary:
        picture.save(temporary, form)


def font_of(size: float) -> Font:
    """Pillow's own font in a size in pixels; its bitmap font, of one size, where Pillow has no FreeType."""
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError):  # before Pillow 10.1, or without FreeType
        return ImageFont.load_default()


def fit(text: str, font: Font, width: float) -> str:
    """A text whose start is left out if it is wider than `width` pixels, because names differ at the end."""
    if font.getlength(_drawable(text, font)) <= width:
        return text
    while text and font.getlength(_drawable(f"...{text}", font)) > width:
        text = text[1:]
    return f"...{text}"


def write(pen: ImageDraw.ImageDraw, font: Font, at: tuple[float, float], text: str) -> None:
    """Write lines; characters that the font lacks become question marks where Pillow has a bitmap font alone."""
    pen.multiline_text(at, _drawable(text, font), fill=INK, font=font)


def _drawable(text: str, font: Font) -> str:
    return text if isinstance(font, ImageFont.FreeTypeFont) else text.encode("latin-1", "replace").decode("latin-1")
