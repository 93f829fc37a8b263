"""Classifier and ZeroShot: images in, logits out, and errors for bad arguments."""

from __future__ import annotations

from functools import partial
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

import clipkernels as ck
from clipkernels.classifier import class_embeddings, prompts_of
from clipkernels.testing import open_clip_tower

CLASSES = ["zero", "one", "red circle"]
TEXT = {"context_length": 64, "vocab_size": 259, "width": 64, "heads": 1, "layers": 1}
VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 64}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return ck.bundled()[2]


def test_logits_are_a_hundred_times_the_cosines() -> None:
    image, text = torch.randn(5, 16), 7 * torch.randn(3, 16)
    expected = 100 * cosine_similarity(image[:, None], text[None], dim=-1)
    torch.testing.assert_close(ck.ZeroShot(text)(image), expected)


def test_the_scale_multiplies_the_logits() -> None:
    image, text = torch.randn(2, 8), torch.randn(4, 8)
    torch.testing.assert_close(ck.ZeroShot(text, scale=3.0)(image), 0.03 * ck.ZeroShot(text)(image))


def test_a_head_accepts_an_encoded_in_place_of_an_embedding() -> None:
    image, text = torch.randn(2, 8), torch.randn(4, 8)
    assert torch.equal(ck.ZeroShot(text)(ck.Encoded(image)), ck.ZeroShot(text)(image))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_give_full_precision_logits(dtype: torch.dtype) -> None:
    image, text = torch.randn(2, 8).to(dtype), torch.randn(4, 8).to(dtype)
    logits = ck.ZeroShot(text)(image)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, ck.ZeroShot(text.float())(image.float()), rtol=0, atol=0)


def test_double_features_stay_double() -> None:
    image, text = torch.randn(2, 8).double(), torch.randn(4, 8).double()
    expected = 100 * cosine_similarity(image[:, None], text[None], dim=-1)
    torch.testing.assert_close(ck.ZeroShot(text)(image), expected)


@pytest.mark.parametrize("text", [torch.randn(8), torch.randn(0, 8), torch.randn(1, 2, 8)])
def test_text_that_is_not_a_nonempty_matrix_is_refused(text: Tensor) -> None:
    with pytest.raises(ValueError, match=r"text must be class embeddings \(K,E\) with K ≥ 1, got"):
        ck.ZeroShot(text)


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"features must be \(B,E\) with E = 8, got \(2,9\)"):
        ck.ZeroShot(torch.randn(4, 8))(torch.randn(2, 9))


def test_class_embeddings_are_normalised_means_of_the_prompts(tiny: Any, tokenizer: Any) -> None:
    templates = ("a photo of a {}.", "a {} {}, drawn.")
    text = class_embeddings(tiny, tokenizer, prompts_of(CLASSES, templates))
    with torch.no_grad():
        for name, row in zip(CLASSES, text, strict=True):
            prompts = tokenizer([f"a photo of a {name}.", f"a {name} {name}, drawn."])
            expected = normalize(normalize(tiny.encode_text(prompts), dim=-1).mean(0), dim=0)
            torch.testing.assert_close(row, expected)


def test_many_prompts_are_encoded_in_batches_with_the_same_result(
    tiny: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = class_embeddings(tiny, tokenizer, prompts_of(CLASSES, ("{}", "a {}")))
    monkeypatch.setattr("clipkernels.classifier.PROMPTS_PER_BATCH", 4)
    torch.testing.assert_close(class_embeddings(tiny, tokenizer, prompts_of(CLASSES, ("{}", "a {}"))), whole)


def test_logits_are_those_of_the_host_model(tiny: Any, tokenizer: Any, images: Tensor) -> None:
    with torch.no_grad():
        expected, _ = tiny.get_logits(images, tokenizer([f"a photo of a {name}." for name in CLASSES]))
        torch.testing.assert_close(ck.Classifier(tiny, tokenizer, CLASSES)(images), expected)


def test_a_method_is_patched_in_place(tiny: Any, tokenizer: Any, images: Tensor) -> None:
    classifier = ck.Classifier(tiny, tokenizer, CLASSES, method=ck.EViT(0.5))
    assert classifier.model is tiny
    assert ck.method_of(tiny) == ck.EViT(0.5)
    with torch.no_grad():
        expected = classifier.head(ck.encode_image(tiny, images).embedding)
        torch.testing.assert_close(classifier(images), expected)


def test_no_method_leaves_the_patch_of_the_model(tiny: Any, tokenizer: Any) -> None:
    ck.patch(tiny, ck.ToMe(4))
    ck.Classifier(tiny, tokenizer, CLASSES)
    assert ck.method_of(tiny) == ck.ToMe(4)


def test_the_mode_of_every_module_is_restored(tiny: Any, tokenizer: Any) -> None:
    tiny.train()
    tiny.visual.eval()
    before = [module.training for module in tiny.modules()]
    ck.Classifier(tiny, tokenizer, CLASSES)
    assert [module.training for module in tiny.modules()] == before


def test_gradients_reach_images_but_not_the_text_tower(tiny: Any, tokenizer: Any, images: Tensor) -> None:
    images.requires_grad_()
    classifier = ck.Classifier(tiny, tokenizer, CLASSES)
    classifier(images).sum().backward()
    assert images.grad is not None and images.grad.abs().max() > 0
    assert all(parameter.grad is None for name, parameter in tiny.named_parameters() if "visual" not in name)


def test_a_model_in_half_precision_classifies(tiny: Any, tokenizer: Any, images: Tensor) -> None:
    with torch.no_grad():
        expected = ck.Classifier(tiny, tokenizer, CLASSES)(images).softmax(1)
        logits = ck.Classifier(tiny.bfloat16(), tokenizer, CLASSES)(images.bfloat16())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.softmax(1), expected, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": []}, "classes must name at least one class, got none"),
        ({"classes": "cat"}, "classes must be a list of names, got the string 'cat'"),
        ({"classes": ["cat", "dog", "cat"]}, "classes must differ, got 'cat' 2 times"),
        ({"classes": ["cat", " "]}, "classes must be non-empty strings, got ' '"),
        ({"classes": ["cat", 3]}, "classes must be non-empty strings, got 3"),
        ({"templates": "a {}"}, "templates must be a list of prompts, got the string 'a {}'"),
        ({"templates": []}, "templates must hold at least one prompt, got none"),
        ({"templates": ["a {}", "a photo"]}, "templates must hold {} in place of the class name, got 'a photo'"),
        ({"method": ck.EViT(0.5, blocks=(9,))}, "blocks must be ints in"),
    ],
)
def test_bad_arguments_give_one_line_and_leave_the_model_unchanged(
    tiny: Any, tokenizer: Any, images: Tensor, arguments: Any, message: str
) -> None:
    before, kind = tiny.encode_image(images), type(tiny.visual.transformer)
    with pytest.raises(ValueError) as caught:
        ck.Classifier(tiny, tokenizer, **{"classes": CLASSES, "method": ck.EViT(0.5), **arguments})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ck.method_of(tiny) is None
    assert type(tiny.visual.transformer) is kind
    assert torch.equal(tiny.encode_image(images), before)


def test_a_model_that_is_not_a_clip_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"model must be a CLIP with visual, .* get_text_features, got Linear"):
        ck.Classifier(nn.Linear(2, 2), tokenizer, CLASSES)


@pytest.mark.parametrize("shape", [(3, 3, 32, 36), (3, 1, 32, 32), (3, 32, 32)])
def test_images_of_another_size_are_refused(tiny: Any, tokenizer: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \(B,3,32,32\), got \("):
        ck.Classifier(tiny, tokenizer, CLASSES)(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 3, 224, 192), (3, 224, 224)])
@pytest.mark.parametrize("method", [None, ck.ToMe(8)])
def test_images_of_another_size_are_refused_by_timms_towers(
    tokenizer: Any, shape: tuple[int, ...], method: Any
) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "", "image_size": 224}
    model = open_clip.CLIP(192, vision, TEXT | {"width": 64}).eval()
    with pytest.raises(ValueError, match=r"^images must be \(B,3,224,224\), got \("):
        ck.Classifier(model, tokenizer, CLASSES, method=method)(torch.zeros(shape))


def test_images_that_are_no_tensor_are_refused(tiny: Any) -> None:
    with pytest.raises(TypeError, match=r"^images must be a tensor \(B,3,32,32\), got list$"):
        ck.encode_image(tiny, [torch.zeros(3, 32, 32)])


def test_a_resnet_classifies_but_takes_no_method(tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = open_clip.CLIP(32, {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}, TEXT).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = ck.Classifier(model, tokenizer, CLASSES)(images)
        expected, _ = model.get_logits(images, tokenizer([f"a photo of a {name}." for name in CLASSES]))
        torch.testing.assert_close(logits, expected)
    with pytest.raises(ck.UnsupportedTower, match="ModifiedResNet"):
        ck.Classifier(model, tokenizer, CLASSES, method=ck.Dense())


def test_a_model_with_its_own_text_tower_classifies(tokenizer: Any, images: Tensor) -> None:
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(32, VISION, TEXT).eval()
    with torch.no_grad():
        logits = ck.Classifier(model, tokenizer, CLASSES, method=ck.Dense())(images)
        expected, _ = model.get_logits(images, tokenizer([f"a photo of a {name}." for name in CLASSES]))
        torch.testing.assert_close(logits, expected)


def test_coca_classifies(tokenizer: Any) -> None:
    model: Any = open_clip_tower("coca_ViT-B-32", layers=1)
    images = torch.randn(2, 3, 224, 224)

    def short(texts: list[str]) -> Tensor:
        return tokenizer(texts, context_length=16).clamp_max(63)

    with torch.no_grad():
        logits = ck.Classifier(model, short, CLASSES, method=ck.Dense())(images)
        text = model.encode_text(short([f"a photo of a {name}." for name in CLASSES]))
        expected = model.logit_scale.exp() * model.encode_image(images) @ text.T
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)


class Tokens:
    """A head that reads all tokens and the CLS tokens of every block."""

    needs = ("tokens", "cls_path")

    def __init__(self, text: Tensor, weight: float = 1.0) -> None:
        self.text, self.weight = text, weight

    def __call__(self, features: Any) -> Tensor:
        return self.weight * (features.tokens.mean(1) @ self.text.T + features.cls_path.mean())


@pytest.mark.parametrize(("head", "weight"), [(Tokens, 1.0), (partial(Tokens, weight=2.0), 2.0)])
def test_a_callable_makes_the_head_from_the_class_embeddings(
    tiny: Any, tokenizer: Any, images: Tensor, head: Any, weight: float
) -> None:
    classifier = ck.Classifier(tiny, tokenizer, CLASSES, head=head, method=ck.EViT(0.5))
    with torch.no_grad():
        text = class_embeddings(tiny, tokenizer, prompts_of(CLASSES, ("a photo of a {}.",)))
        expected = Tokens(text, weight)(ck.encode_image(tiny, images, tokens=True, cls_path=True))
        torch.testing.assert_close(classifier(images), expected)


def test_a_finished_head_is_used_as_it_is(tiny: Any, tokenizer: Any, images: Tensor) -> None:
    head = ck.ZeroShot(torch.randn(7, 128))
    classifier = ck.Classifier(tiny, tokenizer, [f"class {k}" for k in range(7)], head=head)
    assert classifier.head is head
    assert torch.equal(classifier(images), head(tiny.encode_image(images)))


@torch.no_grad()
def test_logits_are_those_of_fp32_under_autocast():
    image, text = torch.randn(4, 16), torch.randn(3, 16)
    head = ck.ZeroShot(text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(image), ck.ZeroShot(text)(image)) and head(image).dtype == torch.float32
        logits = head(image)
    assert torch.equal(logits, head(image))
