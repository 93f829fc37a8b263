"""The store of a collection: compares a listing with its rows, plans the work, and takes in finished units."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from clipkernels.collection.layout import SHARD_ROWS
from clipkernels.collection.manifest import Manifest, write_manifest
from clipkernels.collection.store.compaction import Compaction
from clipkernels.collection.store.comparison import Changed, Comparison, compare
from clipkernels.collection.store.folders import merge_manifest, prepare, refuse_foreign
from clipkernels.collection.store.plans import PlanHeader, read_items, unit_lengths, write_plan
from clipkernels.collection.store.shards import known_rows, read_errors
from clipkernels.collection.store.units import finished_units
from clipkernels.folder_lock import Lock

if TYPE_CHECKING:
    import pyarrow as pa

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
        forgotten, complete: as in `folders.merge_manifest`.
    Raises, on entering:
        ValueError: another process writes there, the settings or the sources are not the expected ones, the folder
            holds something else, or a file of the collection is not as it was written.
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
        forgotten: Sequence[str] = (),
        complete: bool = False,
    ) -> None:
        self.folder, self.manifest, self.schema = Path(folder), manifest, schema
        self.unit_rows, self.shard_rows = unit_rows, shard_rows
        self._forgotten, self._complete = forgotten, complete
        self._planned = self._retried = False

    def __enter__(self) -> Store:
        self.folder.mkdir(parents=True, exist_ok=True)
        refuse_foreign(self.folder)
        self._lock = Lock(self.folder)
        try:
            merged, differs = merge_manifest(self.folder, self.manifest, self._forgotten, complete=self._complete)
            prepare(self.folder)
            self._rows = Compaction(self.folder, self.manifest.settings, self.schema, self.shard_rows)
            if differs:  # not before the shards are known to have these settings
                write_manifest(self.folder, merged)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    @property
    def _plan(self) -> PlanHeader | None:
        return self._rows.plan

    @property
    def counts(self) -> Counts:
        """The rows of the shards and of the errors; units that no shard holds yet do not count."""
        return Counts(sum(shard.rows for shard in self._rows.shards), self._rows.num_errors)

    def plan(
        self, listing: pa.Table, *, prune: bool = False, retry: bool = False, changed: Changed | None = None
    ) -> Diff:
        """The work that is left: an unfinished plan, else a new one for a listing, else none.

        A store writes one new plan at most, so that a file that changes all the time or an error that is tried again
        does not keep a run from ending. Encode the units of `pending`, call `compact(final=True)`, and call this again,
        until `generation` is None.

        Args:
            listing: items of `layout.listing_schema`, whose ids differ; `source` counts `manifest.sources` of this
                store. Nothing of it is needed after a new plan is written, because the plan's file holds it.
            prune: drop rows that are not listed.
            retry: try errors again; those of a plan that tried them already stay.
            changed: tells the items whose content changed, of a table of those that have a row; it has the listing's
                columns and sha256. By default they have another size or modification time.
        Raises:
            ValueError: an id of a row is listed twice, or a file is not as it was written.
            OSError: a file cannot be read or written.
        """
        if self._plan is not None:
            damaged = 0 if self._planned else self._rows.drop_damaged()
            return self._describe(self._plan, resumed=not self._planned, damaged=damaged)
        if self._planned:
            return Diff(None)
        columns = ["id", "size", "modified", *(["sha256"] if changed else [])]
        rows = max(KNOWN_ROWS, len(listing) // 8)
        known = known_rows(self.folder, [shard.number for shard in self._rows.shards], columns, rows)
        errors, _ = read_errors(self.folder)
        result = compare(
            listing, known, errors, retry=retry and not self._retried, keep_vanished=not prune, changed=changed
        )
        self._planned = True
        if len(result.appended) or len(result.replacing) or any(map(len, result.vanished)):
            plan = self._rows.plan = self._write_plan(listing, result, retry)
            return self._describe(plan, result)
        return Diff(None, failed=result.failed, unchanged=result.unchanged, vanished=result.num_vanished)

    def compact(self, final: bool) -> None:
        """Move consecutive finished units into shards, and finish the plan if none of its units is pending.

        Args:
            final: also fill the last shard, which stays open, and finish the plan. Otherwise only complete shards are
                written, so that a row is written twice at most.
        Raises:
            ValueError: a unit or a shard is not as it was written.
            OSError: a file cannot be read or written. Nothing is lost; call it again.
        """
        while self._plan is not None and (batch := self._rows.next_batch(final)):
            self._rows.append(batch)
        if final and self._plan is not None and not self.pending():
            self._retried = self._retried or self._plan.retry
            self._rows.finish()

    def _write_plan(self, listing: pa.Table, result: Comparison, retry: bool) -> PlanHeader:
        appended, replacing = (-(-len(part) // self.unit_rows) for part in (result.appended, result.replacing))
        header = PlanHeader(
            generation=self._rows.generation + 1,
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
        self._rows.generation = header.generation
        return header

    def _describe(
        self, plan: PlanHeader, result: Comparison | None = None, *, resumed: bool = False, damaged: int = 0
    ) -> Diff:
        rest = () if result is None else (result.failed, result.unchanged, result.num_vanished)
        diff = Diff(
            plan.generation, resumed, tuple(plan.sources), plan.new, plan.changed, plan.retried, plan.dropped, *rest
        )
        return diff._replace(damaged=damaged)

    def pending(self) -> list[int]:
        """The units of the plan that are neither in a shard nor in a file of their own, ascending."""
        if self._plan is None:
            return []
        generation = self._plan.generation
        done = finished_units(self.folder) | self._rows.appended(generation)
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


def _take(listing: pa.Table, places: np.ndarray) -> pa.Table:
    """Rows of a listing. Only the span that holds them is taken from, because pyarrow may copy all of it first."""
    first, last = int(places.min()), int(places.max())
    span = listing.slice(first, last + 1 - first)
    rows = span if len(span) == len(places) and (np.diff(places) > 0).all() else span.take(places - first)
    return rows.combine_chunks()
