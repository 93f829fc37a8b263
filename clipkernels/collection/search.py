"""Search in a collection: the images that are most similar to a text or to an image."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipkernels.adapters.tokenizers import Tokenizer
from clipkernels.arguments import check_callable, check_calls, check_int, check_model, check_path, describe
from clipkernels.collection.index import nearest
from clipkernels.collection.manifest import Settings, read_manifest
from clipkernels.collection.query import (
    QueryImage,
    check_towers,
    encode_picture,
    encode_text,
    load_recorded,
    warn_of_method,
)
from clipkernels.collection.rows import list_shards, take_rows, value_columns, warn_of_unfinished
from clipkernels.data import Preprocess

ATTEMPTS = 3


class Hit(NamedTuple):
    """An image that a search found.

    rank: from 1.
    id: of the image.
    score: its cosine with the query.
    values: the other columns of its row: caption, sha256, width, height, and those of the source.
    """

    rank: int
    id: str
    score: float
    values: dict[str, Any]


def search(
    folder: str | os.PathLike[str],
    text: str | None = None,
    *,
    image: QueryImage | None = None,
    k: int = 20,
    model: nn.Module | None = None,
    preprocess: Preprocess | None = None,
    tokenizer: Tokenizer | None = None,
    device: torch.device | str | None = None,
) -> list[Hit]:
    """The images of a collection that are most similar to a text or to an image, most similar first.

    Every row of a finished shard is compared. Ties go to the row that comes first. The FAISS index of the rows is kept
    in the folder and made again when a shard has changed; if the folder cannot be written to, a warning says so.

    Args:
        folder: the folder that `clipkernels embed` made.
        text: the query, or None.
        image: the query: an image file, the content of one, or a PIL image; or None.
        k: hits; fewer, if the collection has fewer rows.
        model: the model that made the collection, patched with the method that made it, in eval mode or not. None loads
            the bundled model, or the folder of `ck.save` or of `ck.export` that `clipkernels embed` had as its model,
            with its method; and a `ck.Schedule` is recorded in the collection. Other methods of the bundled model are
            not known here.
        preprocess: a callable from a PIL image to a tensor (3,S,S); needed with a model and an image.
        tokenizer: as in `ck.Classifier`; needed with a model and a text.
        device: of a model that is loaded. A given model stays where it is.
    Returns:
        At most k hits.
    Raises:
        ValueError: no collection or a damaged one, both queries or neither, an image that cannot be read, a text for a
            model without a text tower, a model with another tower than the collection's, a query whose embedding is
            not finite, or a collection that another process changes all the time.
        OSError: a shard cannot be read.
        ImportError: pyarrow or FAISS is not installed.
    """
    check_path(folder=folder)
    check_int("k", k, 1)
    check_callable(preprocess=preprocess, tokenizer=tokenizer)
    if (text is None) == (image is None):
        raise ValueError(f"expected a text or an image, got {'neither' if text is None else 'both'}")
    if text is not None and (not isinstance(text, str) or not text.strip()):
        raise ValueError(f"expected a text that is not empty, got {describe(text)}")
    manifest = read_manifest(folder)
    settings = manifest.settings
    warn_of_unfinished(Path(folder))
    loaded = model is None
    if model is None:
        model, preprocess, tokenizer = load_recorded(manifest, device)
    elif device is not None:
        raise ValueError(f"expected no device with a model, which stays where it is, got {describe(device)}")
    check_model(model)
    check_towers(folder, settings, model, text is not None)
    if text is not None:
        if loaded and tokenizer is None:
            raise ValueError(f"expected {settings.model} to hold a tokenizer, got none: pass tokenizer= to ck.save")
        check_calls(tokenizer=tokenizer)
        assert tokenizer is not None
        query = encode_text(model, tokenizer, text)
    else:
        if loaded and preprocess is None:
            raise ValueError(
                f"expected {settings.model} to hold an image processor, got none: pass model and preprocess"
            )
        check_calls(preprocess=preprocess)
        assert preprocess is not None and image is not None
        warn_of_method(folder, settings, model)
        query = encode_picture(model, preprocess, image, settings.reader)
    return find_hits(Path(folder), settings, query, k)


def find_hits(folder: Path, settings: Settings, query: Tensor, k: int) -> list[Hit]:
    """The k hits of an embedding (E,); the rows are read again if a shard has changed in between."""
    if query.shape != (settings.width,):
        raise ValueError(f"expected a query of width {settings.width}, got {tuple(query.shape)}")
    if not query.isfinite().all() or not query.any():
        raise ValueError("expected a query whose embedding is finite and not zero, got another one")
    for _ in range(ATTEMPTS):
        shards = list_shards(folder)
        try:
            rows, scores = nearest(folder, shards, query, k, settings.width)
            columns = value_columns(folder, shards)
            records = take_rows(folder, shards, rows, ["id", *columns])
        except (OSError, ValueError, IndexError):
            if list_shards(folder) == shards:
                raise
            continue
        if list_shards(folder) == shards:
            pairs = zip(records, scores, strict=True)
            return [Hit(rank, record.pop("id"), score, record) for rank, (record, score) in enumerate(pairs, 1)]
    raise ValueError(f"expected a collection that nobody writes, got {folder}, which has changed {ATTEMPTS} times")
