"""Embedding a collection: list the sources, compare, encode what is new or changed, compact.

Guarantees: an id is in DIR/embeddings once or not at all, at any moment and after any kill; a run that was killed goes
on with the same units; the bytes of a unit depend on its ids, the settings, the batch size and the threads alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple
from warnings import warn

import msgspec
import torch
from torch import nn

from clipkernels.adapters.tokenizers import Tokenizer
from clipkernels.arguments import (
    check_callable,
    check_calls,
    check_choice,
    check_flags,
    check_int,
    check_model,
    check_names,
    check_path,
    describe,
)
from clipkernels.classifier import eval_mode
from clipkernels.collection.checks import (
    check_apart,
    check_columns,
    check_devices,
    column_names,
    forgotten_sources,
    missing_sources,
    source_names,
)
from clipkernels.collection.engines import Progress, Run
from clipkernels.collection.layout import unit_schema
from clipkernels.collection.manifest import Manifest
from clipkernels.collection.preparation import UnitItems
from clipkernels.collection.settings import Name, notes_of, schedule_of, settings_of
from clipkernels.collection.sources import find_sources, list_items
from clipkernels.collection.sources.absent import find_planned
from clipkernels.collection.sources.content import changed_content
from clipkernels.collection.store import Store
from clipkernels.data import Preprocess
from clipkernels.images import Reader
from clipkernels.images.batches import image_shape
from clipkernels.messages import quantity

UNIT_ROWS = 1024
"""The items of a unit, rounded up to whole batches."""


class Embedded(NamedTuple):
    """The result of `embed`.

    encoded: items of this run that have an embedding now.
    errors: items of this run that have none; DIR/errors says why.
    embeddings, all_errors: rows of DIR/embeddings and of DIR/errors.
    vanished: rows whose item is not in the sources any more; they stay without `prune`. 0 unless all sources are named.
    notes: lines about files that the sources left out and captions that were cut.
    stopped: true if the run was stopped before its end.
    removed: rows that this run removed, with `prune`.
    """

    encoded: int
    errors: int
    embeddings: int
    all_errors: int
    vanished: int
    notes: tuple[str, ...]
    stopped: bool
    removed: int = 0


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
    forget: Sequence[str | os.PathLike[str]] = (),
    retry: bool = False,
    compiled: bool = False,
    devices: Sequence[torch.device | str] | None = None,
    engine: Literal["local", "ray"] = "local",
    actors: int = 1,
    name: Name | tuple[str | None, ...] | None = None,
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
        forget: sources of earlier runs that are not there any more. They need not be named; `prune` removes their rows.
        retry: try again what is in DIR/errors. A file that has changed is tried again anyway.
        compiled: compile the tower with `torch.compile`, on a CPU with frozen weights.
        devices: the devices that a copy of the model runs on each; by default, the one that it is on.
        engine: "local" for this process, "ray" for the cluster that RAY_ADDRESS names, or one of this machine.
        actors: models of the Ray engine.
        name: library, model, pretrained and method, as the command line spells them, for the manifest:
            `clipkernels search` loads the model by them.
        progress: called after each batch, with the Ray engine after each unit; a true result stops the run.
        report: called with a line about what a reader should know.
    Returns:
        Embedded.
    Raises:
        ValueError: an empty path, an id that is there twice, a source that holds no images or cannot be read, a folder
            that overlaps with a source, of other settings or of something else, or one that another process writes.
        TypeError: an argument of another type.
        OSError: a file cannot be written.
        ImportError: pyarrow or ray is not installed.
    """
    check_model(model)
    check_path(out=out)
    check_calls(preprocess=preprocess, report=report)
    check_callable(tokenizer=tokenizer, progress=progress)
    check_names(text=text, image_column=image_column, id_column=id_column)
    for argument, value, least in (("batch_size", batch_size, 1), ("unit_rows", unit_rows, 1), ("actors", actors, 1)):
        check_int(argument, value, least)
    check_int("workers", workers, 0)
    check_flags(raw=raw, exif=exif, by_content=by_content, prune=prune, retry=retry, compiled=compiled)
    check_choice("engine", engine, "local", "ray")
    check_choice("dtype", dtype, "float32", "float16", None)
    devices = check_devices(devices)
    if name is not None and not (isinstance(name, tuple) and len(name) <= len(Name._fields)):
        raise TypeError(f"name must be a tuple of {len(Name._fields)} names or None, got {describe(name)}")
    check_names(**{f"name's {field}": value for field, value in zip(Name._fields, name or (), strict=False)})
    if text is not None and tokenizer is None:
        raise ValueError("text needs a tokenizer, got none")
    names, columns = source_names(sources), column_names(columns)
    source_names(out, "out")
    paths = [os.path.abspath(source) for source in names]
    forgotten = forgotten_sources(forget, paths, prune)
    check_apart(out, names)
    find = partial(find_sources, image_column=image_column, id_column=id_column)
    wanted = list(dict.fromkeys([*([text] if text is not None else []), *columns]))
    listed, present, source_notes, types = list_items(find(names), wanted)
    check_columns(text, columns, types)
    kept = {column: types[column] for column in columns}
    name = Name(*(name or ()))
    with eval_mode(model):
        settings = settings_of(model, preprocess, Reader(exif), name, raw, dtype, text, kept)
        settings = msgspec.structs.replace(settings, image_column=image_column, id_column=id_column)
        encoder: dict[str, Any] = {
            "schema": unit_schema(settings.width, settings.dtype, text is not None, kept),
            "batch_size": batch_size, "normalised": not raw, "text": text, "tokenizer": tokenizer, "compiled": compiled,
        }  # fmt: skip
        notes = notes_of(model, batch_size, compiled)
        manifest = Manifest(
            settings=settings, sources=paths, spec=name.method, schedule=schedule_of(model),
            run={**notes, "engine": engine},
        )  # fmt: skip
        rows = -(-unit_rows // batch_size) * batch_size
        with Store(out, manifest, encoder["schema"], rows, forgotten=forgotten, complete=prune) as store:
            changed = partial(changed_content, present) if by_content else None
            items = partial(
                UnitItems, Path(os.path.abspath(out)), settings.digest, columns=wanted, preprocess=preprocess,
                shape=image_shape(model, preprocess), exif=exif,
            )  # fmt: skip
            run = Run(store, model, encoder, notes, progress)
            vanished = removed = dropped = 0
            all_named = not missing_sources(store.folder, paths)
            while True:
                diff = store.plan(listed, prune=prune, retry=retry, changed=changed)
                if not diff.resumed:  # the file of the plan holds the items from here on
                    listed = listed.schema.empty_table()
                if all_named and not prune:
                    vanished = diff.vanished or vanished
                if not run.stopped:
                    removed, dropped = removed + dropped, diff.dropped
                if diff.damaged:
                    report(f"{quantity(diff.damaged, 'unit')} of an earlier run were damaged and are encoded again")
                if diff.generation is None or run.stopped:
                    break
                planned = present if list(diff.sources) == paths else find_planned(diff.sources, find)
                unit_items = items(diff.generation, planned)
                if engine == "ray":
                    run.with_ray(unit_items, actors)
                else:
                    run.locally(unit_items, workers, devices)
            counts = store.counts
    cut = run.cut_texts
    notes_of_texts = [f"the tokenizer cut {quantity(cut, 'caption')}, too long for the text tower"] if cut else []
    return Embedded(
        run.done - run.errors, run.errors, counts.embeddings, counts.errors, vanished,
        (*source_notes, *notes_of_texts), run.stopped, removed,
    )  # fmt: skip
