"""TDA: a literal stream of single images, ties and bits at any batch size, views, files, and refused input."""

import math
from itertools import chain
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import normalize

import clipkernels as ck
from clipkernels.heads.presets import RESERVOIR_PRESETS, TDA_PRESETS
from clipkernels.heads.tda_entries import lifetimes
from tests.mutants import read, write

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES, WIDTH = 6, 8
SPLITS = [[1] * 60, [7, 1, 32, 20], [60], [0, 59, 1]]


class Item(NamedTuple):
    """An item of a cache: its entropy, its key (E,), its probabilities (K,) and its arrival number."""

    entropy: float
    key: torch.Tensor
    share: torch.Tensor
    arrival: int


class Literal:
    """TDA as its paper and its code read, one image after another, with a list per class."""

    def __init__(self, text, strength=2.0, beta=5.0, scale=100.0, limits=(0.2, 0.5), capacities=(3, 2), threshold=0.03):
        self.text, self.scale, self.limits, self.capacities = normalize(text, dim=1), scale, limits, capacities
        self.strength, self.beta, self.threshold = strength, beta, threshold
        self.positive, self.negative = ([[] for _ in text] for _ in range(2))
        self.arrivals = 0

    def see(self, views):
        """The logits (K,) of one image from its views (V,E), of which a tenth counts."""
        keys = normalize(views, dim=1)
        logits = self.scale * keys @ self.text.T
        if len(views) > 1:
            entropies = [-(row.softmax(0) * row.log_softmax(0)).sum().item() for row in logits]
            order = sorted(range(len(views)), key=lambda view: (entropies[view], view))
            chosen = order[: int(len(views) * 0.1)]
            key, share, logits = keys[chosen].mean(0), logits[chosen].softmax(1).mean(0), logits[chosen].mean(0)
        else:
            key, share, logits = keys[0], logits[0].softmax(0), logits[0]
        entropy = -(share * share.log()).sum().item()
        item, place = Item(entropy, key, share, self.arrivals), int(logits.argmax())
        self.arrivals += 1
        if not math.isfinite(entropy):
            return logits
        self.join(self.positive[place], item, self.capacities[0])
        if self.limits[0] < entropy / math.log2(len(self.text)) < self.limits[1]:
            self.join(self.negative[place], item, self.capacities[1])
        corrected = logits.clone()
        for place, items in enumerate(self.positive):
            for item in items:
                corrected[place] += self.strength * math.exp(-self.beta * (1 - float(key @ item.key)))
        for item in chain(*self.negative):
            vote = math.exp(-1.0 * (1 - float(key @ item.key)))
            for place, share in enumerate(item.share.tolist()):
                corrected[place] -= 0.117 * vote * (self.threshold < share < 1)
        return corrected

    def join(self, items, item, capacity):
        if len(items) < capacity:
            items.append(item)
        elif item.entropy < items[-1].entropy:
            items[-1] = item
        items.sort(key=lambda item: item.entropy)

    def arrivals_of(self, cache):
        return [[item.arrival for item in items] for items in cache]


def stream(count=60, seed=0, dtype=torch.float64):
    """Class embeddings, and images near them, of which some come twice and some are not finite."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(CLASSES, WIDTH, generator=generator).to(dtype)
    images = normalize(text, dim=1)[torch.randint(0, CLASSES, (count,), generator=generator)]
    images = images + 0.35 * torch.randn(count, WIDTH, generator=generator).to(dtype)
    for place in range(5, count, 6):
        images[place] = images[place - 4]
    images[11 % count, 2], images[23 % count, 1] = float("nan"), float("inf")
    return text, images


def arrivals_of(entries):
    return [[number for number in row if number >= 0] for row in entries.arrival.tolist()]


@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("choices", [{}, {"capacities": (1, 1)}, {"capacities": (5, 4), "threshold": 0.2}])
def test_a_batch_equals_its_images_one_by_one(sizes, seed, choices):
    text, images = stream(seed=seed)
    literal = Literal(text, scale=9.0, limits=(0.1, 0.6), **choices)
    expected = torch.stack([literal.see(image[None]) for image in images])
    capacity, negative_capacity = literal.capacities
    head = ck.TDA(
        text, capacity=capacity, negative_capacity=negative_capacity, threshold=literal.threshold, scale=9.0,
        entropy_range=(0.1, 0.6),
    )  # fmt: skip
    logits = torch.cat([head(batch) for batch in images.split(sizes)])
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-10, equal_nan=True)
    assert logits.isnan().any(1).nonzero().flatten().tolist() == [11, 23] and head.seen == 60
    for entries, cache in ((head._positive, literal.positive), (head._negative, literal.negative)):
        assert arrivals_of(entries) == literal.arrivals_of(cache) and sum(map(len, cache)) > CLASSES / 2
        assert torch.equal(entries.keys[entries.arrival >= 0], torch.stack([i.key for i in chain(*cache)]))
    assert head.counts.tolist() == [len(items) for items in literal.positive]
    assert head.negative_counts.tolist() == [len(items) for items in literal.negative]


def signs(count, seed):
    """Rows of ±1, whose cosines are exact and often equal, and a class embedding per sign pattern of few bits."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 2, (CLASSES, 16), generator=generator) * 2.0 - 1
    images = text[torch.randint(0, CLASSES, (count,), generator=generator)]
    return text, images * (1 - 2 * (torch.rand(count, 16, generator=generator) < 0.2).float())


@pytest.mark.parametrize("seed", range(4))
def test_batching_changes_no_bit_where_products_are_exact(seed, monkeypatch):
    text, images = signs(150, seed)
    results = []
    for size, at_once in ((1, 256), (7, 256), (150, 256), (150, 11), (64, 64)):
        monkeypatch.setattr("clipkernels.heads.tda.IMAGES", at_once)
        head = ck.TDA(text, scale=8.0, entropy_range=(0.05, 0.4))
        results.append((torch.cat([head(batch) for batch in images.split(size)]), head))
    logits, first = results[0]
    assert len(set(first._positive.entropy.flatten().tolist())) < 3 * CLASSES  # some tie
    assert first.negative_counts.sum() > CLASSES
    for others, head in results[1:]:
        assert torch.equal(others, logits)
        for entries, expected in ((head._positive, first._positive), (head._negative, first._negative)):
            assert all(torch.equal(x, y) for x, y in zip(entries, expected, strict=True))


@pytest.mark.parametrize("capacity", [1, 2, 3, 5])
def test_lifetimes_are_those_of_a_list_that_replaces_its_last(capacity):
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        old, new = 4 * capacity, 30
        group = torch.cat(
            [torch.arange(4).repeat_interleave(capacity), torch.randint(0, 4, (new,), generator=generator)]
        )
        entropy = torch.randint(0, 9, (old + new,), generator=generator) / 8
        entropy[:old] = entropy[:old].view(4, capacity).sort(1).values.flatten()
        birth = torch.cat(
            [torch.zeros(old, dtype=torch.int64), torch.randperm(50, generator=generator)[:new].sort()[0] + 1]
        )
        order, death = lifetimes(group, entropy, birth, 50, capacity)
        actual = {int(candidate): int(time) for candidate, time in zip(order, death, strict=True)}
        lists = [list(range(k * capacity, (k + 1) * capacity)) for k in range(4)]
        for candidate in range(old, old + new):
            held = lists[int(group[candidate])]
            if entropy[candidate] >= entropy[held[-1]]:
                assert actual[candidate] <= birth[candidate]
                continue
            assert actual[held[-1]] == birth[candidate]
            held[-1] = candidate
            held.sort(key=lambda place: float(entropy[place]))
        assert all(actual[candidate] > 50 for candidate in chain(*lists))
        key = [(int(group[i]), float(entropy[i]), int(i)) for i in order]
        assert key == sorted(key)


def test_lifetimes_of_nothing_and_of_classes_with_room():
    none = torch.empty(0, dtype=torch.int64)
    assert [len(part) for part in lifetimes(none, none.float(), none, 5, 3)] == [0, 0]
    order, death = lifetimes(torch.tensor([1, 0, 1]), torch.tensor([0.5, 0.1, 0.2]), torch.tensor([1, 2, 3]), 3, 2)
    assert order.tolist() == [1, 2, 0] and (death > 3).all()


def test_an_uncertain_image_votes_against_the_classes_it_may_be():
    # Shares .9, .05, .04 and .01: an entropy of .419 nats, .21 of log2 4. The last is below the threshold.
    logits = torch.tensor([0.9, 0.05, 0.04, 0.01], dtype=torch.float64).log()
    logits = logits - logits.mean()
    image, text = logits / logits.norm(), torch.eye(4, dtype=torch.float64)
    head = ck.TDA(text, scale=float(logits.norm()))
    corrected = head(image[None])[0] - logits
    torch.testing.assert_close(corrected, torch.tensor([2 - 0.117, -0.117, -0.117, 0.0], dtype=torch.float64))
    assert head._negative.targets[0, 0].tolist() == [-1, 0, 1, 2]
    # A surer image has an entropy of .18 of log2 4 and stays out of the negative cache.
    surer = torch.tensor([0.92, 0.04, 0.03, 0.01], dtype=torch.float64).log()
    surer = surer - surer.mean()
    head = ck.TDA(text, scale=float(surer.norm()))
    torch.testing.assert_close(head(surer[None])[0] - surer, torch.tensor([2.0, 0, 0, 0], dtype=torch.float64))
    assert head.negative_counts.sum() == 0 and head.counts.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("preset", ["eurosat", "food101", "imagenet_sketch"])
def test_presets_correct_by_the_formula(preset):
    text, images = stream(30, seed=1)
    head = ck.TDA(text, preset)
    literal = Literal(text, *TDA_PRESETS[preset])
    expected = torch.stack([literal.see(image[None]) for image in images])
    torch.testing.assert_close(head(images), expected, atol=1e-10, rtol=1e-10, equal_nan=True)


def test_presets_are_those_of_the_reservoir_and_arguments_override_them():
    assert TDA_PRESETS.keys() == RESERVOIR_PRESETS.keys()
    head = ck.TDA(torch.eye(3), "eurosat", beta=1.5)
    assert (head.strength, head.beta, head.capacity) == (4, 1.5, 3)
    assert (head.negative_strength, head.negative_beta, head.negative_capacity) == (0.117, 1.0, 2)


@pytest.mark.parametrize("split", [1, 4, 12])
@pytest.mark.parametrize("views", [10, 64])
def test_the_views_of_least_entropy_stand_for_an_image(views, split):
    text, images = stream(12, seed=4)
    images[11], images[5] = images[3], images[2]  # no image here without a finite view
    noise = 0.3 * torch.randn(12, views, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    embeddings = images[:, None] + noise
    embeddings[7, 3] = float("nan")
    literal = Literal(text, scale=9.0, limits=(0.1, 0.6))
    finite = embeddings.clone()
    finite[7, 3] = torch.linalg.svd(text).Vh[-1]  # at right angles to every class: the largest entropy
    expected = torch.stack([literal.see(image) for image in finite])
    head = ck.TDA(text, scale=9.0, entropy_range=(0.1, 0.6))
    logits = torch.cat([head.from_views(batch) for batch in embeddings.split(split)])
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-10)
    assert arrivals_of(head._positive) == literal.arrivals_of(literal.positive)
    assert arrivals_of(head._negative) == literal.arrivals_of(literal.negative) != [[]] * CLASSES
    lengths = head._positive.keys[head._positive.arrival >= 0].norm(dim=1)
    assert (lengths <= 1 + 1e-9).all() and (views == 10) == bool((lengths > 1 - 1e-9).all())


def test_one_view_is_an_image():
    text, images = stream()
    for views in (images[:, None], images[:, None].expand(-1, 9, -1)):
        torch.testing.assert_close(ck.TDA(text).from_views(views), ck.TDA(text)(images), equal_nan=True)
    three = torch.stack([images, images.roll(1, 0), images.roll(2, 0)], 1)
    whole = ck.TDA(text, frozen=True).from_views(three, keep=3)
    mean = ck.ZeroShot(text)(three.flatten(0, 1)).view(60, 3, CLASSES).mean(1)
    torch.testing.assert_close(whole, mean, equal_nan=True)


def test_a_frozen_head_stores_nothing():
    text, images = stream()
    head = ck.TDA(text, frozen=True)
    assert torch.equal(head(images[:5]), ck.ZeroShot(text)(images[:5])) and head.seen == 0
    head.frozen = False
    head(images[:40])
    before = [tensor.clone() for entries in (head._positive, head._negative) for tensor in entries]
    head.frozen = True
    once, again = head(images[40:]), head(images[40:])
    assert torch.equal(once, again) and not torch.equal(once, ck.ZeroShot(text)(images[40:]))
    after = [tensor for entries in (head._positive, head._negative) for tensor in entries]
    assert all(map(torch.equal, before, after)) and head.seen == 40
    head.reset()
    assert head.counts.sum() == 0 and head.negative_counts.sum() == 0 and head.seen == 0
    head.frozen = False
    torch.testing.assert_close(head(images), ck.TDA(text)(images), equal_nan=True)


def test_images_that_are_not_finite_change_nothing():
    text, images = stream()
    finite = images.isfinite().all(1)
    head, clean = ck.TDA(text), ck.TDA(text)
    torch.testing.assert_close(head(images)[finite], clean(images[finite]))
    assert torch.equal(head._positive.keys, clean._positive.keys) and head._negative.keys.isfinite().all()


@pytest.mark.parametrize("classes", [1, 2])
def test_few_classes_have_few_logits(classes):
    text, images = stream(dtype=torch.float32)
    head = ck.TDA(text[:classes], scale=2.0)
    logits = head(images)
    assert logits.shape == (60, classes) and logits[0].isfinite().all() and head.counts.sum() == 3 * classes
    assert (head.negative_counts.sum() > 0) == (classes > 1)


def test_half_features_are_read_in_single_precision_under_autocast():
    text, images = stream(dtype=torch.float32)
    half = images[:10].bfloat16()
    expected = ck.TDA(text)(half.float())
    assert torch.equal(ck.TDA(text.half().float())(ck.Encoded(half)), ck.TDA(text.half())(half))
    with torch.autocast("cpu", torch.bfloat16):
        logits = ck.TDA(text)(half)
        views = ck.TDA(text).from_views(half[:, None])
    assert logits.dtype == views.dtype == torch.float32
    assert torch.equal(logits, expected)
    torch.testing.assert_close(views, expected)


def test_entries_stored_in_inference_mode_serve_outside_of_it():
    text, images = stream(dtype=torch.float32)
    images = images[:11].clone().requires_grad_()
    with torch.inference_mode():
        head = ck.TDA(text)
        head(images[:4])
    logits = head(images[4:8])
    assert logits.requires_grad
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    assert (gradient[4:8] != 0).any() and gradient.isfinite().all()
    with torch.inference_mode():
        head(images[8:])
    assert torch.equal(head._positive.arrival, (whole := ck.TDA(text), whole(images))[0]._positive.arrival)
    assert head(images.detach().double()).dtype == torch.float64  # the entries follow


def test_a_classifier_adapts_with_any_method(tiny, images):
    _, _, tokenizer = ck.bundled()
    with torch.no_grad():
        classifier = ck.Classifier(tiny, tokenizer, ["cat", "dog", "ship"], method=ck.ToMe(4), head=ck.TDA)
        first = classifier(images)
        assert classifier.head.seen == len(images) and classifier.head.needs == ()
        expected = ck.TDA(classifier.head.zero_shot.text)(tiny.encode_image(images))
        assert torch.equal(first, expected) and not torch.equal(classifier(images), first)
        classifier.reset()
        assert torch.equal(classifier(images), first)


def test_loaded_caches_continue_the_stream(tmp_path):
    text, images = stream(dtype=torch.float32)
    file, head = tmp_path / "caches.safetensors", ck.TDA(text, scale=9.0)
    head(images[:40])
    head.save(file)
    assert [path.name for path in tmp_path.iterdir()] == ["caches.safetensors"]
    with torch.inference_mode():
        again = ck.TDA(text, "dtd", scale=9.0, beta=5.0).load(file)
    assert again.seen == 40 and head.negative_counts.sum() > 0
    assert torch.equal(again(images[40:]).nan_to_num(), head(images[40:]).nan_to_num())
    content = file.read_bytes()
    again.save(file)
    head.save(tmp_path / "other")
    assert file.read_bytes() == (tmp_path / "other").read_bytes() != content
    # Caches of another precision, such as the same model's in fp64, keep it.
    third = ck.TDA(text, scale=9.0)
    third(images.double())
    third(images[:5])
    third.save(file)
    assert ck.TDA(text, scale=9.0).load(file).seen == 65


def test_caches_that_do_not_fit_are_refused(tmp_path):
    text, images = stream(dtype=torch.float32)
    file, head = tmp_path / "caches.safetensors", ck.TDA(text, scale=9.0)
    with pytest.raises(ValueError, match="expected a TDA that has processed images, got an empty one: nothing to save"):
        head.save(file)
    head(images)
    head.save(file)
    for other in (text.flip(0), text[:4], torch.randn(CLASSES, WIDTH)):
        with pytest.raises(ValueError, match=r"expected caches of the same classes, prompts and model"):
            ck.TDA(other, scale=9.0).load(file)
    for choices, message in (
        ({"scale": 20}, r"expected caches of scale 20, got .*caches.safetensors of 9.0"),
        ({"threshold": 0.05}, r"expected caches of threshold 0.05, got .* of 0.03"),
        ({"entropy_range": (0.1, 0.5)}, r"expected caches of entropy_low 0.1, got .* of 0.2"),
        ({"capacity": 2}, r"expected caches of capacities \(2, 2\), got .* of \(3, 2\)"),
        ({"negative_capacity": 3}, r"expected caches of capacities \(3, 3\), got .* of \(3, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ck.TDA(text, **{"scale": 9.0, **choices}).load(file)
    with pytest.raises(FileNotFoundError):
        head.load(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"expected the caches of a TDA \(clipkernels.tda.1\), got .* with format None"
    ):
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, tmp_path / "other")
        head.load(tmp_path / "other")
    before = [tensor.clone() for entries in (head._positive, head._negative) for tensor in entries]
    about, tensors = read(file)
    flipped = {"negative.targets": tensors["negative.targets"].flip(2)}
    changes = {
        "two positive entries with one arrival": {"positive.arrival": tensors["positive.arrival"].clamp(max=0)},
        "positive entries that are not in order of entropy": {"positive.entropy": tensors["positive.entropy"].flip(1)},
        "more than that of 6 classes": {"positive.entropy": tensors["positive.entropy"] + 2},
        "negative entries with an entropy out of range": {"negative.entropy": tensors["negative.entropy"] * 0},
        "entries of several dtypes": {"negative.keys": tensors["negative.keys"].double()},
        "targets of negative entries that are not ascending classes below 6": flipped,
        "not ascending classes": {"negative.targets": tensors["negative.targets"].clamp(min=0)},
        "classes below 6": {"negative.targets": tensors["negative.targets"] + 1},
    }
    for reason, change in changes.items():
        write(file, about, {**tensors, **change})
        with pytest.raises(ValueError, match="expected the caches of a TDA") as caught:
            head.load(file)
        assert reason in str(caught.value)
    after = [tensor for entries in (head._positive, head._negative) for tensor in entries]
    assert head.seen == 60 and all(map(torch.equal, before, after))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "mnist"}, 'preset must be "caltech101", .* or "ucf101", got .mnist.'),
        ({"capacity": 0}, "capacity must be an int of at least 1, got 0"),
        ({"negative_capacity": 2.5}, "negative_capacity must be an int of at least 1, got 2.5"),
        ({"beta": float("nan")}, "beta must be a finite number, got nan"),
        ({"strength": "3"}, "strength must be a finite number, got '3'"),
        ({"negative_strength": None}, "negative_strength must be a finite number, got None"),
        ({"entropy_range": 0.2}, "entropy_range must be its two limits, got 0.2"),
        ({"entropy_range": (0.5, 0.2)}, r"entropy_range must ascend, got \(0.5, 0.2\)"),
        ({"entropy_range": (0.5, float("inf"))}, "the high end of entropy_range must be a finite number, got inf"),
        ({"threshold": 1}, r"threshold must be a number in \[0, 1\), got 1"),
        ({"frozen": 1}, "frozen must be True or False, got 1"),
        ({"scale": float("inf")}, "scale must be a finite number, got inf"),
        ({"text": torch.zeros(3)}, r"text must be class embeddings \(K,E\)"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        ck.TDA(**{"text": torch.randn(3, 4), **arguments})


@pytest.mark.parametrize(
    ("embeddings", "keep", "message"),
    [
        (torch.zeros(2, 4), None, r"embeddings must be \(B,V,E\) with V ≥ 1 and E = 8, got \(2,4\)"),
        (torch.zeros(2, 0, 8), None, r"embeddings must be \(B,V,E\) with V ≥ 1 and E = 8, got \(2,0,8\)"),
        (torch.zeros(2, 3, 8).long(), None, "embeddings must be of a floating dtype, got torch.int64"),
        (torch.zeros(2, 3, 8), 4, "keep must be an int from 1 to V = 3, got 4"),
        (torch.zeros(2, 3, 8), 0, "keep must be an int from 1 to V = 3, got 0"),
    ],
)
def test_views_that_do_not_fit_are_refused(embeddings, keep, message):
    text, _ = stream()
    with pytest.raises(ValueError, match=message):
        ck.TDA(text).from_views(embeddings, keep)


def test_a_threshold_of_zero_votes_against_every_class():
    text, images = stream()
    literal = Literal(text, scale=9.0, threshold=0.0)
    expected = torch.stack([literal.see(image[None]) for image in images])
    head = ck.TDA(text, scale=9.0, threshold=0)
    torch.testing.assert_close(head(images), expected, atol=1e-10, rtol=1e-10, equal_nan=True)
    held = head._negative.arrival >= 0
    assert held.any() and (head._negative.targets[held] == torch.arange(CLASSES)).all()
