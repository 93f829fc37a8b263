"""A head over the views of an object: a literal loop, every inner head, and the search of its weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import clipkernels as ck

WIDTH, CLASSES, PATCHES = 12, 5, 4
WEIGHTS = (0.5, -0.25, 1.0, 0.0, 2.0, 0.75)


def encoded(objects: int, views: int = 6, seed: int = 0) -> ck.Encoded:
    """Features of objects, fp64, with patches."""
    generator = torch.Generator().manual_seed(seed)
    images = objects * views
    embedding = torch.randn(images, WIDTH, generator=generator, dtype=torch.float64)
    tokens = torch.randn(images, 1 + PATCHES, WIDTH, generator=generator, dtype=torch.float64)
    return ck.Encoded(embedding, tokens, prefix=1)


def classes(seed: int = 9) -> Tensor:
    return torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def support() -> tuple[Tensor, Tensor]:
    return encoded(3, 5, seed=4).embedding, torch.arange(15) % CLASSES


HEADS = {
    "zero-shot": lambda: ck.ZeroShot(classes()),
    "calip": lambda: ck.CALIP(classes(), beta2=1.2, beta3=0.3),
    "tip": lambda: ck.TipAdapter(classes(), *support(), alpha=2.0, beta=1.5),
    "tipx": lambda: ck.TipX(classes(), *support()),
}


def view_of(features: ck.Encoded, at: int) -> ck.Encoded:
    assert features.tokens is not None
    return ck.Encoded(features.embedding[at : at + 1], features.tokens[at : at + 1], prefix=1)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("weights", [WEIGHTS, None])
def test_logits_are_the_weighted_sum_over_views(name: str, weights: tuple[float, ...] | None) -> None:
    head, features = HEADS[name](), encoded(4)
    multi = ck.MultiView(head, weights)
    used = weights or (1 / 6,) * 6
    expected = []
    for start in range(0, 24, 6):
        views = [used[view] * head(view_of(features, start + view))[0] for view in range(6)]
        expected.append(torch.stack(views).sum(0))
    torch.testing.assert_close(multi(features), torch.stack(expected), atol=1e-10, rtol=1e-10)
    assert multi.needs == head.needs and multi.views == 6


def test_the_three_forms_of_features_are_one() -> None:
    multi, features = ck.MultiView(ck.ZeroShot(classes()), WEIGHTS), encoded(3)
    expected = multi(features)
    assert torch.equal(multi(features.embedding), expected)
    assert torch.equal(multi(features.embedding.unflatten(0, (3, 6))), expected)
    assert multi(features.embedding[:0]).shape == (0, CLASSES)
    assert multi(torch.empty(0, 6, WIDTH)).shape == (0, CLASSES)


def test_equal_views_with_equal_weights_give_the_heads_logits() -> None:
    head, features = ck.ZeroShot(classes()), encoded(3, 1).embedding
    for views in (1, 6, 10):
        multi = ck.MultiView(head, views=views)
        torch.testing.assert_close(multi(features.repeat_interleave(views, 0)), head(features))
    assert ck.MultiView(head).weights == (1 / 6,) * 6


def test_an_object_does_not_depend_on_its_batch() -> None:
    multi, features = ck.MultiView(HEADS["calip"](), WEIGHTS), encoded(5)
    assert features.tokens is not None
    alone = [
        multi(ck.Encoded(features.embedding[at : at + 6], features.tokens[at : at + 6], prefix=1))
        for at in range(0, 30, 6)
    ]
    torch.testing.assert_close(multi(features), torch.cat(alone), atol=1e-12, rtol=1e-12)


def test_gradients_reach_the_features() -> None:
    features = encoded(2).embedding.requires_grad_()
    ck.MultiView(ck.ZeroShot(classes()), WEIGHTS)(features).sum().backward()
    assert features.grad is not None
    reached = features.grad.abs().sum(1).unflatten(0, (2, 6)) > 0
    assert reached.tolist() == [[weight != 0 for weight in WEIGHTS]] * 2


def labelled(objects: int, good: dict[int, float], views: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings (n·V,E) of noise, into which some views mix that of the true class; and the classes (n,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (objects,), generator=generator)
    features = torch.randn(objects, views, WIDTH, generator=generator, dtype=torch.float64)
    for view, strength in good.items():
        features[:, view] += strength * classes()[labels]
    return features.flatten(0, 1), labels


def test_the_search_raises_the_weights_of_views_that_tell() -> None:
    features, labels = labelled(400, {1: 1.0, 4: 0.7}, 6)
    multi = ck.MultiView(ck.ZeroShot(classes()))
    before = (multi(features).argmax(1) == labels).double().mean().item()
    accuracy = multi.fit(features, labels)
    assert accuracy == pytest.approx((multi(features).argmax(1) == labels).double().mean().item())
    assert accuracy > before + 0.1
    assert sum(multi.weights) == pytest.approx(1)
    others = [weight for view, weight in enumerate(multi.weights) if view not in (1, 4)]
    assert multi.weights[1] == max(multi.weights) and multi.weights[4] > max(others)
    again = ck.MultiView(ck.ZeroShot(classes()))
    assert again.fit(features.unflatten(0, (400, 6)), labels) == accuracy and again.weights == multi.weights


@pytest.mark.parametrize("seed", range(3))
def test_the_search_over_two_views_is_exhaustive(seed: int) -> None:
    features, labels = labelled(60, {0: 0.5, 1: 0.3}, 2, seed)
    head, grid = ck.ZeroShot(classes()), (0.1, 0.4, 0.9, 1.3)
    shares = []
    for weights in itertools.product(grid, repeat=2):
        predicted = ck.MultiView(head, weights)(features).argmax(1)
        shares.append((predicted == labels).double().mean().item())
    multi = ck.MultiView(head, views=2)
    assert multi.fit(features, labels, grid) == pytest.approx(max(shares))


def test_the_search_comes_near_the_exhaustive_one() -> None:
    features, labels = labelled(80, {0: 0.6, 2: 0.4}, 3, seed=5)
    head, shares = ck.ZeroShot(classes()), []
    for weights in itertools.product((0.25, 0.5, 0.75, 1.0), repeat=3):
        shares.append((ck.MultiView(head, weights)(features).argmax(1) == labels).double().mean().item())
    assert ck.MultiView(head, views=3).fit(features, labels) >= max(shares) - 1 / 80


def test_equal_weights_stay_where_nothing_is_better() -> None:
    features, labels = labelled(20, dict.fromkeys(range(6), 50.0), 6)
    multi = ck.MultiView(ck.ZeroShot(classes()))
    assert multi.fit(features, labels) == 1 and multi.weights == pytest.approx((1 / 6,) * 6)
    single = ck.MultiView(ck.ZeroShot(classes()), views=1)
    assert single.fit(features[::6], labels) == 1 and single.weights == (1,)


def test_batches_of_patches_are_searched_as_one() -> None:
    features, labels = encoded(30, seed=2), torch.arange(30) % CLASSES
    assert features.tokens is not None
    parts = [
        ck.Encoded(features.embedding[at : at + 60], features.tokens[at : at + 60], prefix=1)
        for at in range(0, 180, 60)
    ]
    whole, batched = (ck.MultiView(HEADS["calip"]()) for _ in range(2))
    assert whole.fit(features, labels) == batched.fit(iter(parts), labels)
    assert whole.weights == batched.weights


def test_a_classifier_takes_it() -> None:
    model, _, tokenizer = ck.bundled()
    points = torch.rand(2, 200, 3, generator=torch.Generator().manual_seed(0))
    images = ck.data.depth_maps(points, 6, 32).flatten(0, 1)
    for head in (ck.ZeroShot, ck.CALIP):
        multi = ck.Classifier(model, tokenizer, ["ring", "star"], head=lambda text, head=head: ck.MultiView(head(text)))
        single = ck.Classifier(model, tokenizer, ["ring", "star"], head=head)
        single.head = head(multi.head.zero_shot.text)  # type: ignore[attr-defined]
        with torch.inference_mode():
            expected = single(images).unflatten(0, (2, 6)).mean(1)
            torch.testing.assert_close(multi(images), expected, atol=1e-4, rtol=1e-4)
    scaled = ck.Classifier(
        model, tokenizer, ["ring", "star"], head=lambda text: ck.MultiView(ck.ZeroShot(text, scale="model"))
    )
    assert scaled.head.zero_shot.scale == pytest.approx(float(model.logit_scale.exp()))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": []}, "weights must be a list of a number per view, got list"),
        ({"weights": "123456"}, "weights must be a list of a number per view, got '123456'"),
        ({"weights": [1, float("nan")]}, r"weights\[1\] must be a finite number, got nan"),
        ({"weights": [1, 2], "views": 6}, "weights must be one per view, 6 numbers, got 2"),
        ({"views": 0}, "views must be an int of at least 1, got 0"),
    ],
)
def test_faulty_weights_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ck.MultiView(ck.ZeroShot(classes()), **arguments)


def test_heads_that_read_no_single_image_are_refused() -> None:
    for head in (ck.TDA, ck.Reservoir):
        with pytest.raises(ValueError, match=f"got {head.__name__}, which remembers images: take ck.ZeroShot"):
            ck.MultiView(head(classes()))
    with pytest.raises(ValueError, match="got MultiView, which reads several images at once: take"):
        ck.MultiView(ck.MultiView(ck.ZeroShot(classes()), views=2))
    for wrong in (None, ck.ZeroShot, torch.nn.Identity()):
        with pytest.raises(TypeError, match="head must be a finished head with an attribute needs, got"):
            ck.MultiView(wrong)  # type: ignore[arg-type]


def test_features_of_other_views_are_refused() -> None:
    multi = ck.MultiView(ck.ZeroShot(classes()))
    expected = r"features must be \(B·V,E\), \(B,V,E\) or an Encoded of B·V images, with V = 6, got "
    with pytest.raises(ValueError, match=rf"{expected}embeddings \(7,12\)"):
        multi(torch.rand(7, WIDTH))
    for shape in ((2, 10, WIDTH), (2, 2, 6, WIDTH), (WIDTH,), ()):
        with pytest.raises(ValueError, match=rf"{expected}\({','.join(map(str, shape))}\)"):
            multi(torch.rand(shape))
    for shape in ((7, WIDTH), (2, 6, WIDTH)):
        with pytest.raises(ValueError, match=rf"{expected}embeddings \({','.join(map(str, shape))}\)"):
            multi(ck.Encoded(torch.rand(shape)))
    with pytest.raises(TypeError, match=rf"{expected}None"):
        multi(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"features must be an Encoded with tokens"):
        ck.MultiView(HEADS["calip"]())(torch.rand(6, WIDTH))


@pytest.mark.parametrize("logits", [torch.zeros(3, CLASSES), torch.zeros(6), None])
def test_a_head_with_other_logits_is_refused(logits: Any) -> None:
    class Head:
        needs = ()

        def __call__(self, features: Any) -> Any:
            return logits

    with pytest.raises(ValueError, match=r"head must give logits \(B·V,K\) with B·V = 6, got .* from Head"):
        ck.MultiView(Head())(torch.rand(6, WIDTH))


@pytest.mark.parametrize("scale", [1e308, 1e-300])
def test_the_scale_of_the_grid_does_not_matter(scale: float) -> None:
    features, labels = labelled(100, {0: 0.5, 1: 0.3, 2: 0.2}, 3)
    one, other = (ck.MultiView(ck.ZeroShot(classes()), views=3) for _ in range(2))
    assert one.fit(features, labels) == other.fit(features, labels, [scale * each for each in (0.25, 0.5, 0.75, 1.0)])
    assert len(set(one.weights)) > 1 and other.weights == pytest.approx(one.weights)


def test_faulty_searches_are_refused_and_change_nothing() -> None:
    multi = ck.MultiView(ck.ZeroShot(classes()), WEIGHTS)
    features, labels = labelled(4, {}, 6)
    for grid, message in (
        ((), "grid must be a list of weights"),
        ((0.5, 0.5), r"grid must be ascending, got 0\.5, 0\.5"),
        ((0.0, 1.0), r"grid\[0\] must be a positive number, got 0\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            multi.fit(features, labels, grid)
    with pytest.raises(ValueError, match=r"labels must be \(n,\) = \(4\)"):
        multi.fit(features, torch.zeros(24, dtype=torch.int64))
    with pytest.raises(ValueError, match="features must be of at least one image, got none"):
        multi.fit(features[:0], labels[:0])
    features[7] = float("nan")
    with pytest.raises(ValueError, match="logits must be finite, got 1 of 4 objects that are not"):
        multi.fit(features, labels)
    assert multi.weights == WEIGHTS


def test_the_repr_shows_head_and_weights() -> None:
    head = ck.MultiView(ck.ZeroShot(classes()), (0.5, 2))
    assert repr(head) == "MultiView(ZeroShot(classes=5, scale=100), weights=(0.5, 2))"
