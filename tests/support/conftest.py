"""Fixtures of support sets, found by every test here."""

from tests.support.fixtures import bundled, drawn, encoded, photos

__all__ = ["bundled", "drawn", "encoded", "photos"]
