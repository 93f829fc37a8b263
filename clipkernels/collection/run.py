"""Embedding a collection: list the sources, compare, encode what is new or changed, compact.

Guarantees: an id is in DIR/embeddings once or not at all, at any moment and after any kill; a run that was killed goes
on with the same units; the bytes of a unit depend on its ids, the settings, the batch size and the threads alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from warnings import warn

import torch
from torch import nn

from clipkernels import __version__, adapters
from clipkernels.adapters import UnsupportedTower
from clipkernels.adapters.text import find_text_encoder
from clipkernels.adapters.tokenizers import Tokenizer
from clipkernels.arguments import check_calls, check_flags, check_int, check_model, check_path
from clipkernels.classifier import eval_mode
from clipkernels.collection import local_engine, ray_engine
from clipkernels.collection.encoder import Encoder
from clipkernels.collection.layout import OWN_COLUMNS, unit_schema
from clipkernels.collection.manifest import Manifest, Settings
from clipkernels.collection.packages import pyarrow
from clipkernels.collection.preparation import UnitItems
from clipkernels.collection.sources import Source, find_sources, list_items
from clipkernels.collection.store import Store
from clipkernels.collection.units import write_unit
from clipkernels.data import Preprocess
from clipkernels.encode import encode_image, tower_weight
from clipkernels.fingerprint import fingerprint
from clipkernels.images import Reader, image_shape
from clipkernels.methods import Dense
from clipkernels.patching import method_of
from clipkernels.support.features import encoder_of
from clipkernels.tower import make_plan

if TYPE_CHECKING:
    import pyarrow as pa

UNIT_ROWS = 1024
"""The items of a unit, rounded up to whole batches."""


class Name(NamedTuple):
    """The names that load a model from the command line, and its method's specification; None for one from Python."""

    library: str | None = None
    model: str | None = None
    pretrained: str | None = None
    method: str | None = None


class Progress(NamedTuple):
    """The items of a run that are done, all of its items, and the items without an embedding so far."""

    done: int
    total: int
    errors: int


class Embedded(NamedTuple):
    """The result of `embed`.

    encoded: items of this run that have an embedding now.
    errors: items of this run that have none; DIR/errors says why.
    embeddings, all_errors: rows of DIR/embeddings and of DIR/errors.
    vanished: rows whose item is not in the sources any more; they stay without `prune`.
    notes: lines about files that the sources left out and captions that were cut.
    stopped: true if the run was stopped before its end.
    """

    encoded: int
    errors: int
    embeddings: int
    all_errors: int
    vanished: int
    notes: tuple[str, ...]
    stopped: bool


def embed(
    model: nn.Module,
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    preprocess: Preprocess,
    tokenizer: Tokenizer | None = None,
    text: str | None = None,
    columns: Sequence[str] = (),
    image_column: str | None = None,
    id_column: str | None = None,
    batch_size: int = 32,
    unit_rows: int = UNIT_ROWS,
    workers: int = 0,
    raw: bool = False,
    dtype: Literal["float32", "float16"] | None = None,
    exif: bool = True,
    by_content: bool = False,
    prune: bool = False,
    retry: bool = False,
    compiled: bool = False,
    devices: Sequence[torch.device | str] | None = None,
    engine: Literal["local", "ray"] = "local",
    actors: int = 1,
    name: Name | None = None,
    progress: Callable[[Progress], bool | None] | None = None,
    report: Callable[[str], object] = warn,
) -> Embedded:
    """Embed the images of sources to Parquet, or bring a collection up to date.

    Only items that are new or changed are encoded. Images that cannot be read, and embeddings that are not finite, go
    to DIR/errors with their reason.

    Args:
        model: a model that `ck.encode_image` takes, patched or not, on one device and in one precision.
        sources: folders, globs, image files, text files of paths, Parquet files or folders of them, WebDataset tars,
            and datasets that `datasets` saved to disk.
        out: DIR, a new or empty folder, or a collection of the same settings.
        preprocess: a callable from a PIL image to a tensor (3,S,S). Loader processes pickle it.
        tokenizer: as in `ck.Classifier`; needed with `text`.
        text: the sources' column of captions, which are embedded beside the images.
        columns: further columns of the sources that are kept.
        image_column: the column of images in Parquet files and datasets; not needed if there is one candidate.
        id_column: the column of ids there; by default the path, or file and row.
        batch_size: images per forward.
        unit_rows: items of a unit, which is lost if the process is killed; rounded up to whole batches.
        workers: loader processes for each device; 0 decodes in this process.
        raw: keep the length of embeddings.
        dtype: of the embeddings in the files; by default float32 for a float32 model, else float16.
        exif: turn an image as its EXIF orientation says.
        by_content: a file has changed if its SHA-256 has; all files are read. By default, if its size or time has.
        prune: remove the rows of items that the sources do not have any more. All sources must be named.
        retry: try again what is in DIR/errors. A file that has changed is tried again anyway.
        compiled: compile the tower with `torch.compile`.
        devices: the devices that a copy of the model runs on each; by default, the one that it is on.
        engine: "local" for this process, "ray" for the cluster that RAY_ADDRESS names, or one of this machine.
        actors: models of the Ray engine.
        name: names for the manifest, by which `ck.search` loads the model again.
        progress: called after each batch, with the Ray engine after each unit; a true result stops the run.
        report: called with a line about what a reader should know.
    Returns:
        Embedded.
    Raises:
        ValueError: an id that is there twice, a source that holds no images or cannot be read, a folder of other
            settings or of something else, or one that another process writes.
        TypeError: an argument of another type.
        OSError: a file cannot be written.
        ImportError: pyarrow or ray is not installed.
    """
    check_model(model)
    check_path(out=out)
    check_calls(preprocess=preprocess, report=report)
    for argument, value, least in (("batch_size", batch_size, 1), ("unit_rows", unit_rows, 1), ("actors", actors, 1)):
        check_int(argument, value, least)
    check_int("workers", workers, 0)
    check_flags(raw=raw, exif=exif, by_content=by_content, prune=prune, retry=retry, compiled=compiled)
    if engine not in ("local", "ray"):
        raise ValueError(f"engine must be 'local' or 'ray', got {engine!r}")
    if dtype not in (None, "float32", "float16"):
        raise ValueError(f"dtype must be 'float32' or 'float16', got {dtype!r}")
    if text is not None and tokenizer is None:
        raise ValueError("text needs a tokenizer, got none")
    names = [os.fspath(source) for source in ([sources] if isinstance(sources, str | os.PathLike) else sources)]
    find = partial(find_sources, image_column=image_column, id_column=id_column)
    found = find(names)
    wanted = list(dict.fromkeys([*([text] if text is not None else []), *columns]))
    listing = list_items(found, wanted)
    kept = {column: listing.columns[column] for column in columns}
    _check_columns(kept)
    with eval_mode(model):
        settings, tokens = _settings(model, preprocess, Reader(exif), tokenizer if text else None, raw, dtype)
        settings = Settings(**settings, text=text, columns={column: str(kind) for column, kind in kept.items()})
        run = _Run(
            out=Path(out), model=model, preprocess=preprocess, tokenizer=tokenizer, settings=settings,
            schema=unit_schema(settings.width, settings.dtype, text is not None, kept), columns=wanted,
            batch_size=batch_size, workers=workers, compiled=compiled, devices=devices, engine=engine, actors=actors,
            progress=progress,
        )  # fmt: skip
        return run(found, listing, find, unit_rows, name, prune=prune, retry=retry, by_content=by_content)
