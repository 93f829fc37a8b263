"""The cost of plans as the search sees it: operations as executed, or milliseconds by a measured table."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha256

import msgspec
from torch import nn

from clipkernels.adapters import Tower
from clipkernels.plan import Plan, Prune, Step
from clipkernels.tuning.budget import Constraint
from clipkernels.tuning.candidates import Geometry
from clipkernels.tuning.cost import CostTable, gmacs_as_executed, measure_cost
from clipkernels.tuning.effects import Family
from clipkernels.tuning.results import Report

TIMING_MARGIN = 1.05
"""Speed-up by the table over the one that is asked for, because the table adds medians of parts."""


class Costs:
    """Costs of the plans of one tower.

    Args:
        tower: the tower.
        constraints: those about cost.
        table: measured milliseconds, or None to count operations.
    """

    def __init__(self, tower: Tower, constraints: Sequence[Constraint], table: CostTable | None) -> None:
        self.tower, self.constraints, self.table = tower, tuple(constraints), table
        self.geometry = Geometry.of(tower)
        self.dense = self.geometry.plan((None,) * self.geometry.blocks)
        self._known: dict[Plan, float] = {}

    def __call__(self, plan: Plan) -> float:
        """Milliseconds of a batch by the table, or GMACs of an image as executed."""
        if plan not in self._known:
            self._known[plan] = self.gmacs(plan) if self.table is None else self.table.milliseconds(plan)
        return self._known[plan]

    def gmacs(self, plan: Plan) -> float:
        """Operations of an image as executed, in 10⁹ multiply-accumulates."""
        return gmacs_as_executed(self.tower, plan)

    def milliseconds(self, plan: Plan) -> float | None:
        """Milliseconds of a batch by the table; None without one."""
        return None if self.table is None else self(plan)

    def is_affordable(self, plan: Plan) -> bool:
        """True if a plan is expected to keep the constraints about cost."""
        bounds = {constraint.name: constraint.bound for constraint in self.constraints}
        fast = "speedup" not in bounds or self(self.dense) >= TIMING_MARGIN * bounds["speedup"] * self(plan)
        return fast and self.gmacs(plan) <= bounds.get("gmacs", float("inf"))

    def for_family(self, family: Family) -> Callable[[int, int, int], float]:
        """The cost of a block by its index and the tokens before and after its step, up to a constant.

        Operations are those of the block's MLP and of the next block's attention, which the tokens after it determine.
        """
        table, last = self.table, self.geometry.blocks - 1
        if table is not None:

            def measured(block: int, before: int, after: int) -> float:
                step = family.step(before, after, self.geometry.prefix) if after < before else None
                sized = family.name == "merge" and before < self.geometry.entry
                return table.block_milliseconds(before, after, step, sized=sized, last=block == last)

            return measured

        @cache
        def from_block(block: int, tokens: int) -> float:
            """GMACs of a plan with so many tokens from the MLP of a block on."""
            return self(self.geometry.plan(self._single(block, tokens)))

        def counted(block: int, before: int, after: int) -> float:
            # A step of the last block may be ignored, and then costs the same for any number of tokens.
            return from_block(block, after) - (from_block(block + 1, after) if block < last else self(self.dense))

        return counted

    def _single(self, block: int, tokens: int) -> list[Step | None]:
        """Steps that leave so many tokens in one block."""
        keep = tokens - self.geometry.prefix - 1
        steps: list[Step | None] = [None] * self.geometry.blocks
        if tokens < self.geometry.entry and keep >= 0:
            steps[block] = Prune(keep)
        return steps


def digest_of(table: CostTable | None) -> str:
    """The SHA-256 of a table, or "gmacs" without one."""
    return "gmacs" if table is None else sha256(msgspec.json.encode(table, order="sorted")).hexdigest()


def load_table(
    model: nn.Module, source: CostTable | str | os.PathLike[str] | None, batch_size: int, report: Report
) -> CostTable:
    """A cost table: the given one, that of a file, or one that is measured now, and written if a file is named.

    Raises:
        ValueError: a table of another tower, device, precision, batch or number of threads.
        OSError: the file cannot be read or written.
    """
    if isinstance(source, CostTable):
        source.check(model, batch_size)
        return source
    if source is not None and os.path.exists(source):
        table = CostTable.load(source)
        table.check(model, batch_size, source)
        return table

    def show(done: int, total: int) -> None:
        report.begin("measuring cost", total)
        report.advance(done)

    table = measure_cost(model, batch_size, progress=show)
    if source is not None:
        table.save(source)
    return table
