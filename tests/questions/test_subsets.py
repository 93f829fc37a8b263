"""Low-shot subsets are nested, stratified and seeded; domain shifts hold out values of a field."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from clipkernels.questions.subsets import held_out_values, low_shot, low_shot_order, split_by_value

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
LABELS = [0] * 600 + [1] * 300 + [2] * 99 + [3]


def test_subsets_are_nested_and_stratified() -> None:
    before: set[int] = set()
    for share in SHARES:
        subset = low_shot(LABELS, share, seed=3).tolist()
        assert len(subset) == round(share * 1000) == len(set(subset)) and subset == sorted(subset)
        assert before <= set(subset)
        before = set(subset)
        counts = Counter(LABELS[index] for index in subset)
        assert counts[3] == 1  # a class of one item is kept
        for label, size in ((0, 600), (1, 300), (2, 99)):
            assert abs(counts[label] - share * size) <= 1.5


def test_every_class_is_kept_if_there_is_room_and_else_the_largest() -> None:
    labels = [0] * 50 + [1] * 30 + [2] * 20 + list(range(3, 13))
    order = low_shot_order(labels, seed=0).tolist()
    assert [labels[index] for index in order[:3]] == [0, 1, 2]
    assert {labels[index] for index in order[:13]} == set(range(13))


def test_draws_depend_on_the_seed_alone() -> None:
    first, again, other = (low_shot(LABELS, 0.1, seed) for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)
    # More items of another class leave a class's first draws as they are.
    more = low_shot([*LABELS, *[0] * 500], 0.1, 0).tolist()
    ones = [[index for index in subset if 600 <= index < 900] for subset in (first.tolist(), more)]
    assert len(set(ones[0]) & set(ones[1])) == min(map(len, ones))


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share must be"):
        low_shot(LABELS, share, 0)
    assert low_shot([5], 0.01, 0).tolist() == [0]
    with pytest.raises(ValueError, match="got none"):
        low_shot([], 0.5, 0)


@pytest.mark.parametrize("share", [math.nan, math.inf, True, "0.5"])
def test_a_share_that_is_no_number_is_refused(share: Any) -> None:
    with pytest.raises(ValueError, match=r"share must be a number in \(0, 1\]"):
        low_shot(LABELS, share, 0)


def test_labels_and_seeds_that_no_generator_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="labels must be ints, got 'cat'"):
        low_shot(["cat", "dog"], 0.5, 0)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="seed must be an int from 0 to 1099511627776"):
        low_shot(LABELS, 0.5, 10**14)
    of_tensor = low_shot(torch.tensor(LABELS), 0.1, 0)  # type: ignore[arg-type]
    assert of_tensor.equal(low_shot(LABELS, 0.1, 0))


def test_a_domain_shift_holds_out_whole_values() -> None:
    values = ["a"] * 10 + ["b"] * 10 + ["c"] * 20 + ["d"] * 60
    for seed in range(5):
        held_out = held_out_values(values, 0.25, seed)
        same, shifted = split_by_value(values, held_out)
        assert sorted(same + shifted) == list(range(100)) and len(shifted) >= 25 and same
        assert {values[index] for index in shifted} == set(held_out)
        assert not {values[index] for index in same} & set(held_out)
    assert len({held_out_values(values, 0.25, seed) for seed in range(5)}) > 1
    assert held_out_values(["a", "b"], 0.99, 0) in (("a",), ("b",))
    with pytest.raises(ValueError, match="two different values or more, got 'a'"):
        held_out_values(["a", "a"], 0.5, 0)
