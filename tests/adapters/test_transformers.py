"""Hugging Face's image towers: every family, the outputs of their own forwards, padding, checkpointing."""

import copy
import importlib
import warnings

import pytest
import torch
from torch import nn

import clipkernels as ck
from clipkernels.testing import assert_within_budget, patch_ranking, randomized, transformers_tower

# Deprecated in transformers 5.23, but the only way in transformers 4.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_:FutureWarning")

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
METHODS = [ck.Dense(), ck.EViT(0.5), ck.EViT(0.5, fuse=False), ck.ToMe(8), ck.TCA(0.1)]
FAMILIES = {
    "CLIPModel": "pools CLS, projects",
    "CLIPVisionModel": "no projection",
    "CLIPVisionModelWithProjection": "projects, no text",
    "SiglipModel": "pools by a learned query",
    "SiglipVisionModel": "pools by a learned query, no text",
    "Siglip2Model": "takes patches and a mask",
    "ChineseCLIPModel": "a family of its own",
    "AltCLIPModel": "a family of its own",
    "MetaClip2Model": "a family of its own",
}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "patch_size": 8}


def build(family, **vision):
    if not hasattr(transformers, family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    size = {"num_patches": 64} if "Siglip2" in family else {"image_size": 64}
    return randomized(transformers_tower(family, 3, **SIZES, **size, **vision)), torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_patching_and_unpatching_a_tower(family):
    model, images = build(family)
    tower = ck.tower_of(model)
    before, state = tower.encode(images), {key: value.clone() for key, value in model.state_dict().items()}
    exact = ck.tower_of(model.double()).encode(images.double())
    model.float()
    # In transformers 4, the pool of SigLIP2 needs a mask of full length.
    needs_mask = family == "Siglip2Model" and transformers.__version__.startswith("4.")
    methods = (*METHODS, patch_ranking(model, learnt=2))
    for method in methods if not needs_mask else (ck.Dense(), ck.ToMe(8)):
        ck.patch(model, method)
        actual = tower.encode(images)
        encoded = ck.encode_image(model, images, tokens=True, source=True)
        plan = method.plan(tower.num_tokens, 3, tower.prefix)
        if method == ck.Dense():
            assert_within_budget(actual, exact, before)
        else:
            assert not torch.allclose(actual, before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encoded.embedding, actual, atol=1e-5, rtol=1e-5)
        assert encoded.tokens.shape == (2, plan.tokens[-1], tower.out)
        assert encoded.source.shape == (2, sum(map(bool, plan.steps)), 64)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    ck.unpatch(model)
    assert torch.equal(tower.encode(images), before)
    assert list(model.state_dict()) == list(state)


@torch.no_grad()
def test_the_public_methods_of_a_clip_give_the_reduced_embedding():
    model, images = build("CLIPModel")
    text = torch.tensor([[62, 5, 63], [62, 7, 63]])
    ck.patch(model, ck.EViT(0.5))
    expected = ck.encode_image(model, images).embedding
    features = model.get_image_features(pixel_values=images)
    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    torch.testing.assert_close(features, expected)
    out = model(pixel_values=images, input_ids=text, attention_mask=torch.ones_like(text))
    torch.testing.assert_close(out.image_embeds, nn.functional.normalize(expected, dim=-1))


@torch.no_grad()
def test_return_dict_false_returns_tuples():
    model, images = build("CLIPVisionModel")
    ck.patch(model, ck.EViT(0.5))
    tokens, pooled = model(pixel_values=images, return_dict=False)
    assert torch.equal(pooled, model(pixel_values=images).pooler_output)
    assert tokens.shape[1] == ck.EViT(0.5).plan(65, 3).tokens[-1]


@pytest.mark.parametrize("family", ["CLIPVisionModel", "SiglipVisionModel"])
@torch.no_grad()
def test_hidden_states_keep_their_length_under_merging_but_not_pruning(family):
    model, images = build(family)
    tokens = ck.tower_of(model).num_tokens
    with ck.patched(model, ck.ToMe(8)):
        assert model(pixel_values=images).last_hidden_state.shape[1] == tokens
    with ck.patched(model, ck.EViT(0.5)):
        remaining = ck.encode_image(model, images, tokens=True).tokens.shape[1]
        assert model(pixel_values=images).last_hidden_state.shape[1] == remaining < tokens


@pytest.mark.parametrize("family", ["CLIPVisionModel", "SiglipVisionModel"])
@torch.no_grad()
def test_hidden_states_are_the_hosts_with_each_patch_at_its_position(family):
    if family == "SiglipVisionModel" and transformers.__version__.startswith("4."):
        pytest.skip(
            "transformers 4 replaces the forward of SigLIP's layers to collect states, which a test below covers"
        )
    model, images = build(family)
    host = model(pixel_values=images, output_hidden_states=True).hidden_states
    model(pixel_values=images)
    ck.patch(model, ck.Dense())
    actual = model(pixel_values=images, output_hidden_states=True).hidden_states
    assert len(actual) == len(host) == 4
    for one, other in zip(actual, host, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    ck.patch(model, ck.EViT(0.5, fuse=False))
    reduced = model(pixel_values=images, output_hidden_states=True).hidden_states
    assert [state.shape for state in reduced] == [state.shape for state in host]
    prefix = ck.tower_of(model).prefix
    dropped = ck.encode_image(model, images, source=True).source[:, -1] < 0
    assert dropped.any() and (reduced[-1][:, prefix:][dropped] == 0).all()
    # The hooks that transformers leaves behind for collecting states must not stop the next forward.
    assert model(pixel_values=images).pooler_output.isfinite().all()


@torch.no_grad()
def test_collecting_states_by_replaced_forwards_is_refused_and_undone():
    model, images = build("SiglipVisionModel")
    model(pixel_values=images, output_hidden_states=True)
    ck.patch(model, ck.Dense())
    expected = model(pixel_values=images).pooler_output
    if transformers.__version__ >= "4.5" and transformers.__version__.startswith("4."):
        with pytest.raises(ValueError, match="unpatch it for output_hidden_states"):
            model(pixel_values=images, output_hidden_states=True)
    assert torch.equal(model(pixel_values=images).pooler_output, expected)
    ck.unpatch(model)
    assert len(model(pixel_values=images, output_hidden_states=True).hidden_states) == 4


@torch.no_grad()
def test_a_hook_of_accelerate_on_the_encoder_blocks_unpatching():
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model, images = build("CLIPVisionModel")
    ck.patch(model, ck.EViT(0.5))
    encoder = model.get_submodule(encoder_of(model))
    hooks.add_hook_to_module(encoder, hooks.ModelHook())
    with pytest.raises(ck.UnsupportedTower, match="the forward of CLIPEncoder was replaced"):
        ck.unpatch(model)
    hooks.remove_hook_from_module(encoder)
    ck.unpatch(model)
    assert model(pixel_values=images).last_hidden_state.shape[1] == 65


@torch.no_grad()
def test_attention_maps_and_causal_masks_are_refused():
    model, images = build("CLIPVisionModel")
    ck.patch(model, ck.Dense())
    with pytest.raises(ValueError, match="a patched tower has no attention maps to return"):
        model(pixel_values=images, output_attentions=True)
    x = ck.tower_of(model).embed(images)[0]
    with pytest.raises(ValueError, match="a patched tower takes no causal mask"):
        ck.tower_of(model).owner(inputs_embeds=x, causal_attention_mask=torch.zeros(1, 1, 65, 65))


def siglip2_inputs(images, rows):
    """SigLIP2's inputs for images whose first `rows` rows of 8 patches are visible and the rest padding."""
    patches = images.unflatten(3, (8, 8)).unflatten(2, (8, 8)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    mask = (torch.arange(64) < 8 * rows).int().expand(len(images), -1)
    return {
        "pixel_values": patches * mask[..., None],
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[rows, 8]] * len(images)),
    }


def pooled(model, inputs):
    """The embedding (B,E) by the model's public method."""
    out = model.get_image_features(**inputs)
    return out if isinstance(out, torch.Tensor) else out.pooler_output


@torch.no_grad()
def test_dense_takes_padding_and_other_methods_refuse_it():
    model, images = build("Siglip2Model")
    padded, full = siglip2_inputs(images, 5), siglip2_inputs(images, 8)
    host, whole = pooled(model, padded), pooled(model, full)
    hidden = (1 - padded["pixel_attention_mask"])[..., None]
    noisy = {**padded, "pixel_values": padded["pixel_values"] + torch.randn(2, 64, 192) * hidden}
    with ck.patched(model, ck.Dense()):
        torch.testing.assert_close(pooled(model, padded), host, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pooled(model, noisy), host, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pooled(model, full), whole, rtol=1e-4, atol=1e-4)
    for method in (ck.EViT(0.5), ck.ToMe(4)):
        with ck.patched(model, method), pytest.raises(ValueError, match="takes images without padding, got a mask"):
            pooled(model, padded)
    with ck.patched(model, ck.ToMe(4)):
        expected = ck.encode_image(model, images).embedding
        torch.testing.assert_close(pooled(model, full), expected, rtol=1e-4, atol=1e-4)
    with ck.patched(model, ck.EViT(0.5)):
        if transformers.__version__.startswith("4."):
            with pytest.raises(ValueError, match="a pool with a mask for all patches"):
                pooled(model, full)
        else:
            expected = ck.encode_image(model, images).embedding
            torch.testing.assert_close(pooled(model, full), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["CLIPModel", "SiglipModel"])
def test_checkpointing_gives_the_same_gradients(family):
    model, images = build(family)
    model.train()
    for method in (*METHODS, patch_ranking(model, learnt=2)):
        ck.patch(model, method)
        grads = []
        for checkpointing in (False, True):
            model.zero_grad()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            ck.tower_of(model).encode(images).pow(2).sum().backward()
            model.gradient_checkpointing_disable()
            grads.append([p.grad.clone() for p in model.vision_model.parameters() if p.grad is not None])
        assert len(grads[0]) > 40
        for one, two in zip(*grads, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_counts_in_training_alone():
    model, _ = build("CLIPModel")
    ck.patch(model, ck.EViT(0.5))
    model.gradient_checkpointing_enable()
    assert not ck.tower_of(model).checkpointing
    model.train()
    assert ck.tower_of(model).checkpointing


@torch.no_grad()
def test_another_image_size_makes_a_new_plan():
    model, _ = build("CLIPVisionModel")
    large = torch.randn(1, 3, 96, 96)
    host = model(pixel_values=large, interpolate_pos_encoding=True)
    with ck.patched(model, ck.Dense()):
        actual = model(pixel_values=large, interpolate_pos_encoding=True)
        torch.testing.assert_close(actual.pooler_output, host.pooler_output, rtol=1e-4, atol=1e-4)
    with ck.patched(model, ck.EViT(0.5)):
        actual = model(pixel_values=large, interpolate_pos_encoding=True)
        assert actual.last_hidden_state.shape[1] == ck.EViT(0.5).plan(145, 3).tokens[-1]


@torch.no_grad()
def test_one_tower_inside_a_module_is_found_and_two_are_refused():
    model, images = build("CLIPVisionModel")
    wrapper = nn.Sequential(nn.Identity(), nn.ModuleDict({"tower": model}))
    ck.patch(wrapper, ck.EViT(0.5))
    assert ck.method_of(model) == ck.EViT(0.5)
    torch.testing.assert_close(ck.encode_image(wrapper, images).embedding, model(pixel_values=images).pooler_output)
    pair = nn.ModuleDict({"one": model, "other": copy.deepcopy(model)})
    with pytest.raises(ck.UnsupportedTower, match="expected one image tower, got 2 in ModuleDict: one, other"):
        ck.patch(pair, ck.Dense())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda layer: layer.self_attn.register_forward_hook(lambda *_: None),
            r"self_attn \(CLIP\w*Attention\) carries a hook",
        ),
        (lambda layer: setattr(layer, "forward", lambda *_: None), "EncoderLayer was replaced"),
        (lambda layer: setattr(layer.self_attn, "dropout", 0.1), r"without dropout, got p = 0\.1"),
        (lambda layer: setattr(layer.self_attn, "scale", 0.5), r"scaled by 32\*\*-0\.5, got 0\.5"),
        (lambda layer: setattr(layer, "mlp", nn.Sequential(layer.mlp, nn.Linear(64, 64))), None),
    ],
)
@torch.no_grad()
def test_a_changed_layer_is_refused_and_a_new_mlp_is_called(change, message):
    model, images = build("CLIPVisionModel")
    change(model.get_submodule(encoder_of(model)).layers[1])
    if message is None:
        host = model(pixel_values=images).pooler_output
        ck.patch(model, ck.Dense())
        torch.testing.assert_close(model(pixel_values=images).pooler_output, host, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ck.UnsupportedTower, match=f"block 1: .*{message}"):
            ck.patch(model, ck.Dense())


def encoder_of(model):
    return "encoder" if hasattr(model, "encoder") else "vision_model.encoder"


@pytest.mark.parametrize("family", ["Idefics3VisionTransformer", "Idefics2VisionTransformer"])
@torch.no_grad()
def test_a_tower_that_needs_a_mask_is_patched_but_not_encoded(family):
    library = family[:8].lower()
    maker = getattr(importlib.import_module(f"transformers.models.{library}.modeling_{library}"), family)
    tower = randomized(maker._from_config(maker.config_class(**SIZES, image_size=64, num_hidden_layers=2)).eval())
    images = torch.randn(2, 3, 64, 64)
    before = tower(images).last_hidden_state
    ck.patch(tower, ck.ToMe(2))
    assert tower(images).last_hidden_state.shape == before.shape
    ck.patch(tower, ck.Dense())
    torch.testing.assert_close(tower(images).last_hidden_state, before, rtol=1e-4, atol=1e-4)
    with pytest.raises(ck.UnsupportedTower, match=f"take images alone, got {family[:8]}VisionEmbeddings"):
        ck.encode_image(tower, images)


NARROW = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("family", "advice"),
    [
        ("ViTModel", r'load this ViT from timm instead, as timm\.create_model\("vit_base_patch16_224"'),
        ("ViTForImageClassification", "load this ViT from timm instead"),
        ("DeiTModel", 'timm.*"deit_base_distilled_patch16_224"'),
        ("Dinov2Model", 'timm.*"vit_base_patch14_dinov2"'),
        ("Dinov2WithRegistersModel", 'timm.*"vit_base_patch14_reg4_dinov2"'),
        ("BeitModel", "its N×N position bias needs every patch at its place: choose a ViT without one"),
        ("SwinModel", "its windows need every patch at its place: choose a ViT"),
        ("ResNetModel", "a convolutional network has no tokens to reduce: choose a ViT, such as open_clip's ViT-B-16"),
    ],
)
def test_other_towers_of_transformers_are_refused_with_advice(family, advice):
    maker = getattr(transformers, family)
    sizes = {"image_size": 64, "patch_size": 16} | (NARROW if "Swin" not in family and "ResNet" not in family else {})
    model = maker(maker.config_class(**sizes))
    expected = "expected an image ViT of open_clip, timm or OpenAI's clip, or a CLIP or SigLIP of transformers"
    with pytest.raises(ck.UnsupportedTower, match=f"{expected}, got transformers' {family}: .*{advice}"):
        ck.patch(model, ck.Dense())
    with pytest.raises(ck.UnsupportedTower, match=f"got Sequential with transformers' {family}: .*{advice}"):
        ck.patch(nn.Sequential(model), ck.Dense())


def test_owl_vit_and_text_towers_are_refused_by_name():
    owl = transformers.OwlViTVisionModel(transformers.OwlViTVisionConfig(**NARROW, image_size=64, patch_size=16))
    message = (
        "expected a CLIP or a SigLIP, got transformers' OwlViTVision.*: its heads find an object at every patch, .*"
    )
    with pytest.raises(ck.UnsupportedTower, match=message + "patch a CLIP, such as transformers.CLIPModel"):
        ck.patch(owl, ck.Dense())
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**NARROW, vocab_size=64, eos_token_id=63))
    with pytest.raises(ck.UnsupportedTower, match="got transformers' CLIPTextModel"):
        ck.patch(text, ck.Dense())


@torch.no_grad()
def test_an_attention_set_after_patching_is_a_warning():
    model, images = build("CLIPVisionModel")
    if not hasattr(model, "set_attn_implementation"):
        pytest.skip(f"transformers {transformers.__version__} sets no implementation afterwards")
    other = "eager" if model.config._attn_implementation == "sdpa" else "sdpa"
    ck.patch(model, ck.EViT(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = model(pixel_values=images).pooler_output
    model.set_attn_implementation(other)
    with pytest.warns(UserWarning, match=f"the implementation '{other}' that was set after patching is not used"):
        actual = model(pixel_values=images).pooler_output
    assert torch.equal(actual, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ck.patch(ck.unpatch(model), ck.EViT(0.5))
        assert torch.equal(model(pixel_values=images).pooler_output, expected)
