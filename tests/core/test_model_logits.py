"""Scale and bias of the model's own logits: in every library, in heads with published constants, and in reprs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

import clipkernels as ck
from clipkernels.adapters.logits import logits_of
from clipkernels.support import class_embeddings, photo
from tests.local_transformers import clip_model, letter_tokenizer, save_clip_tokenizer, siglip_model

CLASSES = ["cat", "dog", "red ship"]
PROMPTS = [f"a photo of a {name}." for name in CLASSES]
TEXT = {"context_length": 64, "vocab_size": 259, "width": 64, "heads": 1, "layers": 1}
VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 64}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return ck.bundled()[2]


def set_logits(model: Any, scale: float, bias: float | None = None) -> Any:
    """The model with another scale, which it stores as a logarithm, and another bias."""
    with torch.no_grad():
        model.logit_scale.fill_(math.log(scale))
    if bias is not None:
        model.logit_bias = nn.Parameter(torch.tensor(bias))
    return model


def open_clip_model(bias: float | None = -5.0, kind: str = "CLIP") -> Any:
    """A model of open_clip with scale 10."""
    torch.manual_seed(0)
    return set_logits(getattr(open_clip, kind)(32, VISION, TEXT, init_logit_bias=bias).eval(), 10)


@torch.no_grad()
def cosines(model: Any, tokenizer: Any, images: Tensor) -> Tensor:
    """The cosines (B,K) of images and class embeddings."""
    text = class_embeddings(model, tokenizer, photo(CLASSES))
    return torch.cosine_similarity(ck.encode_image(model, images).embedding[:, None], text[None], dim=-1)


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
@torch.no_grad()
def test_open_clips_scale_and_bias_make_the_logits(kind: str, tokenizer: Any, images: Tensor) -> None:
    model = open_clip_model(kind=kind)
    classifier = ck.Classifier(model, tokenizer, CLASSES)
    logits = classifier(images)
    torch.testing.assert_close(logits, 10 * cosines(model, tokenizer, images) - 5)
    torch.testing.assert_close(logits, model.get_logits(images, tokenizer(PROMPTS))[0])
    assert classifier.sigmoid
    assert torch.equal(classifier.probabilities(logits), logits.sigmoid())


@torch.no_grad()
def test_without_a_bias_probabilities_are_a_softmax(tokenizer: Any, images: Tensor) -> None:
    model = open_clip_model(bias=None)
    classifier = ck.Classifier(model, tokenizer, CLASSES)
    logits = classifier(images)
    torch.testing.assert_close(logits, 10 * cosines(model, tokenizer, images))
    assert not classifier.sigmoid
    assert torch.equal(classifier.probabilities(logits), logits.softmax(1))


@torch.no_grad()
def test_siglip_of_transformers_has_its_own_logits(images: Tensor) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, tokenizer = siglip_model(scale=10, bias=-5), letter_tokenizer()
    classifier = ck.Classifier(model, tokenizer, CLASSES)
    logits = classifier(images)
    torch.testing.assert_close(logits, 10 * cosines(model, tokenizer, images) - 5)
    ids = tokenizer(PROMPTS, padding="max_length", max_length=64, return_tensors="pt")["input_ids"]
    torch.testing.assert_close(logits, model(input_ids=ids, pixel_values=images).logits_per_image)
    assert torch.equal(classifier.probabilities(logits), logits.sigmoid())


@torch.no_grad()
def test_clip_of_transformers_has_its_own_scale(images: Tensor, tmp_path: Any) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, tokenizer = clip_model(scale=10), save_clip_tokenizer(tmp_path)
    classifier = ck.Classifier(model, tokenizer, CLASSES)
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    logits = classifier(images)
    torch.testing.assert_close(logits, 10 * cosines(model, tokenizer, images))
    torch.testing.assert_close(logits, model(**inputs, pixel_values=images).logits_per_image)
    assert torch.equal(classifier.probabilities(logits), logits.softmax(1))


@torch.no_grad()
def test_openais_scale_is_a_logarithm_too(images: Tensor) -> None:
    pytest.importorskip("clip.model", reason="OpenAI's clip (openai-clip or clip-anytorch) is not installed")
    from clipkernels.testing import openai_tower, randomized

    def words(texts: list[str]) -> Tensor:
        ids = torch.zeros(len(texts), 16, dtype=torch.int32)
        for row, text in zip(ids, texts, strict=True):
            numbers = [1 + sum(map(ord, word)) % 60 for word in text.split()]
            row[: len(numbers) + 1] = torch.tensor([*numbers, 63])
        return ids

    model = set_logits(randomized(openai_tower(layers=2, size=32, patch=8, width=64, out=32)), 10)
    logits = ck.Classifier(model, words, CLASSES)(images)
    torch.testing.assert_close(logits, 10 * cosines(model, words, images))
    torch.testing.assert_close(logits, model(images, words(PROMPTS))[0])
    set_logits(model, 10, bias=-5.0)
    torch.testing.assert_close(ck.Classifier(model, words, CLASSES)(images), logits - 5)


@torch.no_grad()
def test_scale_and_bias_change_the_logits_of_a_patched_model(tokenizer: Any, images: Tensor) -> None:
    model = open_clip_model()
    ten = ck.Classifier(model, tokenizer, CLASSES, method=ck.EViT(0.5))(images)
    twenty = ck.Classifier(set_logits(model, 20, bias=3.0), tokenizer, CLASSES)(images)
    torch.testing.assert_close(twenty, 2 * (ten + 5) + 3)


def test_zero_shot_alone_keeps_100_and_a_number_overrides(tokenizer: Any, images: Tensor) -> None:
    image, text = torch.randn(2, 8), torch.randn(4, 8)
    cosine = torch.cosine_similarity(image[:, None], text[None], dim=-1)
    torch.testing.assert_close(ck.ZeroShot(text)(image), 100 * cosine)
    torch.testing.assert_close(ck.ZeroShot(text, 10, bias=-5)(image), 10 * cosine - 5)
    model = open_clip_model()
    with torch.no_grad():
        for head, scale in ((partial(ck.ZeroShot, scale=7.0), 7), (lambda text: ck.ZeroShot(text), 100)):
            classifier = ck.Classifier(model, tokenizer, CLASSES, head=head)
            torch.testing.assert_close(classifier(images), scale * cosines(model, tokenizer, images))
            assert not classifier.sigmoid


# Without their own terms these heads give the cosine term alone.
HEADS: dict[str, Callable[..., Callable[[Tensor], Any]]] = {
    "ZeroShot": lambda **scale: partial(ck.ZeroShot, **scale),
    "CALIP": lambda **scale: partial(ck.CALIP, beta2=0, beta3=0, **scale),
    "TipAdapter": lambda **scale: lambda text: ck.TipAdapter(text, text, torch.arange(3), alpha=0, **scale),
    "TipX": lambda **scale: lambda text: ck.TipX(text, text, torch.arange(3), alpha=0, gamma=0, **scale),
    "Reservoir": lambda **scale: partial(ck.Reservoir, strength=0, **scale),
    "TDA": lambda **scale: partial(ck.TDA, strength=0, negative_strength=0, **scale),
}
PUBLISHED = [name for name in HEADS if name != "ZeroShot"]


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_published_heads_keep_100_and_a_softmax(name: str, tokenizer: Any, images: Tensor) -> None:
    model = open_clip_model()
    expected = cosines(model, tokenizer, images)
    classifier = ck.Classifier(model, tokenizer, CLASSES, head=HEADS[name]())
    logits = classifier(images)
    torch.testing.assert_close(logits, 100 * expected)
    assert torch.equal(classifier.probabilities(logits), logits.softmax(1))
    number = ck.Classifier(model, tokenizer, CLASSES, head=HEADS[name](scale=3))
    torch.testing.assert_close(number(images), 3 * expected)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_scale_model_takes_the_models(name: str, finished: bool, tokenizer: Any, images: Tensor) -> None:
    model = open_clip_model()
    head = HEADS[name](scale="model")
    if finished:
        head = head(class_embeddings(model, tokenizer, photo(CLASSES)))
    classifier = ck.Classifier(model, tokenizer, CLASSES, head=head)
    logits = classifier(images)
    torch.testing.assert_close(logits, 10 * cosines(model, tokenizer, images) - 5)
    assert torch.equal(classifier.probabilities(logits), logits.sigmoid())
    assert "scale=10, bias=-5" in repr(classifier)


@torch.no_grad()
def test_calips_other_terms_take_the_scale_of_the_model(tokenizer: Any, images: Tensor) -> None:
    model = open_clip_model()
    published = ck.Classifier(model, tokenizer, CLASSES, head=ck.CALIP)(images)
    own = ck.Classifier(model, tokenizer, CLASSES, head=partial(ck.CALIP, scale="model"))(images)
    torch.testing.assert_close(own, published / 10 - 5)


@torch.no_grad()
def test_a_reservoirs_entropies_are_those_of_the_softmax(tokenizer: Any, images: Tensor) -> None:
    model = open_clip_model()
    for scale in (100.0, "model"):
        classifier = ck.Classifier(model, tokenizer, CLASSES, head=partial(ck.Reservoir, scale=scale, strength=0))
        logs = classifier(images).log_softmax(1)
        entropies = classifier.head._entries.entropy[classifier.head._entries.arrival >= 0]
        expected = -(logs.exp() * logs).sum(1)
        torch.testing.assert_close(entropies.sort()[0], expected.sort()[0])


def test_a_model_without_a_scale_keeps_100(tokenizer: Any, images: Tensor) -> None:
    model = open_clip_model()
    expected = 100 * cosines(model, tokenizer, images)
    del model.logit_scale, model.logit_bias
    assert logits_of(model) is None
    with torch.no_grad():
        torch.testing.assert_close(ck.Classifier(model, tokenizer, CLASSES)(images), expected)
    with pytest.raises(ValueError, match='expected a model with logit_scale for scale="model", got CLIP'):
        ck.Classifier(model, tokenizer, CLASSES, head=partial(ck.CALIP, scale="model"), method=ck.Dense())
    assert ck.method_of(model) is None


@pytest.mark.parametrize("value", [torch.tensor(float("nan")), torch.tensor(1e4), torch.tensor([1.0, 2.0])])
def test_a_scale_that_is_no_finite_number_is_refused(value: Tensor, tokenizer: Any) -> None:
    model = open_clip_model()
    model.logit_scale = nn.Parameter(value)
    with pytest.raises(ValueError, match="the model's logit_scale must be one finite number, got"):
        ck.Classifier(model, tokenizer, CLASSES, method=ck.Dense())
    assert ck.method_of(model) is None


def test_a_refused_method_leaves_a_finished_head_as_it_was(tokenizer: Any) -> None:
    model, head = open_clip_model(), ck.ZeroShot(torch.randn(3, 32), scale="model")
    with pytest.raises(ValueError, match="blocks must be ints in"):
        ck.Classifier(model, tokenizer, CLASSES, head=head, method=ck.EViT(0.5, blocks=(9,)))
    assert "scale='model'" in repr(head)


def test_a_head_that_waits_for_a_model_says_so() -> None:
    head = ck.ZeroShot(torch.randn(3, 8), scale="model")
    with pytest.raises(ValueError, match=r'expected a model for scale="model", got none: make a ck.Classifier'):
        head(torch.randn(2, 8))
    assert repr(head) == "ZeroShot(classes=3, scale='model')"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": float("nan")}, "scale must be a finite number, got nan"),
        ({"scale": "models"}, "scale must be a finite number, got 'models'"),
        ({"scale": "model", "bias": 1.0}, 'expected no bias with scale="model", which takes the model\'s, got 1.0'),
        ({"bias": float("inf")}, "bias must be a finite number, got inf"),
    ],
)
def test_another_scale_or_bias_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ck.ZeroShot(torch.randn(3, 8), **arguments)
    assert str(caught.value) == message


def test_reprs_show_the_scale(tokenizer: Any) -> None:
    text, labels = torch.randn(3, 8), torch.arange(3)
    assert repr(ck.ZeroShot(text)) == "ZeroShot(classes=3, scale=100)"
    assert repr(ck.CALIP(text)) == "CALIP(classes=3, scale=100, alpha=0.5, beta2=1.12, beta3=0.02)"
    assert repr(ck.TipAdapter(text, text, labels)) == "TipAdapter(classes=3, scale=100, images=3, alpha=1.17, beta=1)"
    weights = "alpha=1.17, beta=1, gamma=1, tau=0.5, reduce='mean'"
    assert repr(ck.TipX(text, text, labels)) == f"TipX(classes=3, scale=100, images=3, {weights})"
    assert repr(ck.Reservoir(text)) == "Reservoir(classes=3, scale=100, capacity=3, strength=3, beta=5, seen=0)"
    assert repr(ck.TDA(text)) == "TDA(classes=3, scale=100, strength=2, beta=5, seen=0)"
    classifier = ck.Classifier(open_clip_model(), tokenizer, CLASSES, method=ck.Dense())
    expected = "Classifier(CLIP, classes=3, method=Dense(), head=ZeroShot(classes=3, scale=10, bias=-5))"
    assert repr(classifier) == expected
