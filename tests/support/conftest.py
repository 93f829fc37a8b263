"""Fixtures of support sets for every test of this folder."""

from tests.support.fixtures import bundled, digit_folder, encoded, photos

__all__ = ["bundled", "digit_folder", "encoded", "photos"]
