"""The allow-list of image formats, and the suffixes of their files."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

from PIL import Image, features

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
SIGNATURES = {
    "WEBP": rb"(?s)RIFF....WEBP",
    "JPEG2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "AVIF": rb"(?s)....ftypavi[fs]",
    "HEIF": rb"(?s)....ftyp(he[ivms][cxms]|mif1|msf1)",
}
"""Patterns of the first bytes of files in formats that may not be read."""


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
