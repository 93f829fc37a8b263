"""Draws of labelled images, intervals of accuracies, and recalls of retrievals, against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkernels.evaluation.retrieval import RANKS, image_hits, text_hits
from clipkernels.evaluation.scores import score
from clipkernels.evaluation.shots import draw_order, draw_shots


def test_draws_are_nested_seeded_and_balanced() -> None:
    labels = torch.arange(300) % 7
    few, many = draw_shots(labels, 7, 4, seed=2), draw_shots(labels, 7, 16, seed=2)
    assert set(few.tolist()) < set(many.tolist())
    assert labels[many].bincount().tolist() == [16] * 7
    assert torch.equal(few, draw_shots(labels, 7, 4, seed=2))
    assert not torch.equal(few, draw_shots(labels, 7, 4, seed=3))


def test_a_class_with_few_images_gives_all_of_them() -> None:
    labels = torch.tensor([0, 0, 0, 1, 0])
    assert sorted(draw_shots(labels, 3, 2, seed=0).tolist())[-1] >= 3
    assert labels[draw_shots(labels, 3, 2, seed=0)].bincount(minlength=3).tolist() == [2, 1, 0]


def test_the_draw_of_a_class_does_not_depend_on_other_classes() -> None:
    labels = torch.tensor([0] * 10 + [1] * 10)
    fewer = torch.tensor([0] * 10 + [1] * 3)
    first, second = draw_shots(labels, 2, 4, seed=5), draw_shots(fewer, 2, 4, seed=5)
    assert torch.equal(first[:4], second[:4])


def test_orders_are_permutations() -> None:
    assert sorted(draw_order(50, 1).tolist()) == list(range(50))
    assert not torch.equal(draw_order(50, 1), draw_order(50, 2))


def test_a_score_has_the_mean_and_the_spread_of_its_runs() -> None:
    hits = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    result = score(hits)
    assert (result.mean, result.runs, result.images) == (0.625, 2, 4)
    assert result.spread == pytest.approx(0.25 / 2**0.5)
    assert score(hits[:1]).spread is None


def test_the_interval_is_that_of_a_binomial() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = torch.rand(1, 4000, generator=generator) < 0.7
    result = score(hits)
    error = (result.mean * (1 - result.mean) / 4000) ** 0.5
    assert result.low == pytest.approx(result.mean - 1.96 * error, abs=0.15 * error)
    assert result.high == pytest.approx(result.mean + 1.96 * error, abs=0.15 * error)
    assert score(hits) == result


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (4,)])
def test_a_score_needs_runs_and_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="hits must be"):
        score(torch.ones(shape))


def places(queries: Tensor, gallery: Tensor, own: list[list[int]]) -> list[int]:
    """The place of the best own row of each query, by sorting everything."""
    similarity = normalize(queries, dim=1) @ normalize(gallery, dim=1).T
    order = similarity.argsort(dim=1, descending=True, stable=True).tolist()
    return [min(row.index(target) for target in targets) for row, targets in zip(order, own, strict=True)]


def test_recalls_are_those_of_sorting_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipkernels.evaluation.retrieval.BLOCK", 7)
    generator = torch.Generator().manual_seed(3)
    # Small integers, so that many similarities are tied.
    images = torch.randint(-1, 2, (20, 4), generator=generator).float() + 0.01
    image_of = torch.randint(19, (55,), generator=generator)  # the last image has no text
    texts = torch.randint(-1, 2, (55, 4), generator=generator).float() + 0.01
    captioned = sorted(set(image_of.tolist()))
    by_text = torch.tensor(places(texts, images, [[image] for image in image_of.tolist()]))
    own = [[text for text, owner in enumerate(image_of.tolist()) if owner == image] for image in captioned]
    by_image = torch.tensor(places(images[captioned], texts, own))
    assert text_hits(images, texts, image_of).tolist() == [(by_text < rank).tolist() for rank in RANKS]
    assert image_hits(images, texts, image_of).tolist() == [(by_image < rank).tolist() for rank in RANKS]
