"""Tables at the width of a terminal, and images that are drawn."""

from __future__ import annotations

import io
import re
from functools import partial

import pytest
from rich.cells import cell_len
from rich.table import Table

import clipkernels.cli.check as check
import clipkernels.cli.parts.bench_tables as bench_tables
from clipkernels.cli.parts import demo_tables
from clipkernels.cli.parts.guesses import Guess, guess_writer
from clipkernels.cli.parts.output import PathCell, markdown_table, shorten, write_table
from clipkernels.comparison.towers import Row
from clipkernels.images import draw_images
from clipkernels.measure.fidelity import Fidelity
from clipkernels.measure.timing import Band, Speed


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


METHOD = "EViT(keep=0.7, blocks=(3, 6, 9))"
SPEED = Speed(
    METHOD, (577, 405, 285, 201), 120.34, 118.1, 1.52, Band(1.2345, 1.2, 1.3), 12345.6, Band(1.5, 1.4, 1.6),
    Band(0.98, 0.9, 1.1), "Dense()",
)  # fmt: skip
BENCHED = [
    Row("bf16", METHOD, mode, SPEED, Fidelity((0.9876, 0.9912), (0.9987, 0.9999), 0.912, finite=True), 123 << 20)
    for mode in ("eager", "reduce-overhead")
]
CHECKED = {
    "op": "prune_tokens_heads_fuse_norm",
    "shape": "small-no-prefix",
    "dtype": "bfloat16",
    "error": 1.2e-6,
    "allowed": 2.5e-6,
    "verdict": "ok",
}
TABLES = {
    "demo, speed": [demo_tables.draw_speed("a title", [demo_tables.Row("bundled", "fp32", SPEED, {}, None)])],
    "demo, accuracy": [
        demo_tables.draw_accuracy([demo_tables.Row("bundled", "fp32", SPEED, dict.fromkeys(("a", "b", "c"), 1.0), 1.0)])
    ],
    "bench, eager": [
        draw(BENCHED[:1]) for draw in (partial(bench_tables.draw_speed, "a title"), bench_tables.draw_fidelity)
    ],
    "bench, compiled": [
        draw(BENCHED) for draw in (partial(bench_tables.draw_speed, "a title"), bench_tables.draw_fidelity)
    ],
    "check, one backend": [check.draw_table([CHECKED | {"backend": "triton"}])],
    "check, two backends": [
        check.draw_table([CHECKED | {"shape": "L-14-336", "backend": name} for name in ("triton", "auto")])
    ],
}


@pytest.mark.parametrize("name", TABLES)
def test_every_cell_of_a_table_is_whole_at_80_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    for table in TABLES[name]:
        write_table(table, stream)
    text = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    assert max(map(cell_len, text.splitlines())) <= 80 and "…" not in text
    whole = {str(cell) for table in TABLES[name] for column in table.columns[1:] for cell in column.cells}
    assert all(cell in text for cell in whole)


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


def test_a_cell_cannot_break_a_row_of_markdown() -> None:
    assert markdown_table(["data", "score"], [["a|b\nc", "1"], ["d", "2"]]) == [
        "| data | score |",
        "|---|---|",
        r"| a\|b c | 1 |",
        "| d | 2 |",
    ]
