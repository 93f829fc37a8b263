"""Quality: figures against loops, ties, lost embeddings, bounds that cover, and memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkernels.measure.memory import peak
from clipkernels.tuning import nearest as neighbours
from clipkernels.tuning.bounds import bound_of, figure, holds, risk_of, sample_warning
from clipkernels.tuning.budget import Constraint, parse_budget
from clipkernels.tuning.quality import damage, per_image, trend
from clipkernels.tuning.reference import Against, Reference, check_measurable

pytestmark = pytest.mark.usefixtures("one_thread")
N, WIDTH, CLASSES = 41, 6, 4
NAMES = ["recall@1>=.9", "recall@7>=.9", "cosine_p1>=.9", "cosine_mean>=.9", "accuracy_drop<=.1", "text_recall@3>=.1"]


def constraint_of(text: str) -> Constraint:
    return parse_budget(text)[0]


def embeddings(seed: int, noise: float = 0.8) -> tuple[Tensor, Tensor]:
    """Dense embeddings (N,WIDTH) with two equal rows, and reduced ones; neither is normalised."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(N, WIDTH, generator=generator)
    dense[30] = dense[3]
    return dense, 3 * (dense + noise * torch.randn(N, WIDTH, generator=generator))


def reference_of(dense: Tensor, against: Against = "dense", seed: int = 0) -> Reference:
    """A reference with labels and captions, some of them equal."""
    generator = torch.Generator().manual_seed(seed)
    captions = dense + 2 * torch.randn(len(dense), dense.shape[1], generator=generator)
    captions[[5, 9]] = captions[0].clone()
    return Reference(
        dense,
        against,
        labels=torch.randint(CLASSES, (len(dense),), generator=generator),
        classes=torch.randn(CLASSES, dense.shape[1], generator=generator),
        captions=captions,
    )


def cosines(a: Tensor, b: Tensor) -> np.ndarray:
    return (normalize(a.double(), dim=1) @ normalize(b.double(), dim=1).T).numpy()


def nearest(row: np.ndarray, k: int, without: int | None = None) -> list[int]:
    """The k largest places; equal values count as equal up to 1e-6 and go to the lower place."""
    order = sorted(
        (place for place in range(len(row)) if place != without), key=lambda p: (-round(float(row[p]), 6), p)
    )
    return order[:k]


def expected(constraint: Constraint, reduced: Tensor, reference: Reference) -> list[float]:
    """The values of a figure by definition, in loops over images."""
    dense, k, n = reference.dense, constraint.k or 0, len(reference)
    own, index = cosines(reduced, dense), cosines(reduced, reduced)
    if constraint.name in ("cosine_p1", "cosine_mean"):
        return [own[i, i] for i in range(n)]
    if constraint.name == "recall" and reference.against == "dense":
        return [float(sum(own[i, j] > own[i, i] + 1e-6 for j in range(n)) < k) for i in range(n)]
    if constraint.name == "recall":
        first = cosines(dense, dense)
        pairs = [(nearest(first[i], k, i), nearest(index[i], k, i)) for i in range(n)]
        return [len(set(a) & set(b)) / k for a, b in pairs]
    if constraint.name == "accuracy_drop":
        assert reference.classes is not None and reference.labels is not None
        labels = reference.labels.tolist()
        a, b = (cosines(x, reference.classes) for x in (dense, reduced))
        return [float(a[i].argmax() == labels[i]) - float(b[i].argmax() == labels[i]) for i in range(n)]
    assert reference.captions is not None and reference.caption_ids is not None
    table, ids = cosines(reference.captions, reduced), reference.caption_ids.tolist()
    return [float(any(ids[j] == ids[i] for j in nearest(table[i], k))) for i in range(n)]


@pytest.mark.parametrize("against", ["dense", "same"])
@pytest.mark.parametrize("text", NAMES)
@pytest.mark.parametrize("block", [1 << 23, 3 * N])
def test_values_are_those_of_loops(text: str, against: Against, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK_VALUES", block)
    constraint = constraint_of(text)
    for seed in range(4):
        dense, reduced = embeddings(seed)
        reference = reference_of(dense, against, seed)
        values = per_image(constraint, reduced, reference)
        wanted = torch.tensor(expected(constraint, reduced, reference), dtype=torch.float64)
        assert values.dtype == torch.float64
        torch.testing.assert_close(values, wanted, rtol=0, atol=1e-7 if "cosine" in text else 0)
        mean = np.percentile(wanted, 1) if constraint.name == "cosine_p1" else wanted.mean().item()
        assert math.isclose(figure(constraint, values), mean, abs_tol=1e-7)


@pytest.mark.parametrize("against", ["dense", "same"])
@pytest.mark.parametrize("text", NAMES)
def test_dense_embeddings_lose_nothing(text: str, against: Against) -> None:
    constraint, (dense, _) = constraint_of(text), embeddings(0)
    value = figure(constraint, per_image(constraint, dense, reference_of(dense, against)))
    if constraint.name == "text_recall":
        assert 0.2 < value < 1
    else:
        assert abs(value - (constraint.name != "accuracy_drop")) < 1e-12


@pytest.mark.parametrize("against", ["dense", "same"])
def test_images_with_equal_content_do_not_push_each_other_out(against: Against) -> None:
    rows = normalize(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    dense = rows.repeat_interleave(4, 0)
    for text in ("recall@1>=.9", "recall@3>=.9", "recall@5>=.9"):
        constraint = constraint_of(text)
        # Scaled, so that normalising rounds them anew.
        values = per_image(constraint, dense * torch.rand(12, 1).add(0.5), Reference(dense, against))
        assert values.tolist() == [1.0] * 12
    assert Reference(dense).nearest(2).tolist()[:6] == [[1, 2], [0, 2], [0, 1], [0, 1], [5, 6], [4, 6]]


@pytest.mark.parametrize("against", ["dense", "same"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_lost_embedding_counts_as_the_worst(against: Against, bad: float) -> None:
    dense, reduced = embeddings(1, noise=0.1)
    reduced[7] = bad
    reference, others = reference_of(dense, against, 1), torch.arange(N) != 7
    for text in NAMES:
        constraint = constraint_of(text)
        value = per_image(constraint, reduced, reference)
        assert value.isfinite().all()
        if constraint.name == "accuracy_drop":
            clean = expected(constraint, dense, reference)
            assert reference.labels is not None and reference.classes is not None and clean[7] == 0.0
            right = cosines(dense, reference.classes)[7].argmax() == reference.labels[7].item()
            assert value[7] == float(right)
        elif constraint.name != "text_recall":  # images that share its caption may be found
            assert value[7] == (-1 if "cosine" in text else 0)
        if constraint.name == "recall" and against == "same":
            # It is nobody's neighbour, and leaves a place to the next.
            holder = [i for i in range(N) if i != 7 and 7 in reference.nearest(constraint.k or 1)[i].tolist()]
            assert all(value[i] < 1 for i in holder) and value[others].mean() > 0.5
    lost = torch.full_like(reduced, bad)
    for text in NAMES:
        constraint = constraint_of(text)
        value = per_image(constraint, lost, reference)
        assert (value >= 0).all() if constraint.name == "accuracy_drop" else (value <= 0).all()


def test_captions_of_equal_text_share_their_images() -> None:
    dense = torch.eye(6)
    captions = torch.eye(6).roll(1, 0)  # the caption of image i is nearest to image i-1
    constraint = constraint_of("text_recall@1>=.5")
    alone = Reference(dense, captions=captions)
    together = Reference(dense, captions=captions, caption_ids=torch.tensor([0, 0, 1, 2, 3, 4]))
    assert per_image(constraint, dense, alone).tolist() == [0.0] * 6
    assert per_image(constraint, dense, together).tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_subset_is_a_gallery_of_its_own() -> None:
    dense, reduced = embeddings(2)
    index = torch.tensor([30, 3, 8, 11, 0, 40, 17, 5, 9])
    for against in ("dense", "same"):
        reference = reference_of(dense, against, 2)
        part = reference.subset(index)
        for text in NAMES:
            constraint = constraint_of(text)
            wanted = torch.tensor(expected(constraint, reduced[index], part), dtype=torch.float64)
            torch.testing.assert_close(per_image(constraint, reduced[index], part), wanted, rtol=0, atol=1e-7)


def test_recall_falls_as_the_gallery_grows() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(400, 8, generator=generator)
    reduced = dense + 0.5 * torch.randn(400, 8, generator=generator)
    for against in ("dense", "same"):
        reference, constraint = Reference(dense, against), constraint_of("recall@1>=.9")
        figures = trend(constraint, reduced, reference)
        assert list(figures) == [100, 200, 400] and figures[100] > figures[200] > figures[400]
        assert figures[400] == figure(constraint, per_image(constraint, reduced, reference))
        assert figures == trend(constraint, reduced, reference)
    assert list(trend(constraint_of("recall@150>=.9"), reduced, Reference(dense))) == [200, 400]


def test_damage_is_the_mean_or_the_tail_of_the_loss() -> None:
    dense, reduced = embeddings(3)
    loss = np.sort(1 - np.diag(cosines(reduced, dense)))[::-1]
    reference = Reference(dense)
    assert math.isclose(damage(reduced, reference), loss.mean(), abs_tol=1e-7)
    assert math.isclose(damage(reduced, reference, "tail"), loss[:5].mean(), abs_tol=1e-7)
    assert damage(dense, reference, "tail") < 1e-12
    big, small = dense.repeat(10, 1), reduced.repeat(10, 1)
    worst = np.sort(np.repeat(loss, 10))[::-1][:8]
    assert math.isclose(damage(small, Reference(big), "tail"), worst.mean(), abs_tol=1e-7)


def test_a_bound_is_kept_up_to_rounding() -> None:
    at_least, at_most = constraint_of("recall@1>=.9"), constraint_of("accuracy_drop<=.1")
    assert holds(at_least, 0.9) and holds(at_least, sum([0.1] * 9)) and not holds(at_least, 0.8999)
    assert holds(at_most, 0.1) and holds(at_most, -1.0) and not holds(at_most, 0.1001)
    assert not holds(at_least, math.nan) and not holds(at_most, math.nan)


def test_the_bound_of_a_share_is_clopper_and_pearsons() -> None:
    constraint = constraint_of("recall@1>=.9")
    perfect = torch.ones(299, dtype=torch.float64)
    assert abs(bound_of(constraint, perfect, resamples=20_000) - 0.05 ** (1 / 299)) < 2e-4
    values = torch.ones(200, dtype=torch.float64)
    values[:5] = 0
    # P(X ≥ 195) = 0.05 for X binomial (200, 0.948245)
    assert abs(bound_of(constraint, values, resamples=20_000) - 0.948245) < 5e-4
    assert bound_of(constraint, values, seed=3) == bound_of(constraint, values, seed=3)
    assert bound_of(constraint, values, level=0.99) < bound_of(constraint, values) < values.mean()


def test_the_bound_of_a_drop_is_above_it() -> None:
    constraint = constraint_of("accuracy_drop<=.1")
    values = torch.zeros(400, dtype=torch.float64)
    assert abs(bound_of(constraint, values, resamples=20_000) - (1 - 0.05 ** (1 / 400))) < 2e-4
    values[:20], values[20:30] = 1, -1
    assert 0.035 < bound_of(constraint, values) < 0.06


def test_the_bound_of_a_percentile_is_an_order_statistic() -> None:
    constraint, values = constraint_of("cosine_p1>=.9"), torch.rand(1000, generator=torch.Generator().manual_seed(0))
    # P(X ≥ 5) = 0.971 and P(X ≥ 6) = 0.934 for X binomial (1000, 0.01)
    assert bound_of(constraint, values) == values.double().sort().values[4].item()
    assert bound_of(constraint, values[:299]) == values[:299].min().item()
    assert bound_of(constraint, values[:298]) == -1.0
    assert bound_of(constraint, torch.rand(200_000)) > 0.009


def test_a_sample_that_proves_nothing_is_named() -> None:
    cases = {
        ("cosine_p1>=.9", 298): "cosine_p1>=0.9 needs 299 held-out images for a bound at 95%, got 298: add images",
        ("recall@1>=.99", 298): "recall@1>=0.99 needs 299 held-out images for a bound at 95%, got 298: add images",
        ("accuracy_drop<=.005", 500): "accuracy_drop<=0.005 needs 598 held-out images for a bound at 95%, got 500: "
        "add images",
        ("recall@1>=1", 10**6): "recall@1>=1 cannot be proved on a sample: allow a loss, such as recall@1>=0.99",
        ("accuracy_drop<=0", 10**6): "accuracy_drop<=0 cannot be proved on a sample: allow a loss, such as "
        "accuracy_drop<=0.005",
    }  # fmt: skip
    for (text, n), message in cases.items():
        assert sample_warning(constraint_of(text), n) == message
    for text, n in (
        ("cosine_p1>=.9", 299),
        ("recall@1>=.99", 299),
        ("accuracy_drop<=.005", 598),
        ("cosine_mean>=1", 9),
    ):
        assert sample_warning(constraint_of(text), n) is None
    for text in ("recall@1>=.99", "accuracy_drop<=.01"):
        constraint = constraint_of(text)
        perfect = torch.full((299,), float(constraint.direction == ">="), dtype=torch.float64)
        assert abs(bound_of(constraint, perfect, resamples=20_000) - constraint.bound) < 2e-4


def cosine_sample(generator: torch.Generator, n: int) -> Tensor:
    """Cosines with a long lower tail: 1 - x²/100, x the sum of two exponentials."""
    steps = torch.empty(2, n, dtype=torch.float64).exponential_(generator=generator)
    return 1 - steps.sum(0).square() / 100


def share_sample(generator: torch.Generator, n: int) -> Tensor:
    return (torch.rand(n, generator=generator) < 0.985).double()


def drop_sample(generator: torch.Generator, n: int) -> Tensor:
    draw = torch.rand(n, generator=generator)
    return (draw < 0.02).double() - (draw > 0.99).double()


@pytest.mark.parametrize("text", ["cosine_p1>=.74", "cosine_mean>=.947", "recall@1>=.9", "accuracy_drop<=.1"])
def test_the_bound_at_the_level_of_a_risk_is_the_budget(text: str) -> None:
    generator = torch.Generator().manual_seed(1)
    shares = (torch.rand(800, generator=generator) < 0.92).double()
    cosines = 1 - 0.05 * torch.empty(800, dtype=torch.float64).exponential_(generator=generator)
    values = {"recall": shares, "accuracy_drop": 1 - shares}.get(constraint_of(text).name, cosines)
    constraint = constraint_of(text)
    risk = risk_of(constraint, values)
    assert 0.001 < risk < 0.5
    assert holds(constraint, bound_of(constraint, values, level=1 - risk - 0.002))
    assert not holds(constraint, bound_of(constraint, values, level=1 - risk + 0.002))


def test_perfect_values_have_the_risk_of_the_sample() -> None:
    assert risk_of(constraint_of("cosine_p1>=.9"), torch.ones(299)) == pytest.approx(0.99**299, rel=1e-9)
    assert risk_of(constraint_of("cosine_p1>=.9"), torch.zeros(50)) == 1
    assert risk_of(constraint_of("recall@1>=.9"), torch.zeros(50)) == 1


@pytest.mark.parametrize(
    ("text", "sample", "n", "true"),
    [
        ("cosine_mean>=.9", cosine_sample, 250, 0.94),
        ("cosine_p1>=.9", cosine_sample, 500, 1 - 6.638352**2 / 100),
        ("recall@1>=.9", share_sample, 250, 0.985),
        ("accuracy_drop<=.1", drop_sample, 250, 0.01),
    ],
)
def test_bounds_cover_the_true_value(
    text: str, sample: Callable[[torch.Generator, int], Tensor], n: int, true: float
) -> None:
    constraint, generator = constraint_of(text), torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(300):
        bound = bound_of(constraint, sample(generator, n), seed=seed)
        covered += bound <= true if constraint.direction == ">=" else bound >= true
    assert covered >= 0.93 * 300


@pytest.mark.parametrize(
    ("n", "block"), [(2000, 1 << 18), pytest.param(20_000, neighbours.BLOCK_VALUES, marks=pytest.mark.slow)]
)
def test_a_gallery_is_never_compared_at_once(n: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK_VALUES", block)
    generator, constraint = torch.Generator().manual_seed(0), constraint_of("recall@1>=.9")
    dense = torch.randn(n, 4, generator=generator)
    reduced = dense + 0.01 * torch.randn(n, 4, generator=generator)
    for against in ("dense", "same"):
        reference = Reference(dense, against)
        used = peak(partial(per_image, constraint, reduced, reference), dense.device)
        assert used is not None and used < 6 * 8 * block + 100 * 8 * n  # a few blocks and columns


def test_wrong_references_are_refused_in_one_line() -> None:
    dense, reduced = embeddings(0)
    plain = Reference(dense)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: Reference(dense, "index"), 'against must be "dense" or "same"'),  # type: ignore[arg-type]
        (
            lambda: Reference(dense.masked_fill(torch.arange(N)[:, None] == 4, math.nan)),
            "zero, got row 4: leave it out",
        ),
        (lambda: Reference(dense[0]), r"dense must be \(n,E\) with n ≥ 1, got \(6\)"),
        (lambda: Reference(dense[:0]), "dense must be"),
        (lambda: Reference(dense, labels=torch.zeros(N).long()), "expected labels with class embeddings"),
        (lambda: Reference(dense, labels=torch.zeros(N), classes=dense), "labels must be ints"),
        (lambda: Reference(dense, labels=torch.full((N,), 3), classes=dense[:3]), "labels must be from 0 to 2, got 3"),
        (lambda: Reference(dense, classes=dense[:, :2], labels=torch.zeros(N).long()), r"classes must be \(K,E\)"),
        (lambda: Reference(dense, captions=dense[:2]), r"captions must be \(n,E\) = \(41,6\), got \(2,6\)"),
        (lambda: per_image(constraint_of("recall@1>=.9"), reduced[:3], plain), r"reduced must be \(n,E\) = \(41,6\)"),
        (
            lambda: per_image(constraint_of("recall@41>=.9"), reduced, plain),
            "expected more than 41 images for recall@41",
        ),
        (lambda: per_image(constraint_of("accuracy_drop<=.1"), reduced, plain), "expected labelled images"),
        (lambda: per_image(constraint_of("text_recall@1>=.1"), reduced, plain), "expected captions for text_recall@1"),
        (lambda: check_measurable(constraint_of("gmacs<=1"), plain), "it is about cost"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
