"""Tip-Adapter and TIP-X: literal formulas, any support, the published grids, images added later."""

import pytest
import torch
from torch.nn.functional import normalize

import clipkernels as ck
from clipkernels.heads.weight_search import spaced

WIDTH, CLASSES = 12, 5
LABELS = [3, 0, 0, 1, 3, 3, 0, 3, 4, 1]  # none of class 2


def inputs(queries=7, labels=LABELS, seed=0, dtype=torch.float64):
    """Query and support embeddings, labels and class embeddings."""
    generator = torch.Generator().manual_seed(seed)
    text, features, support = (
        torch.randn(rows, WIDTH, generator=generator).to(dtype) for rows in (CLASSES, queries, len(labels))
    )
    return text, features, support, torch.tensor(labels)


def kl(p, q):
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True))


def calibrated(text, support, tau):
    """Slope and offset of ψ as a function of -M, from the pairs of different images."""
    text, support = normalize(text, dim=1), normalize(support, dim=1)
    shares = (support @ text.T / tau).softmax(1)
    pairs = [(i, j) for i in range(len(support)) for j in range(len(support)) if i != j]
    near = [float(support[i] @ support[j]) for i, j in pairs]
    apart = [float(kl(shares[i], shares[j])) for i, j in pairs]
    slope = (max(near) - min(near)) / (max(apart) - min(apart))
    return slope, min(near) + slope * max(apart), min(near)


def literal(text, features, support, labels, alpha, beta, gamma=0.0, tau=0.5, reduce="mean", psi=None):
    """The formula of SuS-X, one pair of images after another."""
    slope, offset, least = calibrated(text, support, tau) if psi is None else psi
    text, features, support = (normalize(x, dim=1) for x in (text, features, support))
    logits = 100 * features @ text.T
    shares = (support @ text.T / tau).softmax(1)
    for row, image in enumerate(features):
        query_share = (image @ text.T / tau).softmax(0)
        for k in range(CLASSES):
            members = [j for j, label in enumerate(labels.tolist()) if label == k]
            near = [torch.exp(-beta * (1 - image @ support[j])) for j in members]
            alike = [offset - slope * kl(query_share, shares[j]) for j in members]
            logits[row, k] += alpha * sum(near)
            share = sum(alike) / (len(members) if reduce == "mean" else 1) if members else least
            logits[row, k] += gamma * share
    return logits


def test_tip_adapter_adds_the_vote_of_each_support_image():
    text, features, support, labels = inputs()
    logits = ck.TipAdapter(text, support, labels, 1.7, 5.5)(features)
    torch.testing.assert_close(logits, literal(text, features, support, labels, 1.7, 5.5), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("labels", [LABELS, [0, 1, 2, 3, 4], [4, 4, 4, 4], [1, 0]])
@pytest.mark.parametrize("tau", [0.5, 0.1])
def test_tip_x_adds_the_similarity_of_class_distributions(labels, reduce, tau):
    text, features, support, labels = inputs(labels=labels)
    head = ck.TipX(text, support, labels, 1.3, 2.0, 0.8, tau, reduce)
    expected = literal(text, features, support, labels, 1.3, 2.0, 0.8, tau, reduce)
    torch.testing.assert_close(head(features), expected, atol=1e-9, rtol=1e-9)


def test_predictions_do_not_depend_on_other_images():
    text, features, support, labels = inputs()
    head = ck.TipX(text, support, labels)
    alone = torch.cat([head(image[None]) for image in features])
    torch.testing.assert_close(alone, head(features), atol=1e-10, rtol=1e-10)


def test_psi_extrapolates_linearly_outside_of_the_supports_range():
    text, features, support, labels = inputs()
    near = support[:4] + 0.01 * support[4:8]  # closer to each other than any query is to them
    head = ck.TipX(text, near, labels[:4], 0.0, 1.0, 1.0)
    expected = literal(text, features, near, labels[:4], 0.0, 1.0, 1.0)
    torch.testing.assert_close(head(features), expected, atol=1e-8, rtol=1e-8)
    assert (head(features) - ck.ZeroShot(text)(features)).min() < calibrated(text, near, 0.5)[2]


def test_one_image_or_equal_images_give_no_gamma_term():
    text, features, support, labels = inputs()
    expected = ck.TipAdapter(text, support[:1], labels[:1])(features)
    torch.testing.assert_close(ck.TipX(text, support[:1], labels[:1])(features), expected)
    twice = ck.TipX(text, support[:1].repeat(2, 1), labels[:2], alpha=0.0)(features)
    level = twice - ck.ZeroShot(text)(features)
    torch.testing.assert_close(level, level[:, :1].expand_as(level))


def test_an_empty_support_gives_zero_shot_logits():
    text, features, support, labels = inputs()
    for head in (ck.TipAdapter, ck.TipX):
        logits = head(text, support[:0], labels[:0])(features)
        torch.testing.assert_close(logits, ck.ZeroShot(text)(features))


@pytest.mark.parametrize("head", [ck.TipAdapter, ck.TipX])
def test_images_added_later_count_like_initial_ones(head):
    text, features, support, labels = inputs()
    complete, grown = head(text, support, labels), head(text, support[:3], labels[:3])
    for start, stop in ((3, 4), (4, 10)):
        grown.update(support[start:stop], labels[start:stop])
    torch.testing.assert_close(grown(features), complete(features), atol=1e-9, rtol=1e-9)
    assert grown.counts.tolist() == [3, 2, 0, 4, 1]


def test_calibration_in_chunks_gives_the_same_range(monkeypatch):
    text, features, support, labels = inputs()
    expected = ck.TipX(text, support, labels)(features)
    monkeypatch.setattr("clipkernels.heads.tip.PRODUCT_ENTRIES", 21)
    pieces = ck.TipX(text, support[:6], labels[:6])
    pieces.update(support[6:], labels[6:])
    torch.testing.assert_close(pieces(features), expected, atol=1e-9, rtol=1e-9)


def test_encoded_and_half_features_are_read_in_full_precision():
    text, features, support, labels = inputs(dtype=torch.float32)
    half = features.bfloat16()
    for head in (ck.TipAdapter(text, support, labels), ck.TipX(text.half(), support.half(), labels)):
        logits = head(ck.Encoded(half))
        assert logits.dtype == torch.float32 and torch.equal(logits, head(half.float()))


@pytest.mark.parametrize("head", [ck.TipAdapter, ck.TipX])
def test_autocast_changes_neither_the_calibration_nor_a_logit(head):
    text, features, support, labels = inputs(dtype=torch.float32)
    plain = head(text, support, labels)
    with torch.autocast("cpu", torch.bfloat16):
        under = head(text, support, labels)
        logits = under(features)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, plain(features)) and torch.equal(under(features), logits)


@pytest.mark.parametrize("head", [ck.TipAdapter, ck.TipX])
def test_heads_made_in_inference_mode_work_outside_in_any_dtype(head):
    text, features, support, labels = inputs(dtype=torch.float32)
    with torch.inference_mode():
        adapter = head(text.clone(), support.clone(), labels.clone())
        adapter(features.double())
    adapter.update(support[:1], labels[:1])
    query = features.clone().requires_grad_()
    logits = adapter(query)
    assert logits.dtype == torch.float32
    (grad,) = torch.autograd.grad(logits.sum(), query)
    assert grad.isfinite().all() and grad.abs().sum() > 0


@pytest.mark.parametrize("head", [ck.TipAdapter, ck.TipX])
def test_one_class_gives_one_logit(head):
    text, features, support, _ = inputs(dtype=torch.float32)
    logits = head(text[:1], support, torch.zeros(10, dtype=torch.int64))(features)
    assert logits.shape == (7, 1) and logits.isfinite().all()


@pytest.mark.parametrize("head", [ck.TipAdapter, ck.TipX])
def test_a_classifier_that_is_reset_keeps_its_support(head, tiny, images):
    _, _, tokenizer = ck.bundled()
    support, labels = torch.randn(4, 128), torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        classifier = ck.Classifier(tiny, tokenizer, ["cat", "dog"], head=lambda text: head(text, support, labels))
        before = classifier(images)
        classifier.reset()
        assert torch.equal(classifier(images), before)


@pytest.mark.parametrize(
    ("kind", "options", "ends", "gamma_unit"),
    [
        ("tip", {}, (7, 3), None),
        ("tip", {"grid": (50, 20)}, (50, 20), None),
        ("tipx", {"reduce": "sum"}, (50, 50), 1),
        ("tipx", {"reduce": "mean"}, (50, 50), 10 / 4),  # ten images of the four classes that have any
        ("tipx", {"reduce": "mean", "grid": (9, 5)}, (9, 5), 10 / 4),
    ],
)
def test_fit_finds_the_first_best_weights_of_the_published_grid(kind, options, ends, gamma_unit, monkeypatch):
    text, features, support, labels = inputs(40)
    truth = torch.randint(0, CLASSES, (40,), generator=torch.Generator().manual_seed(2))
    few = 6  # of the 200 values of beta, because more would add no other case
    monkeypatch.setattr(
        "clipkernels.heads.tip.spaced", lambda start, stop, steps: spaced(start, stop, few if steps == 200 else steps)
    )
    grid = {name: value for name, value in options.items() if name == "grid"}
    reduce = {name: value for name, value in options.items() if name == "reduce"}
    head = (ck.TipAdapter if kind == "tip" else ck.TipX)(text, support, labels, **reduce)
    base, best, chosen = ck.ZeroShot(text)(features), -1, None
    likeness = head._divergence_votes(features.div(features.norm(dim=1, keepdim=True))) if kind == "tipx" else None
    lowest = 0.1 if kind == "tip" else 1
    for beta in [i * (ends[0] - lowest) / few + lowest for i in range(few)]:
        votes = ck.TipAdapter(text, support, labels, 1.0, beta)(features) - base
        for alpha in [i * (ends[1] - 0.1) / 20 + 0.1 for i in range(20)]:
            for gamma in [gamma_unit * (i * (30 - 0.1) / 50 + 0.1) for i in range(50)] if kind == "tipx" else [0.0]:
                logits = base + alpha * votes + (gamma * likeness if kind == "tipx" else 0)
                right = int((logits.argmax(1) == truth).sum())
                if right > best:
                    best, chosen = right, (beta, alpha, gamma)
    assert head.fit(features, truth, **grid) == best / 40
    assert (head.beta, head.alpha) == pytest.approx(chosen[:2])
    assert kind == "tip" or head.gamma == pytest.approx(chosen[2])
    assert int((head(features).argmax(1) == truth).sum()) == best


def test_the_grid_of_tip_adapter_is_that_of_the_released_code(monkeypatch):
    text, features, support, labels = inputs()
    grids = []
    monkeypatch.setattr("clipkernels.heads.tip.spaced", lambda *args: grids.append(spaced(*args)) or grids[-1])
    ck.TipAdapter(text, support, labels).fit(features, torch.zeros(7, dtype=torch.int64))
    # beta_list = [i * (search_scale[0] - 0.1) / 200 + 0.1 for i in range(200)], and alpha likewise with 20
    alphas, betas = (next(values for values in grids if len(values) == steps) for steps in (20, 200))
    assert alphas.tolist() == pytest.approx([i * (3 - 0.1) / 20 + 0.1 for i in range(20)])
    assert betas.tolist() == pytest.approx([i * (7 - 0.1) / 200 + 0.1 for i in range(200)])


@pytest.mark.parametrize(
    ("head", "grid", "message"),
    [
        (ck.TipAdapter, (0.1, 3), "the grid of beta must end above 0.1, got 0.1"),
        (ck.TipAdapter, (7, 0), "the grid of alpha must end above 0.1, got 0"),
        (ck.TipX, (1, 3), "the grid of beta must end above 1.0, got 1"),
        (ck.TipX, (7, float("nan")), "the end of the grid of alpha must be a finite number, got nan"),
    ],
)
def test_a_grid_that_holds_nothing_is_refused(head, grid, message):
    text, features, support, labels = inputs()
    adapter = head(text, support, labels)
    with pytest.raises(ValueError, match=message):
        adapter.fit(features, torch.zeros(7, dtype=torch.int64), grid)
    assert (adapter.alpha, adapter.beta) == (1.17, 1.0)


def test_gammas_of_means_and_of_sums_are_one_search_if_classes_are_equal():
    text, features, support, _ = inputs(40)
    labels, truth = torch.arange(10) % CLASSES, torch.arange(40) % CLASSES
    by_mean, by_sum = (ck.TipX(text, support, labels, reduce=reduce) for reduce in ("mean", "sum"))
    assert by_mean.fit(features, truth) == by_sum.fit(features, truth)
    assert by_mean.gamma == pytest.approx(2 * by_sum.gamma)  # two images per class
    torch.testing.assert_close(by_mean(features), by_sum(features))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.randn(10, 3)}, r"features must be \(n,E\) with E = 12, got \(10,3\)"),
        ({"labels": torch.zeros(9, dtype=torch.int64)}, r"labels must be \(n,\) = \(10\) torch.int64, got \(9\)"),
        ({"labels": torch.full((10,), 5)}, "labels must be from 0 to 4, got 5 to 5"),
        ({"text": torch.randn(12)}, r"text must be class embeddings \(K,E\)"),
        ({"tau": 0.0}, "tau must be a positive number, got 0.0"),
        ({"beta": float("nan")}, "beta must be a finite number, got nan"),
        ({"gamma": float("inf")}, "gamma must be a finite number, got inf"),
        ({"features": torch.full((10, 12), float("nan"))}, "features must be finite, got 10 of 10 rows that are not"),
        ({"reduce": "max"}, 'reduce must be "mean" or "sum", got \'max\''),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    text, _, support, labels = inputs()
    with pytest.raises(ValueError, match=message):
        ck.TipX(**{"text": text, "features": support, "labels": labels, **change})


def test_a_refused_update_changes_nothing():
    text, features, support, labels = inputs()
    head = ck.TipX(text, support, labels)
    before = head(features)
    with pytest.raises(ValueError, match="labels must be from 0 to 4"):
        head.update(support, labels + 4)
    with pytest.raises(ValueError, match="got 1 of 10 rows that are not"):
        head.update(torch.cat([support[1:], torch.full((1, WIDTH), float("inf"))]), labels)
    with pytest.raises(ValueError, match="at least one image"):
        head.fit(features[:0], labels[:0])
    assert torch.equal(head(features), before)
