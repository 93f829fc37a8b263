"""Embedding a collection: list the sources, compare, encode what is new or changed, compact.

Guarantees: an id is in DIR/embeddings once or not at all, at any moment and after any kill; a run that was killed goes
on with the same units; the bytes of a unit depend on its ids, the settings, the batch size and the threads alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast
from warnings import warn

import msgspec
import torch
from torch import nn

from clipkernels import __version__, adapters
from clipkernels.adapters import UnsupportedTower
from clipkernels.adapters.text import find_text_encoder
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
from clipkernels.collection import local_engine, ray_engine
from clipkernels.collection.checks import (
    check_all_named,
    check_apart,
    check_columns,
    check_devices,
    column_names,
    missing_sources,
    source_names,
)
from clipkernels.collection.encoder import Encoder
from clipkernels.collection.layout import unit_schema
from clipkernels.collection.manifest import Manifest, Settings
from clipkernels.collection.packages import pyarrow
from clipkernels.collection.preparation import UnitItems
from clipkernels.collection.sources import Source, find_sources, list_items
from clipkernels.collection.sources.absent import find_planned
from clipkernels.collection.store import Store
from clipkernels.collection.store.units import write_unit
from clipkernels.data import Preprocess
from clipkernels.encode import encode_image, tower_weight
from clipkernels.fingerprint import fingerprint
from clipkernels.images import Reader, image_shape
from clipkernels.messages import quantity
from clipkernels.methods import Dense
from clipkernels.patching import method_of
from clipkernels.support.features import THREADS, encoder_of
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
    vanished: rows whose item is not in the sources any more; they stay without `prune`. 0 unless all sources are named.
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
        retry: try again what is in DIR/errors. A file that has changed is tried again anyway.
        compiled: compile the tower with `torch.compile`.
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
        ValueError: an id that is there twice, a source that holds no images or cannot be read, a folder that overlaps
            with a source, of other settings or of something else, or one that another process writes.
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
    check_apart(out, names)
    find = partial(find_sources, image_column=image_column, id_column=id_column)
    wanted = list(dict.fromkeys([*([text] if text is not None else []), *columns]))
    listing = list_items(find(names), wanted)
    check_columns(text, columns, listing.types)
    kept = {column: listing.types[column] for column in columns}
    name = Name(*(name or ()))
    with eval_mode(model):
        settings = _settings(model, preprocess, Reader(exif), name, raw, dtype, text, kept)
        settings = msgspec.structs.replace(settings, image_column=image_column, id_column=id_column)
        encoder: dict[str, Any] = {
            "schema": unit_schema(settings.width, settings.dtype, text is not None, kept),
            "batch_size": batch_size, "normalised": not raw, "text": text, "tokenizer": tokenizer, "compiled": compiled,
        }  # fmt: skip
        notes = _notes(model, batch_size, compiled)
        paths = [os.path.abspath(source) for source in names]
        manifest = Manifest(settings=settings, sources=paths, spec=name.method, run={**notes, "engine": engine})
        rows = -(-unit_rows // batch_size) * batch_size
        with Store(out, manifest, encoder["schema"], rows) as store:
            if prune:
                check_all_named(store.folder, paths)
            changed = partial(_changed_content, listing.sources) if by_content else None
            items = partial(
                UnitItems, Path(os.path.abspath(out)), columns=wanted, preprocess=preprocess,
                shape=image_shape(model, preprocess), exif=exif,
            )  # fmt: skip
            run = _Run(store, model, encoder, notes, progress)
            vanished, all_named = 0, not missing_sources(store.folder, paths)
            while True:
                diff = store.plan(listing.table, prune=prune, retry=retry, changed=changed)
                if all_named and not prune:
                    vanished = diff.vanished or vanished
                if diff.damaged:
                    report(f"{quantity(diff.damaged, 'unit')} of an earlier run were damaged and are encoded again")
                if diff.generation is None or run.stopped:
                    break
                planned = listing.sources if list(diff.sources) == paths else find_planned(diff.sources, find)
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
        (*listing.notes, *notes_of_texts), run.stopped,
    )  # fmt: skip


class _Run:
    """The units of a run, encoded by an engine, and how far they are.

    Args:
        store: the collection.
        model: the model.
        encoder: the arguments of `Encoder` besides the model.
        notes: of each unit's file.
        progress: as in `embed`.
    """

    def __init__(
        self,
        store: Store,
        model: nn.Module,
        encoder: dict[str, Any],
        notes: dict[str, Any],
        progress: Callable[[Progress], bool | None] | None,
    ) -> None:
        self.store, self.model, self.encoder, self.progress = store, model, encoder, progress
        self.notes = {key: str(value) for key, value in notes.items()}
        self.done = self.errors = self.total = self.cut_texts = self._finished = 0
        self.stopped = False

    def locally(self, items: UnitItems, workers: int, devices: Sequence[torch.device | str] | None) -> None:
        """Encode the pending units in this process."""
        models = [self.model]
        if devices is not None:
            models = [deepcopy(self.model).to(device) for device in devices]
        encoders = [Encoder(model, **self.encoder) for model in models]

        def write(unit: int, table: pa.Table) -> None:
            write_unit(items.folder, items.generation, unit, table, self.notes)
            self._after_unit()

        local_engine.encode_units(items, encoders, self._pending(), workers, write, self._after_batch)
        self.cut_texts += sum(encoder.cut_texts for encoder in encoders)
        self.store.compact(final=True)

    def with_ray(self, items: UnitItems, actors: int) -> None:
        """Encode the pending units on a Ray cluster."""

        def after_unit(rows: int, errors: int, cut_texts: int) -> bool:
            self.cut_texts += cut_texts
            self._after_unit()
            return self._after_batch(rows, errors)

        ray_engine.encode_units(
            items, self.model, self._pending(), device=tower_weight(self.model).device, actors=actors,
            threads=torch.get_num_threads(), options=self.encoder, notes=self.notes, after_unit=after_unit,
        )  # fmt: skip
        self.store.compact(final=True)

    def _pending(self) -> list[tuple[int, int]]:
        rows = self.store.unit_lengths()
        units = [(unit, rows[unit]) for unit in self.store.pending()]
        self.total += sum(length for _, length in units)
        return units

    def _after_unit(self) -> None:
        """Compact when the finished units may complete a shard."""
        self._finished += 1
        if self._finished * self.store.unit_rows >= self.store.shard_rows:
            self._finished = 0
            self.store.compact(final=False)

    def _after_batch(self, rows: int, errors: int) -> bool:
        self.done += rows
        self.errors += errors
        if self.progress is not None and self.progress(Progress(self.done, self.total, self.errors)):
            self.stopped = True
        return self.stopped


def _settings(
    model: nn.Module,
    preprocess: Preprocess,
    reader: Reader,
    name: Name,
    raw: bool,
    dtype: Literal["float32", "float16"] | None,
    text: str | None,
    columns: Mapping[str, Any],
) -> Settings:
    """The settings of a run.

    Raises:
        UnsupportedTower: a model that `ck.encode_image` does not take, or without a text tower for captions.
    """
    about, weight = encoder_of(model, preprocess, reader), tower_weight(model)
    try:
        tower = adapters.find_tower(model)
        tokens = list(make_plan(method_of(model) or Dense(), tower, tower.num_tokens).tokens)
    except UnsupportedTower:  # a ResNet
        tokens = []
    if text is not None:
        find_text_encoder(model)
    shape = image_shape(model, preprocess)
    with torch.inference_mode():
        blank = torch.zeros(1, *shape, device=weight.device, dtype=weight.dtype)
        width = encode_image(model, blank).embedding.shape[1]
    return Settings(
        library=name.library, model=name.model, pretrained=name.pretrained,
        tower=about.tower, text_tower=None if text is None else fingerprint(model, "text"),
        method=about.method, tokens=tokens, precision=cast(Any, str(weight.dtype).removeprefix("torch.")),
        preprocess=about.preprocess, reader=about.reader,
        width=width, dtype=dtype or ("float32" if weight.dtype in (torch.float32, torch.float64) else "float16"),
        normalised=not raw, text=text, columns={column: str(kind) for column, kind in columns.items()},
    )  # fmt: skip


def _notes(model: nn.Module, batch_size: int, compiled: bool) -> dict[str, Any]:
    """The circumstances of a run that may change the last bits of an embedding."""
    return {
        "batch_size": batch_size, "threads": torch.get_num_threads(), "compiled": compiled,
        "device": tower_weight(model).device.type, "clipkernels": __version__, "torch": str(torch.__version__),
        "pyarrow": pyarrow().__version__,
    }  # fmt: skip


def _changed_content(sources: Sequence[Source], items: pa.Table) -> pa.Table:
    """The items whose content has another SHA-256 than their row, or cannot be read."""

    def differs(part: pa.RecordBatch) -> list[bool]:
        ids, places, digests = (part.column(name).to_pylist() for name in ("id", "place", "sha256"))
        changed = []
        for index, key, place, digest in zip(part.column("source").to_pylist(), ids, places, digests, strict=True):
            [item] = sources[index].fetch([key], [place], [])
            changed.append(isinstance(item, str) or sha256(item.content).hexdigest() != digest)
        return changed

    with ThreadPoolExecutor(THREADS) as pool:
        flags = [flag for part in pool.map(differs, items.to_batches(max_chunksize=64)) for flag in part]
    return items.filter(pyarrow().array(flags, pyarrow().bool_()))
