"""Every named configuration of open_clip: 115 are patched and unpatched, the other 29 are refused by name."""

import importlib.metadata
import json

import open_clip
import pytest
import timm
import torch
from torch import nn

import clipkernels as ck
from clipkernels.testing import assert_within_budget, open_clip_tower, patch_ranking, randomized

UNSUPPORTED = {
    "ModifiedResNet": (
        *("RN50", "RN50-quickgelu", "RN50x4", "RN50x4-quickgelu", "RN50x16", "RN50x16-quickgelu"),
        *("RN50x64", "RN50x64-quickgelu", "RN101", "RN101-quickgelu"),
    ),
    "TimmModel around timm's ConvNeXt": (
        *("convnext_base", "convnext_base_w", "convnext_base_w_320", "convnext_large", "convnext_large_d"),
        *("convnext_large_d_320", "convnext_small", "convnext_tiny", "convnext_xlarge", "convnext_xxlarge"),
        "convnext_xxlarge_320",
    ),
    "TimmModel around timm's FastVit": (
        *("MobileCLIP2-S0", "MobileCLIP2-S2", "MobileCLIP2-S3", "MobileCLIP2-S4", "MobileCLIP-S1", "MobileCLIP-S2"),
    ),
    "TimmModel around timm's SwinTransformer": ("swin_base_patch4_window7_224",),
    "TimmModel around timm's VisionTransformerRelPos": ("vit_relpos_medium_patch16_cls_224",),
}
SUPPORTED = [name for name in open_clip.list_models() if name not in sum(UNSUPPORTED.values(), ())]
METHODS = [ck.Dense(), ck.EViT(0.5), ck.ToMe(8), ck.TCA(0.1)]
# The quick tests run these, each for the feature named; `make test-all` runs every distinct configuration.
REPRESENTATIVES = {
    "ViT-B-16": "CLS pooling",
    "ViT-B-32-256": "65 tokens",
    "ViT-B-32-quickgelu": "QuickGELU",
    "ViT-M-16-alt": "LayerScale",
    "ViT-H-16": "head width 80",
    "ViT-L-14-CLIPA": "average pooling, no ln_pre",
    "coca_ViT-B-32": "attentional pooler",
    "coca_roberta-ViT-B-32": "output_tokens",
    "ViT-B-16-SigLIP": "timm, no CLS, MAP pooling",
    "MobileCLIP-B": "timm, CLS, convolutional patches",
    "ViTamin-S": "timm, average pooling, GeGLU",
    "vit_medium_patch16_gap_256": "timm, average pooling, LayerScale",
    "EVA02-B-16": "rotary, separate projections, SwiGLU",
    "PE-Core-T-16-384": "rotary, MAP pooling, 3 heads",
}
TWO_HEADS = {"ViT-H-16": {"width": 160}, "ViT-L-14-CLIPA": {"width": 128}}


def _distinct():
    """One name per vision configuration."""
    names = {}
    for name in SUPPORTED:
        config = open_clip.get_model_config(name)
        key = json.dumps([config["embed_dim"], config.get("quick_gelu", False), config["vision_cfg"]], sort_keys=True)
        names.setdefault(key, name)
    return list(names.values())


def _parameters():
    """Every distinct configuration. Quick are the representatives, the widest of them with two heads only."""
    for name in dict.fromkeys([*REPRESENTATIVES, *_distinct()]):
        if name in TWO_HEADS:
            yield pytest.param(name, TWO_HEADS[name], id=f"{name}, two heads")
        quick = name in REPRESENTATIVES and name not in TWO_HEADS
        yield pytest.param(name, {}, marks=[] if quick else [pytest.mark.slow], id=name)


def _model(name, **vision):
    """A two-block tower in which every vector is random, so that a test fails if one is ignored."""
    timm_name = open_clip.get_model_config(name)["vision_cfg"].get("timm_model_name")
    if timm_name is not None and not timm.is_model(timm_name):
        pytest.skip(f"timm {timm.__version__} has no {timm_name}")
    return randomized(open_clip_tower(name, **vision))


def _outputs(model, images):
    out = model.visual(images)
    return out if isinstance(out, tuple) else (out,)


def test_open_clip_has_115_supported_names_of_144():
    if not importlib.metadata.version("open_clip_torch").startswith("3.3."):
        pytest.skip("counted for open_clip 3.3")
    assert len(open_clip.list_models()) == 144
    assert (len(SUPPORTED), sum(map(len, UNSUPPORTED.values()))) == (115, 29)
    assert set(REPRESENTATIVES) <= set(SUPPORTED)


@pytest.mark.slow
def test_every_name_at_full_depth_is_recognised():
    for name in SUPPORTED:
        with torch.device("meta"):
            tower = ck.tower_of(open_clip_tower(name, None))
        config = open_clip.get_model_config(name)
        side, other = tower.image_size
        assert side == other and tower.out == config["embed_dim"], name
        assert tower.num_tokens == (side // tower.patch) ** 2 + tower.prefix, name
        if "timm_model_name" not in config["vision_cfg"]:  # otherwise timm's own model defines the size
            assert side == config["vision_cfg"].get("image_size", 224), name


@pytest.mark.parametrize(("name", "vision"), list(_parameters()))
@torch.no_grad()
def test_patching_and_unpatching_a_tower(name, vision):
    model = _model(name, **vision)
    tower = ck.tower_of(model)
    images = torch.randn(1, 3, *tower.image_size, generator=torch.Generator().manual_seed(0))
    before, keys = _outputs(model, images), list(model.state_dict())
    exact = _outputs(model.double(), images.double())
    model.float()
    for method in (*METHODS, patch_ranking(model, learnt=2)):
        ck.patch(model, method)
        assert list(model.state_dict()) == keys
        encoded = ck.encode_image(model, images, tokens=True, source=True)
        pooled, *rest = _outputs(model, images)
        if method == ck.Dense():
            for actual, true, host in zip((pooled, *rest), exact, before, strict=True):
                assert_within_budget(actual, true, host)
        torch.testing.assert_close(encoded.embedding, pooled, atol=1e-4, rtol=1e-4)
        _check_tokens(model, method, encoded, rest, tower)
    _check_gradients(model, images)
    ck.unpatch(model)
    assert list(model.state_dict()) == keys
    for actual, host in zip(_outputs(model, images), before, strict=True):
        assert torch.equal(actual, host)


def _check_gradients(model, images):
    """Assert that recomputing activations changes no gradient, and that `Dense()` has the host's gradients."""
    model.visual.set_grad_checkpointing(False)
    ck.patch(model, ck.EViT(0.5))
    without_checkpointing = _first_gradient(model, images)
    host = _first_gradient(ck.unpatch(model), images)
    model.visual.set_grad_checkpointing(True)
    for method, expected in ((ck.EViT(0.5), without_checkpointing), (ck.Dense(), host)):
        actual = _first_gradient(ck.patch(model, method), images)
        assert (actual - expected).norm() <= 1e-3 * expected.norm()
    model.visual.set_grad_checkpointing(False)


@torch.enable_grad()
def _first_gradient(model, images):
    (parameter, *_) = model.visual.parameters()
    (grad,) = torch.autograd.grad(_outputs(model, images)[0].pow(2).sum(), [parameter])
    assert grad.norm() > 0
    return grad


def _check_tokens(model, method, encoded, rest, tower):
    """Assert that token counts equal the plan's, and that `output_tokens` keeps its length under merging."""
    plan = method.plan(tokens=tower.num_tokens, blocks=len(tower.blocks), prefix=tower.prefix)
    pooler = model.visual.attn_pool if tower.pools_with_queries else None
    assert encoded.tokens.shape[1] == (plan.tokens[-1] if pooler is None else pooler.query.shape[0])
    assert encoded.tokens.shape[2] == tower.out
    assert encoded.source.shape == (1, sum(step is not None for step in plan.steps), tower.num_tokens - tower.prefix)
    if rest:
        short = pooler is None and not plan.merges
        expected = (
            plan.tokens[-1] - 1 if short else tower.num_tokens - 1 if pooler is None else pooler.query.shape[0] - 1
        )
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
def test_open_clips_own_attention_is_supported(options):
    model = _model("ViT-S-32", **options)
    assert not isinstance(model.visual.transformer.resblocks[0].attn, nn.MultiheadAttention)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    host = model.encode_image(images)
    exact = model.double().encode_image(images.double())
    ck.patch(model.float(), ck.Dense())
    assert_within_budget(model.encode_image(images), exact, host)
    ck.patch(model, ck.ToMe(4))
    assert ck.encode_image(model, images, tokens=True).tokens.shape[1] == 42


def test_attention_that_is_not_plain_dot_product_is_refused():
    model = _model("ViT-S-32", scaled_cosine_attn=True)
    with pytest.raises(ck.UnsupportedTower, match=r"block 0 .*: expected dot-product attention, got scaled cosine"):
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
def test_sequence_first_blocks_are_supported():
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
    """The tokens after the last block of a patched tower, before norm and projection."""
    from clipkernels.tower import TowerInput, run

    tower = ck.tower_of(model)
    plan = ck.method_of(model).plan(tower.num_tokens, len(tower.blocks))
    return run(tower, TowerInput(tower.embed(images)[0]), plan).x


def _unsupported():
    """Unsupported configurations; one per kind of tower is quick."""
    for tower_name, names in UNSUPPORTED.items():
        for name in names:
            yield pytest.param(name, tower_name, marks=[] if name == names[0] else [pytest.mark.slow])


def _unsupported_tower(name):
    """A tower without memory for its weights where its library allows that."""
    try:
        with torch.device("meta"):
            return open_clip_tower(name, None)
    except (NotImplementedError, RuntimeError):  # timm before 1.0.31 computes some of its numbers on the device
        return open_clip_tower(name, None)


@pytest.mark.parametrize(("name", "tower_name"), list(_unsupported()))
def test_an_unsupported_tower_is_refused_by_name_and_unchanged(name, tower_name):
    model = _unsupported_tower(name)
    classes = [type(module) for module in model.modules()]
    for call in (lambda: ck.patch(model, ck.EViT(0.7)), lambda: ck.unpatch(model), lambda: ck.method_of(model)):
        with pytest.raises(ck.UnsupportedTower, match=f"expected an image ViT of open_clip, .*, got {tower_name}"):
            call()
    assert [type(module) for module in model.modules()] == classes
