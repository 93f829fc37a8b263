"""Every VisionTransformer configuration of open_clip, and the refusal of every other tower."""

import json

import open_clip
import pytest
import torch
from torch import nn

import clipkernels as ck
from clipkernels.testing import assert_within_budget, open_clip_tower, vision_transformers

NAMES = (
    "coca_base",
    "coca_roberta-ViT-B-32",
    "coca_ViT-B-32",
    "coca_ViT-L-14",
    "mt5-base-ViT-B-32",
    "mt5-xl-ViT-H-14",
    "nllb-clip-base",
    "nllb-clip-large",
    "roberta-ViT-B-32",
    "ViT-B-16",
    "ViT-B-16-plus",
    "ViT-B-16-plus-240",
    "ViT-B-16-quickgelu",
    "ViT-B-32",
    "ViT-B-32-256",
    "ViT-B-32-plus-256",
    "ViT-B-32-quickgelu",
    "ViT-bigG-14",
    "ViT-bigG-14-CLIPA",
    "ViT-bigG-14-CLIPA-336",
    "ViT-bigG-14-quickgelu",
    "ViT-bigG-14-worldwide",
    "ViT-bigG-14-worldwide-378",
    "ViT-e-14",
    "ViT-g-14",
    "ViT-H-14",
    "ViT-H-14-378",
    "ViT-H-14-378-quickgelu",
    "ViT-H-14-CLIPA",
    "ViT-H-14-CLIPA-336",
    "ViT-H-14-quickgelu",
    "ViT-H-14-worldwide",
    "ViT-H-14-worldwide-378",
    "ViT-H-14-worldwide-quickgelu",
    "ViT-H-16",
    "ViT-L-14",
    "ViT-L-14-280",
    "ViT-L-14-336",
    "ViT-L-14-336-quickgelu",
    "ViT-L-14-CLIPA",
    "ViT-L-14-CLIPA-336",
    "ViT-L-14-quickgelu",
    "ViT-L-14-worldwide",
    "ViT-L-14-worldwide-quickgelu",
    "ViT-L-16",
    "ViT-L-16-320",
    "ViT-M-16",
    "ViT-M-16-alt",
    "ViT-M-32",
    "ViT-M-32-alt",
    "ViT-S-16",
    "ViT-S-16-alt",
    "ViT-S-32",
    "ViT-S-32-alt",
    "xlm-roberta-base-ViT-B-32",
    "xlm-roberta-large-ViT-H-14",
)
METHODS = [ck.Dense(), ck.EViT(0.5), ck.ToMe(8)]
# Fast in `make test`, each for something of its own; `make test-all` runs every distinct configuration.
REPRESENTATIVES = {
    "ViT-B-16": "CLS pooling",
    "ViT-B-32-256": "65 tokens",
    "ViT-B-32-quickgelu": "QuickGELU",
    "ViT-M-16-alt": "LayerScale",
    "ViT-H-16": "head width 80",
    "ViT-L-14-CLIPA": "average pooling, no ln_pre",
    "coca_ViT-B-32": "attentional pooler",
    "coca_roberta-ViT-B-32": "output_tokens",
}


def _distinct():
    """One name per vision configuration."""
    seen = {}
    for name in NAMES:
        config = open_clip.get_model_config(name)
        key = json.dumps([config["embed_dim"], config.get("quick_gelu", False), config["vision_cfg"]], sort_keys=True)
        seen.setdefault(key, name)
    return list(seen.values())


def _parameters():
    for name in dict.fromkeys([*REPRESENTATIVES, *_distinct()]):
        yield pytest.param(name, marks=[] if name in REPRESENTATIVES else [pytest.mark.slow])


def _model(name, **vision):
    """A two-block tower whose every vector (biases, layer scales, norms) is random, so that none can be left out."""
    torch.manual_seed(0)
    model = open_clip_tower(name, **vision)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1, 0.5)
    return model


def _outputs(model, images):
    out = model.visual(images)
    return out if isinstance(out, tuple) else (out,)


def test_open_clip_has_the_56_towers_that_are_served():
    assert len(NAMES) == 56
    assert set(NAMES) <= set(vision_transformers())
    assert set(REPRESENTATIVES) <= set(NAMES)


@pytest.mark.parametrize("name", list(_parameters()))
@torch.no_grad()
def test_a_tower_is_served_and_given_back(name):
    model = _model(name)
    tower = ck.tower_of(model)
    images = torch.randn(1, 3, *tower.image_size, generator=torch.Generator().manual_seed(0))
    before, keys = _outputs(model, images), list(model.state_dict())
    exact = _outputs(model.double(), images.double())
    model.float()
    for method in METHODS:
        ck.patch(model, method)
        assert list(model.state_dict()) == keys
        encoded = ck.encode_image(model, images, tokens=True, source=True)
        pooled, *rest = _outputs(model, images)
        if method == ck.Dense():
            for came, true, host in zip((pooled, *rest), exact, before, strict=True):
                assert_within_budget(came, true, host)
        torch.testing.assert_close(encoded.embedding, pooled, atol=1e-4, rtol=1e-4)
        _check_tokens(model, method, encoded, rest, tower)
    ck.unpatch(model)
    assert list(model.state_dict()) == keys
    for came, host in zip(_outputs(model, images), before, strict=True):
        assert torch.equal(came, host)


def _check_tokens(model, method, encoded, rest, tower):
    """Token counts equal the plan's, and `output_tokens` keeps its length under merging."""
    plan = method.plan(tokens=tower.tokens, blocks=len(tower.blocks), prefix=tower.prefix)
    pooler = model.visual.attn_pool
    assert encoded.tokens.shape[1] == (plan.tokens[-1] if pooler is None else pooler.query.shape[0])
    assert encoded.source.shape == (1, sum(step is not None for step in plan.steps), tower.tokens - 1)
    if rest:
        short = pooler is None and not plan.merges
        expected = plan.tokens[-1] - 1 if short else tower.tokens - 1 if pooler is None else pooler.query.shape[0] - 1
        assert rest[0].shape[1] == expected


@pytest.mark.parametrize(
    "options",
    [
        {"block_type": "custom"},
        {"qk_norm": True},
        {"scale_heads": True, "scale_attn_inner": True},
        {"scale_attn": True, "scale_fc": True},
    ],
)
@torch.no_grad()
def test_open_clips_own_attention_is_served(options):
    model = _model("ViT-S-32", **options)
    assert not isinstance(model.visual.transformer.resblocks[0].attn, nn.MultiheadAttention)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    host = model.encode_image(images)
    exact = model.double().encode_image(images.double())
    ck.patch(model.float(), ck.Dense())
    assert_within_budget(model.encode_image(images), exact, host)
    ck.patch(model, ck.ToMe(4))
    assert ck.encode_image(model, images, tokens=True).tokens.shape[1] == 42


def test_attention_that_is_no_plain_dot_product_is_refused():
    model = _model("ViT-S-32", scaled_cosine_attn=True)
    with pytest.raises(ck.UnsupportedTower, match="block 0: expected dot-product attention, got scaled cosine"):
        ck.patch(model, ck.Dense())
    model = _model("ViT-S-32", block_type="custom")
    model.visual.transformer.resblocks[1].attn.attn_drop.p = 0.1
    with pytest.raises(ck.UnsupportedTower, match=r"block 1: expected attention without dropout, got p = 0\.1"):
        ck.patch(model, ck.Dense())


def test_a_pair_of_poolers_is_refused():
    model = _model("coca_ViT-B-32", attentional_pool="cascade")
    with pytest.raises(
        ck.UnsupportedTower, match="expected one attentional pooler, got VisionTransformer with a cascade"
    ):
        ck.patch(model, ck.Dense())


@torch.no_grad()
def test_blocks_that_run_sequence_first_are_served():
    model = _model("ViT-S-32")
    transformer = model.visual.transformer
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = model.encode_image(images)
    transformer.batch_first = False
    for block in transformer.resblocks:
        block.attn.batch_first = False
    torch.testing.assert_close(model.encode_image(images), expected, atol=1e-5, rtol=1e-5)
    ck.patch(model, ck.Dense())
    torch.testing.assert_close(model.encode_image(images), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_average_pool_weighs_merged_tokens_by_size():
    model = _model("ViT-L-14-CLIPA")
    visual = model.visual
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ck.patch(model, ck.ToMe(40))
    encoded = ck.encode_image(model, images, source=True)
    short = _last_tokens(model, images)
    size = torch.bincount(encoded.source[0, -1].long(), minlength=short.shape[1]).float()
    mean = (short[0] * size[:, None]).sum(0) / size.sum()
    torch.testing.assert_close(encoded.embedding[0], visual.ln_post(mean) @ visual.proj, atol=1e-4, rtol=1e-4)


def _last_tokens(model, images):
    """What leaves the last block, before norm and projection, of a patched tower."""
    from clipkernels.tower import run

    tower = ck.tower_of(model)
    plan = ck.method_of(model).plan(tower.tokens, len(tower.blocks))
    return run(tower, tower.embed(images)[0], plan).x


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("RN50", "ModifiedResNet"),
        ("convnext_base", "ConvNeXt"),
        ("swin_base_patch4_window7_224", "SwinTransformer"),
        ("MobileCLIP-S1", "FastVit"),
        ("vit_relpos_medium_patch16_cls_224", "VisionTransformerRelPos"),
    ],
)
def test_another_tower_is_refused_by_name_before_it_is_touched(name, found):
    config = open_clip.get_model_config(name)
    text = {"context_length": 16, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
    with torch.device("meta"):
        model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text)
    classes = [type(module) for module in model.modules()]
    for act in (lambda: ck.patch(model, ck.EViT(0.7)), lambda: ck.unpatch(model), lambda: ck.method_of(model)):
        with pytest.raises(ck.UnsupportedTower, match=f"expected an image ViT of open_clip, .*, got .*{found}"):
            act()
    assert [type(module) for module in model.modules()] == classes
