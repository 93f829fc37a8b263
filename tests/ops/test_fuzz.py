"""Random cases of every operation, beside their readings in numpy; `python tests/fuzz.py --cases 300` runs more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.fuzz import GENERATORS, Draw, fault, fuzz

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("op", GENERATORS)
def test_random_cases_agree_with_their_readings(op: str, device: torch.device) -> None:
    assert fuzz(op, range(1000, 1004), device) == []


@pytest.mark.slow
@pytest.mark.parametrize("op", GENERATORS)
def test_thirty_random_cases_agree_with_their_readings(op: str, device: torch.device) -> None:
    assert fuzz(op, range(30), device) == []


@pytest.mark.parametrize("op", GENERATORS)
def test_a_wrong_result_is_found(op: str, device: torch.device) -> None:
    case = next(
        case
        for case in (GENERATORS[op](Draw(seed, device)) for seed in range(100))
        if all(array is None or (array.size and np.isfinite(array).all()) for array in case.expected)
    )
    assert fault(case, "reference") is None
    for number, array in enumerate(case.expected):
        if array is not None:
            wrong = array.copy()
            wrong.flat[-1] += 1 if wrong.dtype == np.int64 else 1 + 100 * case.magnitudes[number]
            expected = tuple(wrong if place == number else part for place, part in enumerate(case.expected))
            assert fault(case._replace(expected=expected), "reference") is not None
