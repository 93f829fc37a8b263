"""Study the choice of a method: what each one changes in classification, in search, and in the search for duplicates.

    python -m bench.studies.choosing --images cifar10-val.tar.gz --out choosing.csv
    python -m bench.studies.choosing … --tower "EViT(keep=0.7) recovered=towers/evit"    # and folders of ck.save

The bundled CLIP embeds photographs densely and with each method. Three files are written:

- choosing.csv: a row per method with its GMACs as executed, its cosines to dense, and its zero-shot accuracy.
- choosing-search.csv: queries and index encoded alike or differently, in galleries of all photographs and of random
  halves, quarters and tenths. Each photograph is a query. `recall_at_1` is the share of queries that find themselves
  first. The other figures leave the query out of the gallery: `neighbours` is the share of the dense search's ten
  nearest that are among the ten nearest, `first` the share of queries with the same nearest photograph, `precision`
  the share of the ten nearest that have the query's class, and `precision_change` its difference to the dense search.
- choosing-dedup.csv: duplicates among all photographs and re-encoded copies of some (`bench.studies.copies`).

`_low` and `_high` are the ends of 95 % bootstrap intervals over the queries, paired where dense is subtracted. They do
not include the choice of the gallery. Tenths are two of each quarter, so that galleries are nested.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import print
from torch import Tensor, nn

import clipkernels as ck
from bench.result_files import header_of, write
from bench.studies import copies
from bench.studies.bootstrap import interval
from bench.studies.recover import Judged, Photos, embed, judge
from bench.studies.tiny_clip import read
from clipkernels.measure.timing import gmacs_for, plan_for
from clipkernels.method_names import short_name
from clipkernels.support import photo

METHODS = (
    *(ck.ToMe(r) for r in (2, 4, 7, 10)),  # the last merges 57 tokens, as many as half of each block allows
    *(ck.EViT(keep) for keep in (0.9, 0.7, 0.5)),
    *(ck.TCA(rate) for rate in (0.05, 0.1)),
)
PAIRINGS = (("dense", "reduced"), ("reduced", "dense"), ("reduced", "reduced"))
NEIGHBOURS = 10
FIGURES = ("recall_at_1", "neighbours", "first", "precision", "precision_change")


class Hits(NamedTuple):
    """Of q queries: true where a query finds itself, and the rows (q,10) of its nearest photographs but itself."""

    itself: Tensor
    nearest: Tensor


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    photos, classes = read(arguments.images)
    pixels, labels = photos.images[: arguments.limit], torch.from_numpy(photos.labels[: arguments.limit])
    images, draws = torch.stack(list(Photos(pixels))), copies.draw(pixels, arguments.copies, arguments.seed)
    text = ck.support.class_embeddings(ck.bundled()[0], ck.bundled()[2], photo(classes))
    parts = galleries(len(images), arguments.seed)
    header = header_of(arguments, "limit", "copies", "seed", "threads") | {
        "towers": [name for name, _ in arguments.tower]
    }
    thresholds: dict[float, float] = {}
    tables: dict[str, list[dict[str, Any]]] = {"": [], "-search": [], "-dedup": []}
    for name, model in towers(arguments.tower):
        reduced, reencoded = embed(model, images), [embed(model, draw.images) for draw in draws]
        if name == "dense":
            dense, reference = reduced, judge(reduced, reduced, text, labels)
        tables[""].append(tower_row(name, model, judge(reduced, dense, text, labels), reference))
        print(tables[""][-1])
        tables["-search"] += search_rows(name, reduced, dense, labels, parts)
        tables["-dedup"] += copies.dedup_rows(name, reduced, dense, reencoded, draws, thresholds)
        for suffix, rows in tables.items() if arguments.out else ():
            write(rows, header, arguments.out.with_stem(arguments.out.stem + suffix))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR|FILE.tar.gz", help="a sub-folder per class")
    parser.add_argument("--limit", type=int, default=5000, help="photographs; default %(default)s")
    parser.add_argument("--copies", type=int, default=500, help="photographs of a draw; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of galleries and copies; default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default %(default)s")
    parser.add_argument(
        "--tower", action="append", default=[], type=saved_tower, metavar="NAME=FOLDER", help="of ck.save; repeatable"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="the rows; FILE.json adds the environment")
    return parser.parse_args()


def saved_tower(spelling: str) -> tuple[str, Path]:
    """Return the name and the folder of NAME=FOLDER, in which the name may have more signs of equality."""
    name, _, folder = spelling.rpartition("=")
    if name in ("", "dense"):
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER with another name than dense, got {spelling}")
    return name, Path(folder)


def towers(saved: Sequence[tuple[str, Path]]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the bundled CLIP densely, with each method, and the saved towers, with their names.

    Raises:
        SystemExit: a saved tower whose embeddings have another width.
    """
    yield "dense", ck.patch(ck.bundled()[0], ck.Dense())
    for method in METHODS:
        yield short_name(method), ck.patch(ck.bundled()[0], method)
    width = ck.tower_of(ck.bundled()[0]).out
    for name, folder in saved:
        model = ck.load(folder).model
        if ck.tower_of(model).out != width:
            raise SystemExit(f"error: expected embeddings of width {width}, got {ck.tower_of(model).out} from {folder}")
        yield name, model


def tower_row(name: str, model: nn.Module, judged: Judged, dense: Judged) -> dict[str, Any]:
    """Return the row of a tower: its cost, its cosines to dense, and its accuracy."""
    tower, method = ck.tower_of(model), ck.method_of(model) or ck.Dense()
    plan, figures = plan_for(tower, method), judged.figures()
    correct = np.stack([judged.correct.numpy(), judged.correct.double().numpy() - dense.correct.double().numpy()], 1)
    return {
        "method": name,
        "tokens": plan.tokens[-1],
        "gmacs_run": round(gmacs_for(tower, plan, exact=True), 5),
        "cosine": round(figures["cosine"], 5),
        "cosine_p1": round(figures["cosine_p1"], 5),
        **with_interval(("accuracy", "accuracy_change"), correct),
    }


def galleries(count: int, seed: int) -> dict[int, list[Tensor]]:
    """Return disjoint random sets of `count` photographs, by size: all, halves, quarters, and two tenths of each."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    quarters, tenth = order.chunk(4), count // 10
    parts = [order], order.chunk(2), quarters, [quarter[at : at + tenth] for quarter in quarters for at in (0, tenth)]
    return {len(sets[0]): list(sets) for sets in parts}


def search_rows(
    name: str, reduced: Tensor, dense: Tensor, labels: Tensor, parts: dict[int, list[Tensor]]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a tower by pairing and gallery; of the dense one by gallery."""
    features = {"dense": dense, "reduced": reduced}
    for query, index in (("dense", "dense"),) if name == "dense" else PAIRINGS:
        for size, sets in parts.items():
            values = [
                compare(
                    search(features[query][rows], features[index][rows]),
                    search(dense[rows], dense[rows]),
                    labels[rows],
                )
                for rows in sets
            ]
            row = {"method": name, "query": query, "index": index, "gallery": size, "galleries": len(sets)}
            yield row | with_interval(FIGURES, torch.cat(values).numpy())


def search(queries: Tensor, index: Tensor) -> Hits:
    """Return the hits of queries (n,E) in an index (n,E) that has the same photographs in the same order."""
    similarity = queries @ index.T
    itself = (similarity <= similarity.diagonal()[:, None]).all(1)
    return Hits(itself, similarity.fill_diagonal_(-torch.inf).topk(NEIGHBOURS).indices)


def compare(hits: Hits, dense: Hits, labels: Tensor) -> Tensor:
    """Return the figures (n,5) fp64 of the queries, beside the dense search."""
    same = (hits.nearest[:, :, None] == dense.nearest[:, None]).any(2).double().mean(1)
    first = hits.nearest[:, 0] == dense.nearest[:, 0]
    precision, before = ((labels[:, None] == labels[found.nearest]).double().mean(1) for found in (hits, dense))
    return torch.stack([hits.itself.double(), same, first.double(), precision, precision - before], 1)


def with_interval(names: tuple[str, ...], values: np.ndarray) -> dict[str, float]:
    """Return the means of values (n,k), by name, each with the ends of its interval."""
    low, high = interval(values)
    columns: dict[str, float] = {}
    for name, *figures in zip(names, values.mean(0), low, high, strict=True):
        keys = (name, f"{name}_low", f"{name}_high")
        columns |= {key: round(float(value), 4) for key, value in zip(keys, figures, strict=True)}
    return columns


if __name__ == "__main__":
    main()
