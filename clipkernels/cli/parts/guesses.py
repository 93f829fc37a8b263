"""The guesses of `clipkernels classify`, written as they come: a table when it is whole, CSV or JSON lines at once."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

from rich.table import Table
from rich.text import Text

from clipkernels.cli.parts.output import write_table


class Guess(NamedTuple):
    """The likeliest classes of one image, best first, with their probabilities."""

    path: str
    best: list[tuple[str, float]]
    label: str | None

    def record(self) -> dict[str, Any]:
        """The guess as one flat row: path, class, probability, and the second of each where there are two classes."""
        row: dict[str, Any] = {"path": self.path}
        for prefix, (name, probability) in zip(("", "second_"), self.best, strict=False):
            row |= {prefix + "class": name, prefix + "probability": round(probability, 6)}
        return row if self.label is None else {**row, "label": self.label}


def writer(form: str, stream: TextIO) -> Callable[[Guess | None], None]:
    """What takes the guesses one by one, then None at the end: rows are written at once, a table when it is whole."""
    rows = csv.writer(stream, lineterminator="\n")
    table: list[dict[str, Any]] = []

    def write(guess: Guess | None) -> None:
        if guess is None:
            if form == "table" and table:
                whole = Table(*(column.replace("_", " ") for column in table[0]))
                for record in table:
                    cells = [f"{cell:.4f}" if isinstance(cell, float) else cell for cell in record.values()]
                    whole.add_row(*map(Text, cells))
                write_table(whole, stream)
            return
        record = guess.record()
        if form == "table":
            table.append(record)
        elif form == "csv":
            if not table:
                table.append(record)
                rows.writerow(record)
            rows.writerow(record.values())
        else:
            stream.write(json.dumps(record) + "\n")
        stream.flush()

    return write
