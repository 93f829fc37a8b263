"""The cost of plans as the search sees it: operations as executed, or milliseconds by a measured table."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

from torch import nn

from clipkernels.adapters import Tower, outputs_only_cls
from clipkernels.measure.timing import gmacs_for
from clipkernels.plan import Plan, Prune, Step
from clipkernels.tuning.budget import Constraint
from clipkernels.tuning.candidates import Geometry
from clipkernels.tuning.cost import CostTable, measure_cost
from clipkernels.tuning.effects import Family

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
        self.exact = outputs_only_cls(tower)
        self.dense = self.geometry.plan((None,) * self.geometry.blocks)
        self._of = lru_cache(maxsize=None)(self._measure)

    def __call__(self, plan: Plan) -> float:
        """Milliseconds of a batch by the table, or GMACs of an image as executed."""
        return self._of(plan)

    def _measure(self, plan: Plan) -> float:
        return self.gmacs(plan) if self.table is None else self.table.milliseconds(plan)

    def gmacs(self, plan: Plan) -> float:
        """Operations of an image as executed, in 10⁹ multiply-accumulates."""
        return gmacs_for(self.tower, plan, self.exact)

    def milliseconds(self, plan: Plan) -> float | None:
        """Milliseconds of a batch by the table; None without one."""
        return None if self.table is None else self(plan)

    def is_affordable(self, plan: Plan) -> bool:
        """True if a plan is expected to keep the constraints about cost."""
        bounds = {constraint.name: constraint.bound for constraint in self.constraints}
        fast = "speedup" not in bounds or self(self.dense) >= TIMING_MARGIN * bounds["speedup"] * self(plan)
        return fast and self.gmacs(plan) <= bounds.get("gmacs", float("inf"))

    def for_family(self, family: Family) -> Callable[[int, int, int], float]:
        """The cost of a block by its index and the tokens before and after a step, up to a constant, for a chain.

        It is the change of the cost of everything between two steps, because that alone depends on the tokens that the
        first of them leaves, and the cost of the step itself.
        """

        @cache
        def entering(block: int, tokens: int) -> float:
            """The cost of a plan whose blocks from one on have these tokens, with a pruning step before them."""
            return self(self.geometry.plan(self._single(block - 1, tokens, None)))

        def cost(block: int, before: int, after: int) -> float:
            following = block + 1
            total = 0.0
            if following < self.geometry.blocks:
                total += entering(following, after)
                if following + 1 < self.geometry.blocks:
                    total -= entering(following + 1, after)
            return total + (self.step(family, block, before, after) if after < before else 0.0)

        return cost

    def step(self, family: Family, block: int, before: int, after: int) -> float:
        """The cost of a step beside that of a pruning step that leaves as many tokens, not less than 0."""
        if self.table is None:
            return 0.0
        return max(0.0, self.table.step_milliseconds(family.name, block, before, after))

    def _single(self, block: int, tokens: int, step: Step | None) -> list[Step | None]:
        keep = tokens - self.geometry.prefix - 1
        steps: list[Step | None] = [None] * self.geometry.blocks
        if tokens < self.geometry.entry and keep >= 0:
            steps[block] = step or Prune(keep)
        return steps


def load_table(
    model: nn.Module, source: CostTable | str | os.PathLike[str] | None, batch_size: int, report: Any
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
        table.check(model, batch_size)
        return table
    report.begin("measuring cost", 1)
    table = measure_cost(model, batch_size, progress=report.advance)
    if source is not None:
        table.save(source)
    return table
