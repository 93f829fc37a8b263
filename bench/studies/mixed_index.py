"""Study what token reduction does to a search: queries and index encoded by different methods.

    python -m bench.studies.mixed_index --images cifar10-val.tar.gz --out mixed-index.csv

The bundled CLIP embeds photographs densely and with each method. One in ten is a query. For each pairing, `neighbours`
is the share of the dense search's ten nearest images that are found, `first` the share of queries with the same nearest
image, and `precision` the share of the ten nearest images that have the query's class.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich import print
from torch import Tensor
from torch.nn.functional import normalize

import clipkernels as ck
from bench.result_files import header_of, write
from bench.studies.ranking import preprocess_photos
from bench.studies.tiny_clip import read

METHODS: dict[str, ck.Method] = {
    "ToMe(r=4)": ck.ToMe(4),
    "ToMe(r=7)": ck.ToMe(7),
    "EViT(keep=0.7)": ck.EViT(0.7),
    "TCA(rate=0.1)": ck.TCA(0.1),
}
NEIGHBOURS = 10
EVERY = 10
"""One photograph in so many is a query."""


def main() -> None:
    arguments = parse()
    photos = preprocess_photos(read(arguments.images)[0], arguments.limit)
    dense = embed(photos.images, None)
    reference = search(dense, dense)
    rows = [{"method": "dense", "query": "dense", "index": "dense", **compare(reference, reference, photos.labels)}]
    for name, method in METHODS.items():
        reduced = embed(photos.images, method)
        pairs = (("dense", "reduced"), ("reduced", "dense"), ("reduced", "reduced"))
        features = {"dense": dense, "reduced": reduced}
        for query, index in pairs:
            found = search(features[query], features[index])
            row = {"method": name, "query": query, "index": index, **compare(found, reference, photos.labels)}
            rows.append(row)
            print(row)
    if arguments.out:
        write(rows, header_of(arguments, "limit"), arguments.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR|FILE.tar.gz", help="a sub-folder per class")
    parser.add_argument("--limit", type=int, default=5000, help="photographs, drawn at random; default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="the rows; FILE.json adds the environment")
    return parser.parse_args()


@torch.inference_mode()
def embed(images: Tensor, method: ck.Method | None) -> Tensor:
    """Return the L2-normalised embeddings (n,E) of the bundled CLIP, patched with a method."""
    model = ck.bundled()[0]
    if method is not None:
        ck.patch(model, method)
    return normalize(torch.cat([ck.encode_image(model, part).embedding for part in images.split(250)]))


def search(queries: Tensor, index: Tensor) -> Tensor:
    """Return the rows (q,10) of the index that are nearest to every tenth image; the image itself is left out."""
    rows = torch.arange(0, len(index), EVERY)
    similarity = queries[rows] @ index.T
    similarity[:, rows] = -1
    return similarity.topk(NEIGHBOURS).indices


def compare(found: Tensor, reference: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return the figures of a search, against the dense one."""
    same = (found[:, :, None] == reference[:, None, :]).any(2).double().mean()
    classes = labels[::EVERY][:, None] == labels[found]
    return {
        "neighbours": round(float(same), 3),
        "first": round(float((found[:, 0] == reference[:, 0]).double().mean()), 3),
        "precision": round(float(classes.double().mean()), 3),
    }


if __name__ == "__main__":
    main()
