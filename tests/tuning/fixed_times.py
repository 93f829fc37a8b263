"""A cost table and paired timings that are the same in every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from torch import Tensor, nn

from clipkernels.measure.timing import HOST, Times, Variant
from clipkernels.patching import tower_of
from clipkernels.tuning.cost_table import CostTable, conditions_of


def table_of(model: nn.Module, batch: int) -> CostTable:
    """A table of the bundled model: the attention and the MLP of a block each cost 0.1 ms per token."""
    counts = (9, 33, 65)
    linear, small = tuple(0.1 * count for count in counts), tuple(0.001 * count for count in counts)
    fields: dict[str, Any] = dict.fromkeys(("attention", "attention_sized", "mlp", "last", "last_sized"), linear)
    fields |= dict.fromkeys(("pool", "merge", "prune", "condense"), small)
    return CostTable(
        conditions=conditions_of(tower_of(model), batch), clock="wall", rounds=3, counts=counts, dense=70.0, scale=1.0,
        embed=0.5, **fields,
    )  # fmt: skip


def fix_times(monkeypatch: pytest.MonkeyPatch, plan: float) -> list[Sequence[Tensor]]:
    """Let a plan take `plan` seconds, and the faster dense tower 1.5; returns the batches of the timings so far."""
    timed: list[Sequence[Tensor]] = []

    def times(variants: Mapping[str, Variant], batches: Sequence[Tensor], rounds: int, **options: Any) -> Times:
        timed.append(batches)
        seconds = {HOST: 2.0, "dense": 1.5, "plan": plan}
        assert set(variants) == set(seconds)
        return Times({name: [value] * rounds for name, value in seconds.items()})

    monkeypatch.setattr("clipkernels.tuning.run.time_variants", times)
    return timed
