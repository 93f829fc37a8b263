"""bench/distill_cost.py: the fused loss is the literal one."""

from __future__ import annotations

import pytest

import distill_cost

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("loss", distill_cost.LOSSES)
def test_the_fused_loss_is_the_literal_one(loss: str) -> None:
    distill_cost.check(distill_cost.inputs_of(loss, batch=3, width=24, embedding=17), 1e-5)
