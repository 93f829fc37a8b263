"""Duplicates of photographs: mild re-encodings, and what a search for duplicates finds of them at its thresholds.

A draw copies some photographs, in thirds: through JPEG at a quality of 60 to 90, without the first row and column of
pixels and resized, or 5 % brighter. The collection holds all photographs, then the copies of a draw. As in `clipkernels
dedup`, pairs with a cosine of at least the threshold are connected, and of each group the first image is kept.
`precision` is the share of copies among the images that are not kept, and `recall` the share of copies that are not
kept. Photographs that resemble each other by nature count as errors. `cosine` is that of a copy and its photograph.

A threshold is the lowest one that keeps a precision on the first draw, itself and all above it; figures are the means
over the other draws. "dense" thresholds are chosen for dense embeddings, "same" ones for the row's method and index,
and "default" is that of `clipkernels dedup`. An index is "reduced" if all images are reduced, and "mixed" if the
photographs are dense and the copies reduced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

import clipkernels as ck
from bench.studies.bootstrap import interval
from bench.studies.corruptions import through_jpeg
from clipkernels.collection.duplicates import Forest

KINDS = ("jpeg", "crop", "brightness")
DRAWS = 3
DEFAULT = 0.96
THRESHOLDS = (*(n / 5000 for n in range(4999, 4899, -1)), DEFAULT)
"""From high to low: .9998 to .98 in steps of .0002, and the default."""
PRECISIONS = (0.99, 0.95)


class Draw(NamedTuple):
    """Preprocessed copies (c,3,S,S), their kinds (c,), and the photographs (c,) that they are of."""

    images: Tensor
    kinds: Tensor
    rows: Tensor


def draw(pixels: np.ndarray, count: int, seed: int) -> list[Draw]:
    """Return three draws with copies of `count` of the photographs (n,S,S,3) uint8; a photograph is in one at most.

    Raises:
        SystemExit: fewer photographs than the draws need.
    """
    if DRAWS * count > len(pixels):
        raise SystemExit(f"error: expected at most {len(pixels) // DRAWS} --copies of {len(pixels)} photographs")
    rng, preprocess = np.random.default_rng([seed, 1]), ck.bundled()[1]
    draws = []
    for rows in rng.permutation(len(pixels))[: DRAWS * count].reshape(DRAWS, count):
        kinds = np.arange(count) % len(KINDS)
        copies = [
            preprocess(reencoded(Image.fromarray(pixels[row]), KINDS[kind], rng))
            for row, kind in zip(rows, kinds, strict=True)
        ]
        draws.append(Draw(torch.stack(copies), torch.from_numpy(kinds), torch.from_numpy(rows)))
    return draws


def reencoded(image: Image.Image, kind: str, rng: np.random.Generator) -> Image.Image:
    """Return a copy of one of the three kinds; preprocessing resizes a cropped one."""
    if kind == "jpeg":
        return through_jpeg(image, int(rng.integers(60, 91)))
    if kind == "crop":
        return image.crop((1, 1, *image.size))
    return ImageEnhance.Brightness(image).enhance(1.05)


def dedup_rows(
    name: str,
    reduced: Tensor,
    dense: Tensor,
    copies: Sequence[Tensor],
    draws: Sequence[Draw],
    thresholds: dict[float, float],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a tower.

    Args:
        name: of the tower; "dense" comes first.
        reduced, dense: embeddings (n,E) of the photographs by the tower and by the dense one.
        copies: embeddings (c,E) of the copies of each draw by the tower.
        thresholds: those chosen for dense embeddings, by precision; filled by "dense".
    """
    collections = {"dense": dense} if name == "dense" else {"reduced": reduced, "mixed": dense}
    for index, photographs in collections.items():
        removed = [duplicates(torch.cat([photographs, part])) for part in copies]
        pairs = [(photographs[part.rows] * copy).sum(1) for part, copy in zip(draws[1:], copies[1:], strict=True)]
        cosine = round(float(torch.cat(pairs).double().mean()), 5)
        chosen = {aim: threshold_for(removed[0], len(photographs), aim) for aim in PRECISIONS}
        if name == "dense":
            thresholds |= chosen
        cases = [("dense", aim, thresholds[aim]) for aim in PRECISIONS]
        cases += [("same", aim, chosen[aim]) for aim in PRECISIONS if name != "dense"]
        for choice, aim, threshold in (*cases, ("default", None, DEFAULT)):
            at = THRESHOLDS.index(threshold)
            row = {"method": name, "index": index, "chosen_for": choice, "aim": aim, "threshold": threshold}
            parts = [each[at] for each in removed[1:]]
            yield row | figures(parts, [part.kinds for part in draws[1:]], len(photographs)) | {"cosine": cosine}


def duplicates(vectors: Tensor) -> Tensor:
    """Return, per threshold, true for the images (t,n) that are not the first of their group, given (n,E)."""
    similarity = (vectors @ vectors.T).triu_(1)
    first, second = (similarity >= min(THRESHOLDS)).nonzero(as_tuple=True)
    cosines, forest, rows = similarity[first, second], Forest(len(vectors)), torch.arange(len(vectors))
    removed, above = [], torch.inf
    for threshold in THRESHOLDS:
        step = (cosines >= threshold) & (cosines < above)
        forest.join(first[step], second[step])
        removed.append(forest.roots(rows) != rows)
        above = threshold
    return torch.stack(removed)


def precision_of(removed: Tensor, photographs: int) -> Tensor:
    """Return the share of copies among the images (…,n) that are not kept; 1 if all are kept."""
    copies, every = removed[..., photographs:].sum(-1), removed.sum(-1)
    return torch.where(every > 0, copies / every.clamp_min(1), 1.0)


def threshold_for(removed: Tensor, photographs: int, precision: float) -> float:
    """Return the lowest threshold that keeps a precision together with all above it; the highest if none does."""
    kept = (precision_of(removed, photographs) >= precision).long().cumprod(0)
    return THRESHOLDS[max(int(kept.sum()) - 1, 0)]


def figures(removed: Sequence[Tensor], kinds: Sequence[Tensor], photographs: int) -> dict[str, float]:
    """Return precision and recall over draws, recall with its interval over copies and by kind of copy."""
    found, kind = torch.cat([each[photographs:] for each in removed]).double(), torch.cat(list(kinds))
    precision = precision_of(torch.stack(list(removed)), photographs).mean()
    low, high = interval(found.numpy())
    values = {"precision": precision, "recall": found.mean(), "recall_low": low, "recall_high": high}
    values |= {f"recall_{name}": found[kind == at].mean() for at, name in enumerate(KINDS)}
    return {key: round(float(value), 4) for key, value in values.items()}
