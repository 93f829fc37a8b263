"""OpenAI's own clip package: sequence-first blocks, mixed precision, scripted archives refused."""

import pytest
import torch

import clipkernels as ck
from clipkernels.testing import openai_tower, patch_ranking, randomized

clip_model = pytest.importorskip("clip.model", reason="OpenAI's clip (openai-clip or clip-anytorch) is not installed")
METHODS = [ck.Dense(), ck.EViT(0.5), ck.EViT(0.5, fuse=False), ck.ToMe(8), ck.TCA(0.1)]


@pytest.fixture
def model():
    return randomized(openai_tower(layers=3, size=64, patch=8, width=128, out=32))


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_patching_and_unpatching_a_tower(model, images):
    before, keys = model.encode_image(images), list(model.state_dict())
    tower = ck.tower_of(model)
    assert (tower.num_tokens, tower.image_size, tower.patch, tower.out) == (65, (64, 64), 8, 32)
    for method in (*METHODS, patch_ranking(model, learnt=2)):
        ck.patch(model, method)
        actual = model.encode_image(images)
        encoded = ck.encode_image(model, images, tokens=True, cls_path=True, source=True)
        plan = method.plan(65, 3)
        if method == ck.Dense():
            # OpenAI's norms run only in fp32, so there is no fp64 result to compare with.
            torch.testing.assert_close(actual, before, rtol=1e-5, atol=1e-5)
        else:
            assert not torch.allclose(actual, before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encoded.embedding, actual, rtol=1e-4, atol=1e-4)
        assert encoded.tokens.shape == (2, plan.tokens[-1], 32) and encoded.cls_path.shape == (2, 3, 128)
        assert list(model.state_dict()) == keys
    ck.unpatch(model)
    assert torch.equal(model.encode_image(images), before)


@torch.no_grad()
def test_weights_in_half_precision_are_supported(model, images):
    expected = model.encode_image(images)
    clip_model.convert_weights(model)
    assert model.dtype == torch.float16 and model.visual.ln_post.weight.dtype == torch.float32
    host = model.encode_image(images)
    for method in (*METHODS, patch_ranking(model, learnt=2)):
        with ck.patched(model, method):
            actual = model.encode_image(images)
        assert actual.dtype == torch.float16 and actual.isfinite().all()
        if method == ck.Dense():
            cosine, at_host = (torch.cosine_similarity(x.float(), expected, dim=-1) for x in (actual, host))
            assert (cosine > at_host - 1e-3).all() and (cosine > 0.999).all()


@torch.no_grad()
def test_a_patched_tower_leaves_the_text_tower_unchanged(model, images):
    text = torch.randint(1, 60, (3, 16), generator=torch.Generator().manual_seed(0))
    before = model.encode_text(text)
    ck.patch(model, ck.EViT(0.5))
    assert torch.equal(model.encode_text(text), before)
    per_image, per_text = model(images, text)
    assert per_image.shape == (2, 3) and torch.equal(per_text, per_image.T)


@torch.no_grad()
def test_a_mask_a_hook_and_a_scripted_archive_are_refused(model, images):
    model.visual.transformer.resblocks[1].attn_mask = torch.zeros(65, 65)
    with pytest.raises(ck.UnsupportedTower, match=r"block 1: expected attention without a mask, got one of shape \(65"):
        ck.patch(model, ck.Dense())
    model.visual.transformer.resblocks[1].attn_mask = None
    handle = model.visual.transformer.resblocks.register_forward_hook(lambda *_: None)
    with pytest.raises(ck.UnsupportedTower, match=r"its nn\.Sequential carries a hook"):
        ck.patch(model, ck.Dense())
    handle.remove()
    traced = torch.jit.trace(model.visual, images, check_trace=False)
    with pytest.raises(ck.UnsupportedTower, match=r"expected an image ViT of open_clip, .*, got|ScriptModule"):
        ck.patch(traced, ck.Dense())


def test_gradients_reach_every_weight_of_a_reduced_tower(model, images):
    for method in (*METHODS, patch_ranking(model, learnt=2)):
        model.zero_grad()
        ck.patch(model, method).encode_image(images).pow(2).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.visual.parameters())
