"""The guesses of `clipkernels classify`: a table or JSON once all are there, CSV and JSON lines one by one."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

from rich.table import Table
from rich.text import Text

from clipkernels.cli.parts.output import PathCell, write_table

# Short enough to leave a path its room at 80 columns.
HEADINGS = {"probability": "prob.", "second_class": "second", "second_probability": "prob."}
SIGMOID_HEADINGS = {**HEADINGS, "probability": "sigmoid", "second_probability": "sigmoid"}


class Guess(NamedTuple):
    """The likeliest classes of one image, best first, with their probabilities, and its true class if known."""

    path: str
    best: list[tuple[str, float]]
    label: str | None

    def record(self, sigmoid: bool = False) -> dict[str, Any]:
        """Return the guess as one flat row: path, class and probability, then the second class if there are two.

        Sigmoids of a whole row may be tiny: they have six significant digits, a softmax six decimals.
        """
        row: dict[str, Any] = {"path": self.path}
        for prefix, (name, probability) in zip(("", "second_"), self.best, strict=False):
            rounded = float(f"{probability:.6g}") if sigmoid else round(probability, 6)
            row |= {prefix + "class": name, prefix + "probability": rounded}
        return row if self.label is None else {**row, "label": self.label}


def guess_writer(form: str, stream: TextIO, sigmoid: bool = False) -> Callable[[Guess | None], None]:
    """Return a function to call with each guess, then with None.

    "csv" and "jsonl" write each row at once; "table" and "json", a list of the rows, write at the end.

    Args:
        form: "table", "csv", "json" or "jsonl".
        stream: the stream that is written to.
        sigmoid: name the probabilities as sigmoids: in the headings of a table, in a column "probabilities" of others.
    """
    writer = csv.writer(stream, lineterminator="\n")
    records: list[dict[str, Any]] = []

    def write(guess: Guess | None) -> None:
        if guess is None:
            if form == "json":
                json.dump(records, stream, indent=2)
                stream.write("\n")
            elif form == "table" and records:
                write_table(_table(records, sigmoid), stream)
            return
        record = guess.record(sigmoid)
        if sigmoid and form != "table":
            record["probabilities"] = "sigmoid"
        if form == "csv":
            if not records:
                records.append(record)  # once, to know that the header is written
                writer.writerow(record)
            writer.writerow(record.values())
        elif form == "jsonl":
            stream.write(json.dumps(record) + "\n")
        else:
            records.append(record)
        stream.flush()

    return write


def _table(records: list[dict[str, Any]], sigmoid: bool) -> Table:
    """Return the records as a table."""
    headings = SIGMOID_HEADINGS if sigmoid else HEADINGS
    table = Table(*(headings.get(key, key) for key in records[0]))
    for record in records:
        cells = [f"{cell:.4{'g' if sigmoid else 'f'}}" if isinstance(cell, float) else cell for cell in record.values()]
        table.add_row(PathCell(cells[0]), *map(Text, cells[1:]))
    return table
