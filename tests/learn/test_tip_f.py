"""Tip-Adapter-F: the released training read literally, its weights, its files; and TIP-X on the same few shots."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize, one_hot

import clipkernels as ck
from clipkernels.learn.tip_f import TipAdapterF
from tests.mutants import read, write

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, CLASSES = 12, 5
LABELS = [3, 0, 0, 1, 3, 3, 0, 3, 4, 1]  # none of class 2


def inputs(queries=7, dtype=torch.float64):
    """Class embeddings, query and support embeddings, and labels of the support."""
    generator = torch.Generator().manual_seed(0)
    text, features, support = (
        torch.randn(rows, WIDTH, generator=generator).to(dtype) for rows in (CLASSES, queries, len(LABELS))
    )
    return text, features, support, torch.tensor(LABELS)


def few_shots(shots, count=200, dtype=torch.float32):
    """Text that knows eight classes roughly, `shots` labelled images of each, and two splits of further images.

    The shots are nested: more of them hold the fewer ones.
    """
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(8, 32, generator=generator)
    text = means + 3 * torch.randn(8, 32, generator=generator)

    def draw(labels):
        return means[labels] + 2 * torch.randn(len(labels), 32, generator=generator), labels

    parts = [draw(torch.randint(0, 8, (count,), generator=generator)) for _ in range(2)]
    pool, labels = draw(torch.arange(8).repeat(16))
    return text.to(dtype), (pool[: 8 * shots].to(dtype), labels[: 8 * shots]), *parts


def accuracy(head, images, labels):
    with torch.no_grad():
        return float((head(images).argmax(1) == labels).double().mean())


def test_untrained_keys_give_tip_adapter():
    text, features, support, labels = inputs()
    head = TipAdapterF(text, support, labels, 1.7, 5.5, scale=30.0)
    expected = ck.TipAdapter(text, support, labels, 1.7, 5.5, scale=30.0)(features)
    with torch.no_grad():
        torch.testing.assert_close(head(features), expected, atol=1e-12, rtol=1e-12)
    logits = head(features)
    assert logits.requires_grad
    torch.testing.assert_close(logits.detach(), expected, atol=1e-12, rtol=1e-12)


def test_logits_match_the_formula_for_any_keys():
    text, features, support, labels = inputs()
    head = TipAdapterF(text, support, labels, 0.7, 2.5)
    with torch.no_grad():
        head.keys.normal_(generator=torch.Generator().manual_seed(3))
        logits = head(features)
    for row, image in enumerate(normalize(features, dim=1)):
        for k in range(CLASSES):
            votes = [
                math.exp(-2.5 * (1 - float(image @ key)))
                for key, label in zip(head.keys.detach(), head.labels, strict=True)
                if label == k
            ]
            expected = 100 * float(image @ normalize(text, dim=1)[k]) + 0.7 * sum(votes)
            assert float(logits[row, k]) == pytest.approx(expected, abs=1e-9)
    assert head.labels.tolist() == sorted(LABELS)


@pytest.mark.parametrize(("batch_size", "epochs"), [(256, 5), (4, 3)])
def test_training_is_that_of_the_released_code(batch_size, epochs):
    text, _, support, labels = inputs()
    head = TipAdapterF(text, support, labels, 1.3, 2.0)
    losses = head.fit(support, labels, epochs=epochs, batch_size=batch_size, lr=1e-2, seed=7)
    # The keys are the weight of a linear layer. It is trained with AdamW, eps 1e-4 and a cosine over all steps.
    text, images = normalize(text, dim=1), normalize(support, dim=1)
    adapter = nn.Linear(WIDTH, len(images), bias=False).double()
    adapter.weight = nn.Parameter(images.clone())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, eps=1e-4)
    steps, generator = epochs * math.ceil(len(images) / batch_size), torch.Generator().manual_seed(7)
    step, expected = 0, []
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(images), generator=generator).split(batch_size):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / steps)) / 2
            cache_logits = (-(2.0 - 2.0 * adapter(images[batch]))).exp() @ one_hot(labels, CLASSES).double()
            loss = cross_entropy(100 * images[batch] @ text.T + 1.3 * cache_logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step, total = step + 1, total + loss.item() * len(batch)
        expected.append(total / len(images))
    assert losses == pytest.approx(expected, abs=1e-9)
    order = labels.argsort(stable=True)
    torch.testing.assert_close(head.keys.detach(), adapter.weight.detach()[order], atol=1e-9, rtol=1e-9)
    assert not torch.equal(head.keys.detach(), images[order])


def test_training_is_deterministic_and_changes_the_keys_alone():
    text, (shots, labels), _, _ = few_shots(4)
    heads, epochs = [TipAdapterF(text, shots, labels) for _ in range(3)], []
    before = heads[0].text.clone()
    for head, seed in zip(heads, (3, 3, 4), strict=True):
        losses = head.fit(
            shots, labels, batch_size=8, lr=1e-2, seed=seed, progress=lambda epoch, _: epochs.append(epoch)
        )
        assert len(losses) == 20 and losses[-1] < 0.9 * losses[0]
    assert torch.equal(heads[0].keys, heads[1].keys) and not torch.equal(heads[0].keys, heads[2].keys)
    assert epochs == [*range(1, 21)] * 3
    assert torch.equal(heads[0].text, before) and [name for name, _ in heads[0].named_parameters()] == ["keys"]


def test_trained_keys_classify_new_images_better():
    text, (shots, labels), validation, test = few_shots(4)
    head = TipAdapterF(text, shots, labels)
    head.fit(shots, labels, epochs=40, batch_size=16, lr=1e-2)
    head.search(*validation, grid=(7.0, 50.0))
    fixed = ck.TipAdapter(text, shots, labels)
    fixed.fit(*validation, grid=(7.0, 50.0))
    results = [accuracy(each, *test) for each in (ck.ZeroShot(text), fixed, head)]
    assert results[0] + 0.1 < results[1] < results[2] - 0.1


def test_tip_x_gains_by_a_few_labelled_images_of_each_class():
    results = []
    for shots in (1, 4, 16):
        text, support, _, test = few_shots(shots, 400)
        head = ck.TipX(text, *support, alpha=100.0, gamma=100.0)
        assert head.counts.tolist() == [shots] * 8
        results.append(accuracy(head, *test))
    gains = torch.tensor([accuracy(ck.ZeroShot(text), *test), *results]).diff()
    assert (gains > 0.08).all()


def test_the_search_is_that_of_tip_adapter():
    text, features, support, labels = inputs(40)
    truth = torch.randint(0, CLASSES, (40,), generator=torch.Generator().manual_seed(2))
    head, fixed = TipAdapterF(text, support, labels), ck.TipAdapter(text, support, labels)
    assert head.search(features, truth) == fixed.fit(features, truth) == accuracy(head, features, truth)
    assert (head.alpha, head.beta) == (fixed.alpha, fixed.beta) != (1.17, 1.0)
    assert head.search(ck.Encoded(features), truth, (50, 20)) == fixed.fit(features, truth, (50, 20))


def test_features_of_any_precision_give_logits_in_that_of_the_text():
    text, features, support, labels = inputs(dtype=torch.float32)
    head, half = TipAdapterF(text, support.half(), labels), features.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = head(ck.Encoded(half))
    with torch.no_grad():
        assert logits.dtype == torch.float32 and torch.equal(logits, head(half.float()))
    with torch.autocast("cpu", torch.bfloat16):
        under = TipAdapterF(text, support, labels)
        assert under.fit(support, labels, epochs=2) == TipAdapterF(text, support, labels).fit(support, labels, epochs=2)
    query = features.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(head(query).sum(), query)
    assert gradient.isfinite().all() and (gradient != 0).any()


def test_a_head_made_in_inference_mode_trains_outside_of_it(tmp_path):
    text, _, support, labels = inputs(dtype=torch.float32)
    with torch.inference_mode():
        head = TipAdapterF(text, support, labels)
        head.save(tmp_path / "head")
        other = TipAdapterF(text, support[:3], labels[:3]).load(tmp_path / "head")
        with pytest.raises(RuntimeError, match=r"outside of torch\.inference_mode"):
            head.fit(support, labels)
    with torch.no_grad():
        assert head.fit(support, labels, epochs=2) == other.fit(support, labels, epochs=2)
    with torch.no_grad():
        assert torch.equal(head(support), other(support))


def test_a_classifier_uses_the_head(tiny, images):
    _, _, tokenizer = ck.bundled()
    support = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        classifier = ck.Classifier(
            tiny, tokenizer, ["cat", "dog", "ship"], method=ck.EViT(0.7, score="random"),
            head=lambda text: TipAdapterF(text, support, torch.tensor([0, 1, 2, 2, 1, 0])),
        )  # fmt: skip
        assert torch.equal(classifier(images), classifier.head(tiny.encode_image(images)))
    assert repr(classifier.head) == "TipAdapterF(classes=3, scale=100, images=6, alpha=1.17, beta=1)"


def test_a_saved_head_loads_with_its_keys_and_numbers(tmp_path):
    text, features, support, labels = inputs(dtype=torch.float32)
    head = TipAdapterF(text, support, labels, 2.5, 3.5, scale=50.0)
    head.fit(support, labels, epochs=2)
    head.save(tmp_path / "head.safetensors")
    again = TipAdapterF(text, support[:1], labels[:1]).load(tmp_path / "head.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["head.safetensors"]
    with torch.no_grad():
        assert torch.equal(again(features), head(features))
    assert (again.alpha, again.beta, again.scale) == (2.5, 3.5, 50.0)
    assert again.fit(support, labels, epochs=2) == head.fit(support, labels, epochs=2)


def test_other_files_are_refused_and_change_nothing(tmp_path):
    text, features, support, labels = inputs(dtype=torch.float32)
    file, head = tmp_path / "head.safetensors", TipAdapterF(text, support, labels)
    with torch.no_grad():
        before = head(features)
    TipAdapterF(text.roll(1, 0), support, labels).save(file)
    with pytest.raises(ValueError, match="expected keys for the same classes, prompts and model"):
        head.load(file)
    head.save(file)
    about, tensors = read(file)
    changes = {
        "labels that are not ascending classes below 5": {"labels": tensors["labels"].flip(0)},
        "ascending classes below 5": {"labels": tensors["labels"] + 1},
        "keys of shape (9, 12) instead of (10, 12)": {"keys": tensors["keys"][:9]},
        "labels of shape (9) instead of (10)": {"labels": tensors["labels"][:9]},
        "infinite or NaN values in keys": {"keys": tensors["keys"] * float("inf")},
    }
    for reason, change in changes.items():
        write(file, about, {**tensors, **change})
        with pytest.raises(ValueError, match="expected the keys of a TipAdapterF") as caught:
            head.load(file)
        assert reason in str(caught.value) or "of shape" in reason
    write(file, {**about, "alpha": "nan"}, tensors)
    with pytest.raises(ValueError, match=r"Expected `float`, got `str` - at `\$.alpha`"):
        head.load(file)
    with torch.no_grad():
        assert torch.equal(head(features), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.randn(10, 3)}, r"features must be \(n,E\) with E = 12, got \(10,3\)"),
        ({"features": torch.randn(0, 12), "labels": torch.zeros(0).long()}, "features must be of at least one image"),
        ({"labels": torch.zeros(9, dtype=torch.int64)}, r"labels must be \(n,\) = \(10\) torch.int64, got \(9\)"),
        ({"labels": torch.full((10,), 5)}, "labels must be from 0 to 4, got 5 to 5"),
        ({"features": torch.full((10, 12), float("nan"))}, "features must be finite, got 10 of 10 rows that are not"),
        ({"beta": float("nan")}, "beta must be a finite number, got nan"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    text, _, support, labels = inputs()
    with pytest.raises(ValueError, match=message):
        TipAdapterF(**{"text": text, "features": support, "labels": labels, **change})


def test_fit_and_search_refuse_unusable_images():
    text, features, support, labels = inputs()
    head = TipAdapterF(text, support, labels)
    before = head.keys.detach().clone()
    for call in (head.fit, head.search):
        with pytest.raises(ValueError, match="features must be of at least one image, got none"):
            call(features[:0], labels[:0])
        with pytest.raises(ValueError, match="labels must be from 0 to 4"):
            call(support, labels + 4)
        with pytest.raises(ValueError, match=r"features must be \(B,E\) with E = 12"):
            call(features[:, :3], labels[:7])
        with pytest.raises(ValueError, match="features must be on cpu like the head, got meta"):
            call(support.to("meta"), labels)
    with pytest.raises(ValueError, match="batch_size must be an int of at least 1, got 0"):
        head.fit(support, labels, batch_size=0)
    with pytest.raises(ValueError, match="the grid of beta must end above"):
        head.search(support, labels, (0.1, 3))
    assert torch.equal(head.keys, before) and (head.alpha, head.beta) == (1.17, 1.0)
