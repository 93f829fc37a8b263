"""Image files: the one walker that finds them and the one reader that opens them; neither imports torch."""

from clipkernels.images.formats import is_image_name, readable_formats
from clipkernels.images.reader import Reader, read_bytes
from clipkernels.images.walker import (
    Found,
    draw_images,
    find_images,
    images_below,
    images_by_folder,
    names_in,
    no_images,
    walk,
)

__all__ = [
    "Found",
    "Reader",
    "draw_images",
    "find_images",
    "images_below",
    "images_by_folder",
    "is_image_name",
    "names_in",
    "no_images",
    "read_bytes",
    "readable_formats",
    "walk",
]
