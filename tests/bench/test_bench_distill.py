"""bench/cost/distill.py: the fused loss equals the literal one, and both are timed."""

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
def test_the_fused_loss_equals_the_literal_one(loss: str, dtype: str) -> None:
    distill_cost.check(distill_cost.inputs_of(loss, 3, 24, 17, distill_cost.DTYPES[dtype]))


@pytest.mark.parametrize("dtype", distill_cost.DTYPES)
def test_rounding_cannot_change_the_sign_of_a_distance(dtype: str) -> None:
    (inputs,) = distill_cost.inputs_of("text", 2, 24, 17, distill_cost.DTYPES[dtype])
    distances = inputs.student.double() @ inputs.projection.double().T - inputs.teacher.double()
    assert distances.abs().min() > 0.05 and 0.4 < (distances > 0).double().mean() < 0.6


@pytest.mark.parametrize("wrong", ["forward", "backward"])
def test_a_form_that_differs_is_never_timed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_form(inputs: distill_cost.ModalityInputs) -> torch.Tensor:
        loss = distill_cost.literal(inputs)
        return loss * 1.001 if wrong == "forward" else loss + (inputs.student.mean() - inputs.student.mean().detach())

    monkeypatch.setattr(distill_cost, "fused", wrong_form)
    with pytest.raises(AssertionError, match="fused and literal forms differ"):
        distill_cost.check(distill_cost.inputs_of("text", 3, 24, 17))


@pytest.mark.slow  # each form runs in a process that imports everything
def test_time_and_memory_of_both_forms_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--batch", "16", "--dtype", "bfloat16", "--rounds", "1", "--out", str(tmp_path / "cost.csv")]
    monkeypatch.setattr(sys, "argv", ["distill.py", *options])
    distill_cost.main()
    with (tmp_path / "cost.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["loss"], row["form"]) for row in rows] == [
        (loss, form) for loss in distill_cost.LOSSES for form in distill_cost.FORMS
    ]
    assert all(float(row["milliseconds"]) > 0 and float(row["peak_mib"]) > 0 for row in rows)
