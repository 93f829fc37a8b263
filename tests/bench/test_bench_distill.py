"""bench/cost/distill.py: the fused loss is the literal one, and both are timed."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

from bench.cost import distill as distill_cost

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", distill_cost.DTYPES)
@pytest.mark.parametrize("loss", distill_cost.LOSSES)
def test_the_fused_loss_is_the_literal_one(loss: str, dtype: str) -> None:
    distill_cost.check(distill_cost.inputs_of(loss, 3, 24, 17, distill_cost.DTYPES[dtype]))


@pytest.mark.parametrize("dtype", distill_cost.DTYPES)
def test_no_distance_is_so_near_zero_that_rounding_could_change_its_sign(dtype: str) -> None:
    (told,) = distill_cost.inputs_of("text", 2, 24, 17, distill_cost.DTYPES[dtype])
    far = told.student.double() @ told.projection.double().T - told.teacher.double()
    assert far.abs().min() > 0.05 and 0.4 < (far > 0).double().mean() < 0.6


@pytest.mark.parametrize("wrong", ["forward", "backward"])
def test_a_form_that_differs_is_never_timed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(told: distill_cost.Told) -> torch.Tensor:
        right = distill_cost.literal(told)
        return right * 1.001 if wrong == "forward" else right + (told.student.mean() - told.student.mean().detach())

    monkeypatch.setattr(distill_cost, "fused", off)
    with pytest.raises(AssertionError, match="fused and literal forms differ"):
        distill_cost.check(distill_cost.inputs_of("text", 3, 24, 17))


@pytest.mark.slow  # a process for each form, which imports everything
def test_time_and_memory_of_both_forms_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--batch", "16", "--dtype", "bfloat16", "--rounds", "1", "--out", str(tmp_path / "cost.csv")]
    monkeypatch.setattr(sys, "argv", ["distill_cost.py", *options])
    distill_cost.main()
    with (tmp_path / "cost.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["loss"], row["form"]) for row in rows] == [
        (loss, form) for loss in distill_cost.LOSSES for form in distill_cost.FORMS
    ]
    assert all(float(row["milliseconds"]) > 0 and float(row["peak_mib"]) > 0 for row in rows)
