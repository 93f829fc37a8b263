"""Compaction: finished units move into shards and errors, so that no row is lost or there twice.

Any step may be the last one before the process is killed; the next run goes on from the files alone.

    appended units   1 errors   their ids leave the table of errors, and their errors enter it
                     2 shard    the last shard is replaced by itself and their rows; its header names them
                     3          their files are deleted
    then, at the end of the plan
    replacing units  4 shards   each shard that holds rows of theirs or dropped ids is replaced, with the new rows in
    and dropped ids             place of the old ones
                     5 errors   dropped ids leave the table, and the errors of these units enter it
                     6          the plan is deleted, then the files of its units

Steps 1, 4 and 5 give the same files when they are done again. Step 2 is not done again, because the header tells. An id
that is in a shard is never appended, and an old row is replaced or removed by one replacement of its shard's file. So
an id is in one shard at most at any moment; one that is in none and in no error is in a unit's file.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from clipkernels.collection.manifest import Settings
from clipkernels.collection.packages import pyarrow
from clipkernels.collection.store import units as unit_files
from clipkernels.collection.store.plans import PlanHeader, plan_file, plan_generations, read_ids, read_plan
from clipkernels.collection.store.replacement import Replacement
from clipkernels.collection.store.shards import (
    Shard,
    ShardHeader,
    append_units,
    merge_errors,
    read_errors,
    read_shard,
    replace_rows,
    shard_numbers,
)

if TYPE_CHECKING:
    import pyarrow as pa


class Compaction:
    """The shards and errors of a collection, and the plan whose units they take in.

    Args:
        folder: the collection, which this process has locked.
        settings, schema: its settings, and `layout.unit_schema` of them.
        shard_rows: the rows from which on a shard is complete.
    Raises:
        ValueError: a file is not as it was written, or of other settings.
        OSError: a file cannot be read.
    """

    def __init__(self, folder: Path, settings: Settings, schema: pa.Schema, shard_rows: int) -> None:
        self.folder, self.settings, self.schema, self.shard_rows = folder, settings, schema, shard_rows
        self.shards = [read_shard(folder, number, settings, schema) for number in shard_numbers(folder)]
        errors, self.generation = read_errors(folder)
        self.num_errors = len(errors)
        self.plan: PlanHeader | None = None
        self.load_plan()

    def load_plan(self) -> None:
        """Read the unfinished plan, if there is one, and delete units whose rows are in the shards or in no plan."""
        generations = plan_generations(self.folder)
        self.plan = read_plan(self.folder, generations[0]) if generations else None
        self.generation = max([self.generation, *generations, *(s.header.generation for s in self.shards)])
        appended = {pair for generation in generations for pair in self.appended(generation)}
        for generation, unit in unit_files.finished_units(self.folder):
            if generation not in generations or (generation, unit) in appended:
                self.unlink(generation, unit)

    def appended(self, generation: int) -> set[tuple[int, int]]:
        """The units of a generation whose rows the shards hold."""
        ranges = [span for shard in self.shards for span in shard.header.units if span[0] == generation]
        return {(generation, unit) for _, first, last in ranges for unit in range(first, last + 1)}

    def drop_damaged(self) -> int:
        """Delete units that are not as they were written, so that they are encoded again; return their number."""
        damaged = 0
        for generation, unit in sorted(unit_files.finished_units(self.folder)):
            if generation == self._current().generation:
                try:
                    self.read_unit(unit)
                except ValueError:
                    self.unlink(generation, unit)
                    damaged += 1
        return damaged

    def _open_shard(self) -> Shard:
        """The last shard if it is not complete, else a new one."""
        if self.shards and self.shards[-1].rows < self.shard_rows:
            return self.shards[-1]
        number = self.shards[-1].number + 1 if self.shards else 0
        return Shard(number, 0, ShardHeader(self.settings, 0, []))

    def next_batch(self, final: bool) -> range:
        """The next units that follow each other and complete a shard, or, at the end, all that are there."""
        plan = self._current()
        files, appended = unit_files.finished_units(self.folder), self.appended(plan.generation)
        missing = (unit for unit in range(plan.appended) if (plan.generation, unit) not in appended)
        first = last = next(missing, plan.appended)
        rows = self._open_shard().rows
        while last < plan.appended and (plan.generation, last) in files - appended:
            rows += unit_files.read_unit_header(self.folder, plan.generation, last).embeddings
            last += 1
            if rows >= self.shard_rows:
                return range(first, last)
        return range(first, last if final else first)

    def append(self, batch: range) -> None:
        """Append the rows of a batch to the last shard: steps 1 to 3."""
        pa, plan = pyarrow(), self._current()
        errors = []
        ids = read_ids(self.folder, plan.generation, batch.start, batch.stop)["id"]
        for unit in batch:
            if unit_files.read_unit_header(self.folder, plan.generation, unit).errors:
                table = self.read_unit(unit)
                errors.append(table.filter(table["reason"].is_valid()))
        failed = pa.concat_tables(errors) if errors else None
        if errors or self.num_errors:
            self.num_errors = merge_errors(self.folder, self.settings, plan.generation, ids, failed)
        span, old = (plan.generation, batch.start, batch.stop - 1), self._open_shard()
        shard = append_units(self.folder, old, self.schema, span, map(self.read_unit, batch))
        self.shards = [*(other for other in self.shards if other.number != shard.number), shard]
        for unit in batch:
            self.unlink(plan.generation, unit)

    def finish(self) -> None:
        """Put replacing rows in place, remove dropped ones, and delete the plan: steps 4 to 6."""
        plan = self._current()
        replacement = Replacement(read_ids(self.folder, plan.generation, plan.appended, None), self.read_unit)
        if len(replacement.ids):
            ids, change = replacement.ids, replacement.apply
            for index, shard in enumerate(self.shards):
                self.shards[index] = replace_rows(self.folder, shard, self.schema, plan.generation, ids, change)
            failed = replacement.errors(range(plan.appended, plan.units))
            self.num_errors = merge_errors(self.folder, self.settings, plan.generation, ids, failed)
        os.unlink(plan_file(self.folder, plan.generation))
        self.plan = None
        self.load_plan()

    def _current(self) -> PlanHeader:
        assert self.plan is not None
        return self.plan

    def read_unit(self, unit: int) -> pa.Table:
        """The rows of a finished unit of the plan."""
        generation = self._current().generation
        ids = read_ids(self.folder, generation, unit, unit + 1)["id"]
        return unit_files.read_unit(self.folder, generation, unit, self.schema, ids)

    def unlink(self, generation: int, unit: int) -> None:
        """Delete the file of a unit, if it is there."""
        with suppress(FileNotFoundError):
            os.unlink(unit_files.unit_file(self.folder, generation, unit))
