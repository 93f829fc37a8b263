"""Image files: the one walker that finds them and the one reader that opens them."""

from clipkernels.images.batches import Loaded, Pictures, collate, image_shape, to_rgb
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
    "Loaded",
    "Pictures",
    "Reader",
    "collate",
    "draw_images",
    "find_images",
    "image_shape",
    "images_below",
    "images_by_folder",
    "is_image_name",
    "names_in",
    "no_images",
    "read_bytes",
    "readable_formats",
    "to_rgb",
    "walk",
]
