"""Pictures: what each method leaves of an image, drawn with Pillow."""

from clipkernels.pictures.files import SUFFIXES, check_suffix, save_picture
from clipkernels.pictures.show import Moves, draw_moves, measure_moves, show

__all__ = ["Moves", "SUFFIXES", "check_suffix", "draw_moves", "measure_moves", "save_picture", "show"]
