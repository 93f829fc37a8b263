"""Vision-language models of transformers, whose text has a fixed number of image tokens: they take no pruned tower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipkernels as ck
from clipkernels.testing import patch_ranking, randomized

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 3}
VISION |= {"patch_size": 8, "image_size": 64}
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
TEXT |= {"num_hidden_layers": 1, "vocab_size": 128, "head_dim": 32}
pytestmark = pytest.mark.usefixtures("one_thread")


def _paligemma_config() -> Any:
    vision = transformers.SiglipVisionConfig(**VISION, projection_dim=64)
    text = transformers.GemmaConfig(**TEXT)
    return transformers.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=99, projection_dim=64)


def _llava() -> nn.Module:
    vision, text = transformers.CLIPVisionConfig(**VISION), transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=99)
    return transformers.LlavaForConditionalGeneration(config)


def _gemma3() -> nn.Module:
    vision, text = transformers.SiglipVisionConfig(**VISION), transformers.Gemma3TextConfig(**TEXT)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=16, image_token_index=99
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _colpali() -> nn.Module:
    return transformers.ColPaliForRetrieval(
        transformers.ColPaliConfig(vlm_config=_paligemma_config(), embedding_dim=16)
    )


def _with_scale(family: str) -> nn.Module:
    config = getattr(transformers, f"{family}Config")
    text = transformers.LlamaConfig(**TEXT)
    vlm = getattr(transformers, f"{family}ForConditionalGeneration")
    return vlm(config(vision_config=VISION, text_config=text, image_token_id=99, scale_factor=2))


# The model, and the number of image tokens in its text for one image of 64 patches.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "LlavaForConditionalGeneration": (_llava, 64),
    "PaliGemmaForConditionalGeneration": (
        lambda: transformers.PaliGemmaForConditionalGeneration(_paligemma_config()),
        64,
    ),
    "Gemma3ForConditionalGeneration": (_gemma3, 16),
    "Idefics3ForConditionalGeneration": (lambda: _with_scale("Idefics3"), 16),
    "SmolVLMForConditionalGeneration": (lambda: _with_scale("SmolVLM"), 16),
    "ColPaliForRetrieval": (_colpali, 64),
}


def build(name: str) -> nn.Module:
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    return randomized(MODELS[name][0]().eval())


def image_features(model: Any, images: Tensor) -> Tensor:
    """The rows (B·M,C) that take the place of the image tokens in the text."""
    vlm = getattr(model, "vlm", model)
    nested = type(vlm).__name__.startswith(("Idefics3", "SmolVLM"))  # (B,images of one text,3,S,S)
    features = getattr(vlm, "model", vlm) if not hasattr(vlm, "get_image_features") else vlm
    output = features.get_image_features(pixel_values=images[:, None] if nested else images)
    output = getattr(output, "pooler_output", output)
    return torch.cat(list(output)).flatten(0, -2)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_methods_that_leave_every_patch_fill_every_image_token(name):
    model, images = build(name), torch.randn(2, 3, 64, 64)
    expected = image_features(model, images)
    assert len(expected) == 2 * MODELS[name][1]
    ck.patch(model, ck.Dense())
    torch.testing.assert_close(image_features(model, images), expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    for method in (ck.ToMe(4), ck.TCA(0.1)):
        ck.patch(model, method)
        actual = image_features(model, images)
        assert actual.shape == expected.shape and actual.isfinite().all()
        assert (actual != 0).any(1).all() and not torch.allclose(actual, expected, rtol=1e-2, atol=1e-2)
    ck.unpatch(model)
    assert torch.equal(image_features(model, images), expected)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_methods_that_drop_patches_are_refused_unchanged(name):
    model, images = build(name), torch.randn(2, 3, 64, 64)
    expected = image_features(model, images)
    classes = [type(module) for module in model.modules()]
    message = r"^\w+ needs every patch, .* use ck\.Dense\(\), ck\.ToMe or ck\.TCA, .*, got "
    for method in (ck.EViT(0.5), ck.EViT(0.5, fuse=False), patch_ranking(model)):
        for holder in (model, nn.Sequential(model)):
            with pytest.raises(ValueError, match=message + type(method).__name__):
                ck.patch(holder, method)
    assert ck.method_of(model) is None
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(image_features(model, images), expected)
    ck.patch(model, ck.ToMe(4))
    with pytest.raises(ValueError, match="needs every patch"), ck.patched(model, ck.EViT(0.5)):
        pass
    assert ck.method_of(model) == ck.ToMe(4)
    ck.patch(model, ck.EViT(1.0))  # keeps every patch
