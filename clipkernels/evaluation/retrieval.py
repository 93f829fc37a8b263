"""Retrieval between images and their captions by one method: recall at 1, 5 and 10 in both directions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkernels.evaluation.captions import Captions
from clipkernels.evaluation.datasets import Items
from clipkernels.evaluation.features import key_of, split_key
from clipkernels.evaluation.results import RETRIEVAL, read_rows, write_scores
from clipkernels.evaluation.run import Run
from clipkernels.evaluation.scores import score
from clipkernels.images import Reader
from clipkernels.methods import Method

RANKS = (1, 5, 10)
BLOCK = 1024
"""Queries whose similarities are in memory at once."""


def score_captions(run: Run, name: str, captions: Captions, method_name: str, method: Method | None) -> None:
    """Add the rows of a retrieval by one method to the results of a run; scores that are on disk are read."""
    items = Items(captions.names, (0,) * len(captions.names), Reader().read)
    key = key_of(name, split_key(items), captions.texts, captions.image_of, repr(method))
    file = run.folder / f"row-{key}.json"
    if not file.exists():
        with run.as_method(method):
            images = run.features(name, "images", items, (), method_name, method)
        prompts = {f"caption {number}": [text] for number, text in enumerate(captions.texts, 1)}
        texts = run.encode_texts(f"captions {name}", f"{name}, captions", "caption", prompts)
        row_of = torch.full((len(captions.names),), -1)
        row_of[images.places] = torch.arange(len(images))
        image_of = row_of[torch.tensor(captions.image_of)]
        readable = image_of >= 0
        directions = {"text to image": text_hits, "image to text": image_hits}
        scores = {
            f"{direction} R@{rank}": score(hits[None])
            for direction, find in directions.items()
            for rank, hits in zip(RANKS, find(images.embedding, texts[readable], image_of[readable]), strict=True)
        }
        write_scores(file, scores, {"images": images.unread} if images.unread else {}, "")
    run.results.rows.extend(read_rows(file, name, method_name, RETRIEVAL, 0))


@torch.inference_mode()
def text_hits(images: Tensor, texts: Tensor, image_of: Tensor) -> Tensor:
    """The texts (3,m) whose own image is among the 1, 5 and 10 most similar ones; ties go to the lower index.

    Args:
        images: (n,E) embeddings, any length.
        texts: (m,E).
        image_of: (m,) int64, the image of each text.
    """
    places = _places(texts, images, lambda start, stop: image_of[start:stop, None])
    return torch.stack([places < rank for rank in RANKS])


@torch.inference_mode()
def image_hits(images: Tensor, texts: Tensor, image_of: Tensor) -> Tensor:
    """The images (3,n) with one of their own texts among the 1, 5 and 10 most similar ones; arguments as above.

    Images without a text are left out.
    """
    counts = torch.bincount(image_of, minlength=len(images))
    order, starts = image_of.argsort(stable=True), counts.cumsum(0) - counts
    captioned = counts > 0
    counts, starts = counts[captioned], starts[captioned]
    # Row i has the texts of image i, its last one repeated.
    own = order[starts[:, None] + torch.arange(int(counts.max())).minimum(counts[:, None] - 1)]
    places = _places(images[captioned], texts, lambda start, stop: own[start:stop])
    return torch.stack([places < rank for rank in RANKS])


def _places(queries: Tensor, gallery: Tensor, targets: Callable[[int, int], Tensor]) -> Tensor:
    """The place (q,) of the best target of each query in the gallery, 0 for the most similar.

    Args:
        queries: (q,E) embeddings.
        gallery: (g,E).
        targets: a function from a range of queries to their targets (·,t) int64.
    """
    queries, gallery = normalize(queries.float(), dim=1), normalize(gallery.float(), dim=1)
    places = []
    for start in range(0, len(queries), BLOCK):
        similarity = queries[start : start + BLOCK] @ gallery.T
        own = targets(start, start + BLOCK)
        values = similarity.gather(1, own)
        best = values.amax(1, keepdim=True)
        first = own.masked_fill(values < best, len(gallery)).amin(1, keepdim=True)
        ahead = (similarity == best) & (torch.arange(len(gallery)) < first)
        places.append(((similarity > best) | ahead).sum(1))
    return torch.cat(places)
