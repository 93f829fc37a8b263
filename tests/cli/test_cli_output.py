"""Tables at the width of a terminal, and images that are drawn."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len
from rich.table import Table

from clipkernels.cli.parts.guesses import Guess, guess_writer
from clipkernels.cli.parts.output import PathCell, shorten, write_table
from clipkernels.images import draw_images


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("text", "columns", "expected"),
    [
        ("photos/cat.png", 14, "photos/cat.png"),
        ("photos/cats/0001.png", 13, "pho…/0001.png"),
        ("photos/cats/0001.png", 3, "…ng"),
        ("写真/猫/0001.png", 12, "写…/0001.png"),
        ("", 4, ""),
    ],
)
def test_a_long_text_loses_its_middle(text: str, columns: int, expected: str) -> None:
    assert shorten(text, columns) == expected
    assert cell_len(expected) <= columns


def test_paths_of_a_table_differ_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    write = guess_writer("table", stream)
    paths = [f"/home/somebody/photographs/of/the/holidays/in/a/deep/folder/{index:04}.png" for index in range(20)]
    for path in paths:
        write(Guess(path, [("container ship", 0.9), ("aircraft carrier", 0.1)], "container ship"))
    write(None)
    lines = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue()).splitlines()
    rows = [line for line in lines if ".png" in line]
    assert len(rows) == 20 and max(map(cell_len, lines)) <= 80
    assert all(f"{index:04}.png" in row and "/h" in row for index, row in enumerate(rows))


def test_a_table_outside_a_terminal_is_as_wide_as_its_content() -> None:
    stream, path = io.StringIO(), "x" * 500
    table = Table("path", "class")
    table.add_row(PathCell(path), "cat")
    write_table(table, stream)
    assert path in stream.getvalue()


def test_a_larger_draw_adds_to_a_smaller_one() -> None:
    paths = [str(number) for number in range(50)]
    assert draw_images(paths, None, None) == paths
    assert draw_images(paths, 5, None) == draw_images(paths, 20, 0)[:5] != paths[:5]
    assert sorted(draw_images(paths, None, 3)) == sorted(paths) != draw_images(paths, None, 3)
