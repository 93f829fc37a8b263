"""Print the tables of docs/choosing.md and docs/embed.md from the results of `bench.studies.choosing`.

python -m bench.studies.choosing_tables bench/results/amd-epyc-2-cores
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.result_files import read_csv
from bench.studies.choosing import PAIRINGS

Row = dict[str, str]
EMBED_METHODS = ("ToMe(r=4)", "ToMe(r=7)", "EViT(keep=0.7)", "TCA(rate=0.1)")
"""The methods in the table of docs/embed.md."""
REDUCED_QUERY, BOTH_REDUCED = PAIRINGS[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with choosing.csv, choosing-search.csv and choosing-dedup.csv")
    for table in tables(parser.parse_args().folder).values():
        print("\n".join(table), end="\n\n")


def tables(folder: Path) -> dict[str, list[str]]:
    """Return the rows of each table in Markdown, without its head."""
    towers, search, dedup = (read_csv(folder / f"choosing{suffix}.csv") for suffix in ("", "-search", "-dedup"))
    dense, *reduced = towers
    hits: dict[tuple[str, str, str], list[Row]] = {}
    for row in search:  # from the largest gallery to the smallest
        hits.setdefault((row["method"], row["query"], row["index"]), []).insert(0, row)
    pairings = [(method, *pairing) for method in EMBED_METHODS for pairing in PAIRINGS]
    return {
        "cost": [cost_row(row, dense) for row in towers],
        "neighbours": [neighbours_row(row, hits) for row in reduced],
        "dedup": [dedup_row(row["method"], dedup) for row in towers],
        "embed": [pairing_row(*key, hits) for key in (("dense", "dense", "dense"), *pairings)],
    }


def cost_row(row: Row, dense: Row) -> str:
    """Return tokens, operations, cosines and accuracy of a method."""
    share = float(row["gmacs_run"]) / float(dense["gmacs_run"])
    cosines = f"{float(row['cosine']):.4f}, {float(row['cosine_p1']):.3f}"
    accuracy = "" if row is dense else change(row, "accuracy_change")
    cells = [row["tokens"], f"{100 * share:.0f} %", cosines, f"{percent(row, 'accuracy', 1)} %", accuracy]
    return line([name(row["method"]), *cells])


def neighbours_row(row: Row, hits: dict[tuple[str, str, str], list[Row]]) -> str:
    """Return what stays of the neighbours, from the smallest gallery to the largest."""
    figures = [(REDUCED_QUERY, key) for key in ("recall_at_1", "first", "neighbours")] + [(BOTH_REDUCED, "neighbours")]
    cells = [" · ".join(percent(each, key) for each in hits[(row["method"], *pairing)]) for pairing, key in figures]
    return line([name(row["method"]), f"{float(row['cosine']):.4f}", *cells])


def dedup_row(method: str, rows: Sequence[Row]) -> str:
    """Return threshold, precision and recall: at dense thresholds and at others, reduced and mixed."""
    cells = []
    for index in ("dense",) if method == "dense" else ("reduced", "mixed"):
        for choice in ("dense", "same"):
            for row in rows:
                if (row["method"], row["index"], row["chosen_for"], row["aim"]) == (method, index, choice, "0.99"):
                    threshold = row["threshold"].removeprefix("0")
                    cells.append(f"{threshold}: {percent(row, 'precision')}, {percent(row, 'recall')}")
    return line([name(method), *cells, *[""] * (4 - len(cells))])


def pairing_row(method: str, query: str, index: str, hits: dict[tuple[str, str, str], list[Row]]) -> str:
    """Return the neighbours and classes of a pairing in the largest gallery; the first of a method names it."""
    row, first = hits[(method, query, index)][-1], (query, index) in (PAIRINGS[0], ("dense", "dense"))
    figures = (f"{percent(row, 'neighbours')} %", f"{percent(row, 'precision', 1)} %")
    return line([name(method) if first else "", query, index, *figures])


def name(method: str) -> str:
    """Return a method as code, without what was done to its weights."""
    call, bracket, rest = method.partition(")")
    return f"`{call}{bracket}`{rest}" if bracket else method


def percent(row: Row, key: str, digits: int = 0) -> str:
    """Return a share in per cent."""
    return f"{100 * float(row[key]):.{digits}f}"


def change(row: Row, key: str) -> str:
    """Return a difference in points, with its interval."""
    middle, low, high = (100 * float(row[f"{key}{end}"]) for end in ("", "_low", "_high"))
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"


def line(cells: Sequence[str]) -> str:
    """Return a row of a table."""
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


if __name__ == "__main__":
    main()
