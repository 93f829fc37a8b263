"""The selection, the order and the ranks of scores in the kernels, compared with a stable sort."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it exists only on Linux")

from clipkernels.kernels import ranking
from tests.ops import selection


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 64, 196, 257])
def test_every_count_of_a_row_chooses_as_a_stable_sort(device, size):
    generator = np.random.default_rng(size)
    counts = np.unique(np.linspace(0, size, 17, dtype=np.int32))
    assert list(selection.wrong_rows(selection.random_rows(generator, len(counts), size), counts, device)) == []


@pytest.mark.parametrize("value", [0.0, -1.5, float("inf"), float("-inf"), float("nan")])
def test_of_equal_scores_the_lower_indices_are_chosen(device, value):
    scores, counts = np.full((4, 33), value, np.float32), np.array([0, 1, 17, 33], np.int32)
    assert list(selection.wrong_rows(scores, counts, device)) == []


def test_zeros_of_both_signs_tie_and_nan_ties_with_minus_infinity(device):
    inf, nan = float("inf"), float("nan")
    scores = np.array([[-0.0, 0.0, 1e-45, -1e-45], [nan, -inf, nan, -3e38]], np.float32).repeat(4, 0)
    counts = np.array([1, 2, 3, 4] * 2, np.int32)
    assert list(selection.wrong_rows(scores, counts, device)) == []
    ranks = ranking.rank_scores(torch.from_numpy(scores)[None].to(device))[0]
    assert ranks[0].tolist() == [2, 1, 3, 0] and ranks[4].tolist() == [2, 1, 0, 3]


@pytest.mark.slow
def test_500_random_rows_choose_and_order_as_a_stable_sort(device):
    assert selection.check(500, 1, device) == []
