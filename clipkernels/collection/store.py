"""The store of a collection: plans work, and puts finished units into shards, so that no row is lost or there twice.

Any step may be the last one before the process is killed; the same command goes on from the files alone.

    appended units   1 errors   their ids leave the table of errors, and their errors enter it
                     2 shard    the last shard is replaced by itself and their rows; its header names them
                     3          their files are deleted
    then, at the end of the plan
    replacing units  4 shards   each shard that holds rows of theirs or dropped ids is replaced, with the new rows in
    and dropped ids             place of the old ones
                     5 errors   dropped ids leave the table, and the errors of these units enter it
                     6          the plan is deleted, then the files of its units

Steps 1, 4 and 5 give the same files when they are done again; step 2 is not, because the header tells. A row enters
a shard only if its id is in no other, leaves with one replacement of a file, and is in a unit's file meanwhile.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from clipkernels.collection import units as unit_files
from clipkernels.collection.comparison import Changed, Comparison, compare
from clipkernels.collection.layout import EMBEDDINGS, ERRORS, INDEX, LOCK, MANIFEST, PLANS, SHARD_ROWS, UNITS
from clipkernels.collection.lock import Lock
from clipkernels.collection.manifest import Manifest, differences, read_manifest, write_manifest
from clipkernels.collection.packages import pyarrow
from clipkernels.collection.plans import (
    PlanHeader,
    plan_file,
    plan_generations,
    read_ids,
    read_items,
    read_plan,
    unit_lengths,
    write_plan,
)
from clipkernels.collection.replacement import Replacement
from clipkernels.collection.shards import (
    Shard,
    ShardHeader,
    append_units,
    known_rows,
    merge_errors,
    read_errors,
    read_shard,
    replace_rows,
    shard_numbers,
)

if TYPE_CHECKING:
    import pyarrow as pa

TEMPORARY = re.compile(r"\.(manifest\.json|[0-9-]+\.parquet)\.[a-z0-9_]{8}")
KNOWN_ROWS = 125_000
"""Known rows that are compared with a listing at a time."""


class Diff(NamedTuple):
    """The work of a plan, and the comparison that it comes from.

    generation: of the plan, whose units are to be encoded; None if nothing is to be done.
    resumed: an earlier run left the plan; call `Store.plan` again when it is finished.
    sources: names of the sources that the items' `source` counts; those of a resumed plan are its own.
    new, changed, retried, dropped: number of items and ids in the plan.
    failed, unchanged, vanished: number of errors that are not tried again, of items that stay, and of rows that are not
        listed; 0 for a resumed plan.
    damaged: number of units of the earlier run that are not as they were written, and are to be encoded again.
    """

    generation: int | None
    resumed: bool = False
    sources: tuple[str, ...] = ()
    new: int = 0
    changed: int = 0
    retried: int = 0
    dropped: int = 0
    failed: int = 0
    unchanged: int = 0
    vanished: int = 0
    damaged: int = 0


class Counts(NamedTuple):
    """The rows of a collection: items with an embedding, and errors."""

    embeddings: int
    errors: int


class Store:
    """A collection that this process writes; a context manager.

    Args:
        folder: a new or empty folder, or a collection of the same settings.
        manifest: the settings, and the sources of this run. Those of earlier runs are kept.
        schema: `layout.unit_schema` of the settings.
        unit_rows: the items of a unit, a multiple of the batch size.
        shard_rows: the rows from which on a shard is complete.
    Raises, on entering:
        ValueError: another process writes there, the settings differ, the folder holds something else, or a file of the
            collection is not as it was written.
        OSError: a file cannot be read or written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        manifest: Manifest,
        schema: pa.Schema,
        unit_rows: int,
        *,
        shard_rows: int = SHARD_ROWS,
    ) -> None:
        self.folder, self.manifest, self.schema = Path(folder), manifest, schema
        self.unit_rows, self.shard_rows = unit_rows, shard_rows
        self._planned = self._retried = False
        self._plan: PlanHeader | None = None

    def __enter__(self) -> Store:
        self.folder.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(self.folder)
        self._lock = Lock(self.folder)
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _open(self) -> None:
        manifest, settings = self.manifest, self.manifest.settings
        known = read_manifest(self.folder) if os.path.lexists(self.folder / MANIFEST) else None
        if known is not None:
            if known.settings != settings:
                raise ValueError(
                    f"expected the settings of {self.folder}, got others: "
                    f"{'; '.join(differences(known.settings, settings))}: choose another folder"
                )
            names = [*known.sources, *(name for name in manifest.sources if name not in known.sources)]
            manifest = msgspec.structs.replace(manifest, sources=names)
        for name in (EMBEDDINGS, ERRORS, PLANS, UNITS):
            (self.folder / name).mkdir(exist_ok=True)
            _sweep(self.folder / name)
        _sweep(self.folder)
        self._shards = [read_shard(self.folder, n, settings, self.schema) for n in shard_numbers(self.folder)]
        errors, self._generation = read_errors(self.folder)
        self._num_errors = len(errors)
        if manifest != known:
            write_manifest(self.folder, manifest)
        self._load_plan()

    def _load_plan(self) -> None:
        generations = plan_generations(self.folder)
        self._plan = read_plan(self.folder, generations[0]) if generations else None
        self._generation = max([self._generation, *generations, *(s.header.generation for s in self._shards)])
        appended = {pair for generation in generations for pair in self._appended(generation)}
        for generation, unit in unit_files.finished_units(self.folder):
            if generation not in generations or (generation, unit) in appended:
                self._unlink(generation, unit)

    def _appended(self, generation: int) -> set[tuple[int, int]]:
        """The units of a generation whose rows the shards hold."""
        ranges = [span for shard in self._shards for span in shard.header.units if span[0] == generation]
        return {(generation, unit) for _, first, last in ranges for unit in range(first, last + 1)}

    @property
    def counts(self) -> Counts:
        """The rows of the shards and of the errors; units that no shard holds yet do not count."""
        return Counts(sum(shard.rows for shard in self._shards), self._num_errors)

    def plan(
        self, listing: pa.Table, *, prune: bool = False, retry: bool = False, changed: Changed | None = None
    ) -> Diff:
        """The work that is left: an unfinished plan, else a new one for a listing, else none.

        A store writes one new plan at most, so that a file that changes all the time or an error that is tried again
        does not keep a run from ending. Encode the units of `pending`, call `compact(final=True)`, and call this again,
        until `generation` is None.

        Args:
            listing: items of `layout.listing_schema`; `source` counts `manifest.sources` of this store.
            prune: drop rows that are not listed.
            retry: try errors again; those of a plan that tried them already stay.
            changed: tells the items whose content changed, of a table of those that have a row; it has the listing's
                columns and sha256. By default they have another size or modification time.
        Raises:
            ValueError: an id is listed twice, or a file is not as it was written.
            OSError: a file cannot be read or written.
        """
        if self._plan is not None:
            damaged = 0 if self._planned else self._drop_damaged(self._plan)
            return self._describe(self._plan, resumed=not self._planned, damaged=damaged)
        if self._planned:
            return Diff(None)
        columns = ["id", "size", "modified", *(["sha256"] if changed else [])]
        rows = max(KNOWN_ROWS, len(listing) // 8)
        known = known_rows(self.folder, [shard.number for shard in self._shards], columns, rows)
        errors, _ = read_errors(self.folder)
        result = compare(
            listing, known, errors, retry=retry and not self._retried, keep_vanished=not prune, changed=changed
        )
        self._planned = True
        if len(result.appended) or len(result.replacing) or any(map(len, result.vanished)):
            self._plan = self._write_plan(listing, result, retry)
            return self._describe(self._plan, result)
        return Diff(None, failed=result.failed, unchanged=result.unchanged, vanished=result.num_vanished)

    def _write_plan(self, listing: pa.Table, result: Comparison, retry: bool) -> PlanHeader:
        appended, replacing = (-(-len(part) // self.unit_rows) for part in (result.appended, result.replacing))
        header = PlanHeader(
            generation=self._generation + 1,
            units=appended + replacing,
            appended=appended,
            sources=self.manifest.sources,
            new=result.new,
            changed=len(result.replacing),
            retried=result.retried,
            dropped=sum(map(len, result.vanished)),
            retry=retry,
        )

        def items() -> Iterator[pa.Table]:
            for places in (result.appended, result.replacing):
                for start in range(0, len(places), self.unit_rows):
                    yield _take(listing, places[start : start + self.unit_rows])

        write_plan(self.folder, header, items(), result.vanished)
        self._generation = header.generation
        return header

    def _describe(
        self, plan: PlanHeader, result: Comparison | None = None, *, resumed: bool = False, damaged: int = 0
    ) -> Diff:
        rest = () if result is None else (result.failed, result.unchanged, result.num_vanished)
        diff = Diff(
            plan.generation, resumed, tuple(plan.sources), plan.new, plan.changed, plan.retried, plan.dropped, *rest
        )
        return diff._replace(damaged=damaged)

    def _drop_damaged(self, plan: PlanHeader) -> int:
        """Delete units that are not as they were written, so that they are encoded again; return their number."""
        damaged = 0
        for generation, unit in sorted(unit_files.finished_units(self.folder)):
            if generation == plan.generation:
                try:
                    self._read_unit(unit)
                except ValueError:
                    self._unlink(generation, unit)
                    damaged += 1
        return damaged

    def pending(self) -> list[int]:
        """The units of the plan that are neither in a shard nor in a file of their own, ascending."""
        if self._plan is None:
            return []
        generation = self._plan.generation
        done = unit_files.finished_units(self.folder) | self._appended(generation)
        return [unit for unit in range(self._plan.units) if (generation, unit) not in done]

    def unit_lengths(self) -> list[int]:
        """The number of items of each unit of the plan; empty without a plan.

        Raises:
            ValueError, OSError: as `plans.read_items`.
        """
        return [] if self._plan is None else unit_lengths(self.folder, self._plan.generation)

    def items(self, unit: int) -> pa.Table:
        """The items of a unit of the plan: id, source, place, size and modified.

        Raises:
            ValueError, OSError: as `plans.read_items`.
        """
        if self._plan is None:
            raise ValueError(f"expected a plan with unit {unit}, got no plan: call Store.plan first")
        return read_items(self.folder, self._plan.generation, unit)

    def compact(self, final: bool) -> None:
        """Move consecutive finished units into shards, and finish the plan if none of its units is pending.

        Args:
            final: also fill the last shard, which stays open, and finish the plan. Otherwise only complete shards are
                written, so that a row is written twice at most.
        Raises:
            ValueError: a unit or a shard is not as it was written.
            OSError: a file cannot be read or written. Nothing is lost; call it again.
        """
        while self._plan is not None and (batch := self._next_batch(self._plan, final)):
            self._append(self._plan, batch)
        if final and self._plan is not None and not self.pending():
            self._finish(self._plan)

    def _open_shard(self) -> Shard:
        """The last shard if it is not complete, else a new one."""
        if self._shards and self._shards[-1].rows < self.shard_rows:
            return self._shards[-1]
        number = self._shards[-1].number + 1 if self._shards else 0
        return Shard(number, 0, ShardHeader(self.manifest.settings, 0, []))

    def _next_batch(self, plan: PlanHeader, final: bool) -> range:
        """The next units that follow each other and complete a shard, or, at the end, all that are there."""
        files, appended = unit_files.finished_units(self.folder), self._appended(plan.generation)
        missing = (unit for unit in range(plan.appended) if (plan.generation, unit) not in appended)
        first = last = next(missing, plan.appended)
        rows = self._open_shard().rows
        while last < plan.appended and (plan.generation, last) in files - appended:
            rows += unit_files.read_unit_header(self.folder, plan.generation, last).embeddings
            last += 1
            if rows >= self.shard_rows:
                return range(first, last)
        return range(first, last if final else first)

    def _append(self, plan: PlanHeader, batch: range) -> None:
        pa, errors = pyarrow(), []
        ids = read_ids(self.folder, plan.generation, batch.start, batch.stop)["id"]
        for unit in batch:
            if unit_files.read_unit_header(self.folder, plan.generation, unit).errors:
                table = self._read_unit(unit)
                errors.append(table.filter(table["reason"].is_valid()))
        failed = pa.concat_tables(errors) if errors else None
        if errors or self._num_errors:
            self._num_errors = merge_errors(self.folder, self.manifest.settings, plan.generation, ids, failed)
        span, old = (plan.generation, batch.start, batch.stop - 1), self._open_shard()
        shard = append_units(self.folder, old, self.schema, span, map(self._read_unit, batch))
        self._shards = [*(other for other in self._shards if other.number != shard.number), shard]
        for unit in batch:
            self._unlink(plan.generation, unit)

    def _finish(self, plan: PlanHeader) -> None:
        replacement = Replacement(read_ids(self.folder, plan.generation, plan.appended, None), self._read_unit)
        if len(replacement.ids):
            self._shards = [
                replace_rows(self.folder, shard, self.schema, plan.generation, replacement.ids, replacement.apply)
                for shard in self._shards
            ]
            failed = replacement.errors(range(plan.appended, plan.units))
            settings = self.manifest.settings
            self._num_errors = merge_errors(self.folder, settings, plan.generation, replacement.ids, failed)
        os.unlink(plan_file(self.folder, plan.generation))
        self._retried = self._retried or plan.retry
        self._plan = None
        self._load_plan()

    def _read_unit(self, unit: int) -> pa.Table:
        assert self._plan is not None
        generation = self._plan.generation
        ids = read_ids(self.folder, generation, unit, unit + 1)["id"]
        return unit_files.read_unit(self.folder, generation, unit, self.schema, ids)

    def _unlink(self, generation: int, unit: int) -> None:
        with suppress(FileNotFoundError):
            os.unlink(unit_files.unit_file(self.folder, generation, unit))


def _take(listing: pa.Table, places: np.ndarray) -> pa.Table:
    """Rows of a listing. Only the span that holds them is taken from, because pyarrow may copy all of it first."""
    first, last = int(places.min()), int(places.max())
    span = listing.slice(first, last + 1 - first)
    rows = span if len(span) == len(places) and (np.diff(places) > 0).all() else span.take(places - first)
    return rows.combine_chunks()


def _refuse_foreign(folder: Path) -> None:
    """Raise ValueError if a folder holds something, but no collection."""
    names = set(os.listdir(folder))
    folders = {EMBEDDINGS, ERRORS, PLANS, UNITS}
    others = {name for name in names - folders - {INDEX, LOCK} if not TEMPORARY.fullmatch(name)}
    if others and MANIFEST not in names and not folders <= names:
        raise ValueError(
            f"expected a new or empty folder or a collection, got {folder} with {min(others)!r} and no {MANIFEST}: "
            "choose another folder"
        )


def _sweep(folder: Path) -> None:
    """Remove the temporary files of killed writers; the lock tells that no other one is at work."""
    for name in os.listdir(folder):
        if TEMPORARY.fullmatch(name):
            with suppress(FileNotFoundError):
                os.unlink(folder / name)
