"""timm's VisionTransformer and Eva on their own: registers, rotary embeddings, every pool, every block they have."""

import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import clipkernels as ck
from clipkernels import block as one_block
from clipkernels.testing import assert_within_budget, patch_ranking, randomized, timm_tower
from clipkernels.tower import Reads, TowerInput, run

timm = pytest.importorskip("timm", reason="timm is not installed")
METHODS = [ck.Dense(), ck.EViT(0.5), ck.EViT(0.5, fuse=False), ck.ToMe(8), ck.TCA(0.1)]
SMALL = {"embed_dim": 64, "num_heads": 2, "img_size": 64, "num_classes": 24}
# Towers by name: options, and the feature that each tests.
TOWERS = {
    "vit_base_patch16_clip_224": ({}, "CLS pooling, norm before the blocks"),
    "vit_base_patch16_siglip_224": ({}, "no CLS, MAP pooling"),
    "vit_base_patch16_reg4_gap_256": ({}, "four registers and no CLS, average pooling"),
    "vit_base_patch14_reg4_dinov2": ({"img_size": 56}, "CLS and four registers"),
    "vit_base_patch16_224": ({"qk_norm": True, "init_values": 0.5, "scale_attn_norm": True}, "norms in attention"),
    "vit_small_patch16_224": ({"block_fn": "post"}, "post-norm blocks"),
    "eva02_base_patch16_clip_224": ({}, "rotary, separate projections, SwiGLU with a norm"),
    "vit_pe_core_base_patch16_224": ({}, "rotary, one projection, MAP pooling over CLS too"),
    "eva_giant_patch14_clip_224": ({"img_size": 56}, "no rotary, biases apart from the packed weight"),
    "eva02_enormous_patch14_clip_224": ({"img_size": 56, "swiglu_mlp": True}, "Eva's post-norm blocks"),
    "deit_small_distilled_patch16_224": ({}, "a distillation token beside CLS, both pooled"),
    "vit_small_patch16_dinov3": ({"img_size": 64}, "rotary in halves, registers"),
}


def build(name, layers=3, **more):
    from timm.models.vision_transformer import ResPostBlock

    options = {**SMALL, **TOWERS[name][0], **more}
    if options.get("block_fn") == "post":
        options["block_fn"] = ResPostBlock
    try:
        model = timm_tower(name, layers, **options)
    except RuntimeError as error:  # older versions of timm have fewer models
        pytest.skip(str(error))
    return randomized(model), torch.randn(2, 3, *model.patch_embed.img_size)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_patching_and_unpatching_a_tower(name):
    model, images = build(name)
    tower = ck.tower_of(model)
    before, state = model(images), {key: value.clone() for key, value in model.state_dict().items()}
    exact = model.double()(images.double())
    model.float()
    for method in (*METHODS, patch_ranking(model, learnt=2)):
        ck.patch(model, method)
        actual = model(images)
        encoded = ck.encode_image(model, images, tokens=True, source=True)
        plan = method.plan(tower.num_tokens, len(tower.blocks), tower.prefix)
        if method == ck.Dense():
            assert_within_budget(actual, exact, before)
        else:
            assert not torch.allclose(actual, before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encoded.embedding, actual, atol=1e-5, rtol=1e-5)
        assert encoded.tokens.shape == (2, plan.tokens[-1], 24)
        assert encoded.source.shape == (2, sum(map(bool, plan.steps)), tower.num_tokens - tower.prefix)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    ck.unpatch(model)
    assert torch.equal(model(images), before)
    assert list(model.state_dict()) == list(state)


def _names():
    for module in ("vision_transformer", "vision_transformer_hybrid", "deit", "eva"):
        yield from timm.list_models(module=module)


# Unsupported names, as patterns, with the message of each.
UNSUPPORTED = {
    r"rope_mixed": "rotary embeddings that all blocks share",
    r"(large|huge|giant|5b)_patch16_sapiens2": "as many key as query heads",
    r"18x2|_xp_|_d?pwee_": "the forward of a Block or an EvaBlock, got that of (Parallel|DiffParallel)",
    r"_dwee_|_dlittle_": "expected Attention, AttentionRope or EvaAttention, got DiffAttention",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(_names()))
@torch.no_grad()
def test_every_name_is_supported_or_refused_with_a_reason(name):
    """Test each name at its real width, with two blocks and few patches."""
    message = next((text for part, text in UNSUPPORTED.items() if re.search(part, name)), None)
    if message is not None:
        with torch.device("meta"):
            model = timm_tower(name, None)
        with pytest.raises(ck.UnsupportedTower, match=message):
            ck.patch(model, ck.Dense())
        return
    patch = re.search(r"patch(\d+)", name)
    size = {"img_size": 4 * int(patch[1])} if patch else {}  # the size of other models depends on convolutions
    layers = None if "sapiens2" in name else 2  # sapiens2 lists its key heads per block, so it keeps its depth
    model = randomized(timm_tower(name, layers, **size))
    tower = ck.tower_of(model)
    images, state = torch.randn(1, 3, *tower.image_size), list(model.state_dict())
    before = model(images)
    exact = model.double()(images.double())
    model.float()
    for method in (*METHODS, patch_ranking(model, learnt=2)):
        ck.patch(model, method)
        actual, encoded = model(images), ck.encode_image(model, images, tokens=True, source=True)
        plan = method.plan(tower.num_tokens, len(tower.blocks), tower.prefix)
        if method == ck.Dense():
            assert_within_budget(actual, exact, before)
        torch.testing.assert_close(encoded.embedding, actual, atol=1e-4, rtol=1e-4)
        assert encoded.tokens.shape == (1, plan.tokens[-1], tower.out)
        assert encoded.source.shape == (
            1,
            sum(step is not None for step in plan.steps),
            tower.num_tokens - tower.prefix,
        )
        assert list(model.state_dict()) == state
    ck.unpatch(model)
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("name", ["vit_base_patch14_reg4_dinov2", "vit_base_patch16_reg4_gap_256"])
@torch.no_grad()
def test_registers_are_never_dropped_merged_or_moved(name):
    model, images = build(name)
    tower = ck.tower_of(model)
    x, rope = tower.embed(images)
    for method in (ck.EViT(0.1), ck.ToMe(100)):
        # Blocks whose residuals are zero leave the tokens unchanged, so the prefix must come out as it went in.
        for block in model.blocks:
            for parameter in (*block.attn.proj.parameters(), *block.mlp.fc2.parameters()):
                parameter.zero_()
        plan = method.plan(tower.num_tokens, 3, tower.prefix)
        output = run(tower, TowerInput(x, rope), plan.ranked_by("received"), Reads(track=True))
        assert torch.equal(output.x[:, : tower.prefix], x[:, : tower.prefix])
        assert output.x.shape[1] == plan.tokens[-1] < x.shape[1]
        assert all(((source < 0) | (source >= tower.prefix)).all() for source in output.sources)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    "name", ["eva02_base_patch16_clip_224", "vit_pe_core_base_patch16_224", "vit_small_patch16_dinov3"]
)
@torch.no_grad()
def test_rotary_embeddings_follow_their_patches_through_pruning(name, fuse):
    model, images = build(name)
    tower = ck.tower_of(model)
    with ck.patched(model, ck.EViT(0.5, blocks=(0,), fuse=fuse)):
        actual = ck.encode_image(model, images, source=True)
        features = model.forward_features(images)
    x, rope = tower.embed(images)
    keep = -(-rope.shape[-2] // 2)
    for image in range(2):
        # The host's own blocks on the kept patches, each with its own row of the rotary table.
        row = actual.source[image, 0]
        index = ((row >= 0) & (row < tower.prefix + keep)).nonzero()[:, 0]
        assert len(index) == keep
        block = model.blocks[0]
        attended = block.attn(block.norm1(x), rope=rope)
        middle = x + (attended if block_scale(block) is None else attended * block_scale(block))
        rows = torch.cat([torch.arange(tower.prefix), index + tower.prefix])
        table = rope[..., index, :]
        tokens = middle[image : image + 1, rows]
        if fuse:
            # The fused token has no position and is not rotated.
            weights = _received_or_cls(tower, x, rope, image)
            dropped = torch.ones(rope.shape[-2], dtype=torch.bool)
            dropped[index] = False
            fused = weights[dropped] @ middle[image, tower.prefix :][dropped]
            tokens = torch.cat([tokens, fused[None, None]], 1)
            width = table.shape[-1] // 2
            table = torch.cat([table, torch.cat([torch.zeros(1, width), torch.ones(1, width)], 1)])
        second = block.mlp(block.norm2(tokens))
        tokens = tokens + (second if block_scale(block, 2) is None else second * block_scale(block, 2))
        for later in model.blocks[1:]:
            tokens = later(tokens, rope=table)
        torch.testing.assert_close(features[image : image + 1], model.norm(tokens), rtol=1e-4, atol=1e-4)


def block_scale(block, half=1):
    return getattr(block, f"gamma_{half}")


def _received_or_cls(tower, x, rope, image):
    """The scores (P,) that rank the patches of one image in the first block, from attention written out."""
    q, k, _ = tower.parts(tower.blocks[0]).qkv(x, None, None, rope)
    attention = (q[image] @ k[image].mT * q.shape[-1] ** -0.5).softmax(-1)
    rows = attention[:, 0] if tower.pools_cls else attention.mean(1)
    return rows.mean(0)[tower.prefix :]


@torch.no_grad()
def test_a_merged_token_has_the_position_of_its_target():
    model, images = build("vit_pe_core_base_patch16_224")
    tower = ck.tower_of(model)
    x, rope = tower.embed(images)
    state = one_block.TokenState(x, rope=rope)
    output = one_block.forward(tower.parts(tower.blocks[0]), state, ck.Merge(5), 1, track=True, place=True)
    merged, to, origin = output.state, output.destination, output.origin
    for image in range(2):
        for row in range(1, merged.x.shape[1]):
            members = (to[image] == row).nonzero()[:, 0]
            # Targets are at odd positions; a token that did not merge is alone in its row.
            target = members[members % 2 == 1] if len(members) > 1 else members
            assert torch.equal(merged.rope[image, 0, row - 1], rope[target[0] - 1])
            assert origin[image, row - 1] == target[0] - 1


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224", "eva02_base_patch16_clip_224"])
@torch.no_grad()
def test_features_and_intermediates_keep_the_hosts_shapes(name):
    model, images = build(name)
    features = model.forward_features(images)
    for options in ({}, {"output_fmt": "NLC", "return_prefix_tokens": True}, {"indices": [0, 1], "stop_early": True}):
        host = model.forward_intermediates(images, norm=True, **options)
        with ck.patched(model, ck.Dense()):
            actual = model.forward_intermediates(images, norm=True, **options)
            torch.testing.assert_close(model.forward_features(images), features, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(actual, host, rtol=1e-4, atol=1e-4)
        with ck.patched(model, ck.ToMe(4)):
            final, merged = model.forward_intermediates(images, **options)
            if not options.get("stop_early"):
                torch.testing.assert_close(final, model.forward_features(images), rtol=1e-4, atol=1e-4)
        assert final.shape == host[0].shape
        assert tree_map(lambda y: y.shape, merged) == tree_map(lambda y: y.shape, host[1])
    with ck.patched(model, ck.EViT(0.5, fuse=False)):
        only = model.forward_intermediates(images, intermediates_only=True)
        source = ck.encode_image(model, images, source=True).source
    dropped = (source[:, -1] < 0).unflatten(1, only[-1].shape[2:])
    assert dropped.any() and (only[-1].abs().sum(1)[dropped] == 0).all() and (only[-1].abs().sum(1)[~dropped] > 0).all()
    with ck.patched(model, ck.Dense()), pytest.raises(ValueError, match='output_fmt must be "NCHW" or "NLC"'):
        model.forward_intermediates(images, output_fmt="NHWC")


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "eva02_base_patch16_clip_224"])
def test_checkpointing_and_stochastic_depth_keep_gradients(name):
    model, images = build(name)
    for block in model.blocks:
        block.drop_path1 = timm.layers.DropPath(0.5)
    model.train()
    for method in (*METHODS, patch_ranking(model, learnt=2)):
        ck.patch(model, method)
        grads = []
        for checkpointing in (False, True):
            model.zero_grad()
            model.set_grad_checkpointing(checkpointing)
            torch.manual_seed(1)
            model(images).pow(2).sum().backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert len(grads[0]) >= len(list(model.blocks.parameters()))
        for one, two in zip(*grads, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in TOWERS if "distilled" not in name])  # its pool is fixed
def test_dense_trains_as_the_host_with_dropout_and_gradients(name):
    model, images = build(name, global_pool="avg", proj_drop_rate=0.3, drop_path_rate=0.3, patch_drop_rate=0.3)
    model.train()
    outcomes = []
    for method in (None, ck.Dense()):
        if method is not None:
            ck.patch(model, method)
        model.zero_grad()
        torch.manual_seed(1)
        out = model(images)
        out.pow(2).sum().backward()
        outcomes.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(outcomes[0]) > len(list(model.blocks.parameters()))
    for host, actual in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, host, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "eva02_base_patch16_clip_224"])
def test_checkpointing_recomputes_every_block(name, monkeypatch):
    model, images = build(name)
    ck.patch(model, ck.EViT(0.5)).set_grad_checkpointing(True)
    runs, once = [], one_block.forward
    monkeypatch.setattr(one_block, "forward", lambda *args, **options: runs.append(1) or once(*args, **options))
    model(images).sum().backward()
    assert len(runs) == 6
    runs.clear()
    model.set_grad_checkpointing(False)
    model(images).sum().backward()
    assert len(runs) == 3


@pytest.mark.parametrize("name", TOWERS)
def test_every_tower_is_verified_without_a_warning(name, recwarn):
    model, _ = build(name)
    recwarn.clear()
    ck.patch(model, ck.Dense())
    assert not recwarn.list


@torch.no_grad()
def test_changing_the_pool_after_patching_takes_effect():
    model, images = build("vit_base_patch16_clip_224")
    ck.patch(model, ck.EViT(0.5))
    model.reset_classifier(0, "avg")
    actual = model(images)
    torch.testing.assert_close(actual, ck.encode_image(model, images).embedding, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual, ck.patch(ck.unpatch(model), ck.EViT(0.5))(images))


@torch.no_grad()
def test_a_mask_is_refused_rather_than_ignored():
    model, images = build("vit_base_patch16_clip_224")
    ck.patch(model, ck.Dense())
    mask = torch.zeros(17, 17)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=r"a patched tower takes no mask, got an attn_mask of shape \(17, 17\)"):
            call(images, attn_mask=mask)
    with pytest.raises(ValueError, match="a patched tower takes no mask, got is_causal=True"):
        model(images, is_causal=True)


@torch.no_grad()
def test_a_tower_without_cls_ranks_by_received_attention():
    model, images = build("vit_base_patch16_siglip_224")
    tower = ck.tower_of(model)
    x, _ = tower.embed(images)
    ck.patch(model, ck.EViT(0.5, blocks=(0,), fuse=False))
    is_kept = ck.encode_image(model, images, source=True).source[:, 0] >= 0
    for image in range(2):
        scores = _received_or_cls(tower, x, None, image)
        assert set(scores.topk(8).indices.tolist()) == set(is_kept[image].nonzero()[:, 0].tolist())
    with pytest.raises(ck.UnsupportedTower, match="a CLS token for cls_path and anchors, got Vision"):
        ck.encode_image(model, images, cls_path=True)


@torch.no_grad()
def test_each_token_is_the_pools_output_for_it_alone():
    model, images = build("vit_base_patch16_siglip_224")
    tower = ck.tower_of(model)
    encoded = ck.encode_image(model, images, tokens=True)
    x, _ = tower.embed(images)
    for block in model.blocks:
        x = block(x)
    alone = torch.stack([model.forward_head(model.norm(x[:, n : n + 1])) for n in range(x.shape[1])], 1)
    torch.testing.assert_close(encoded.tokens, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: timm_tower("vit_base_patch16_224", 1, **SMALL, block_fn=_parallel()),
            "expected the forward of a Bl",
        ),
        (lambda: _Odd(depth=1, **SMALL), r"expected timm's own VisionTransformer.forward_features, got that of _Odd"),
        (lambda: timm_tower("vit_small_patch16_rope_mixed_224", 1, **SMALL), "rotary embeddings that all blocks share"),
        (
            lambda: timm.create_model("resnet18"),
            "expected an image ViT of open_clip, .*, got timm's ResNet: a convolutional",
        ),
        (lambda: _with(lambda attn: setattr(attn.attn_drop, "p", 0.1)), r"without dropout, got p = 0\.1"),
        (lambda: _with(lambda attn: attn.register_forward_hook(print)), r"its attn \(Attention\) carries a hook"),
        (
            lambda: _with(lambda attn: attn.attn_drop.register_forward_hook(print)),
            r"its attn\.attn_drop \(Dropout\) carries a hook",
        ),
    ],
)
def test_an_unsupported_tower_is_refused_unchanged(make, message):
    model = make()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ck.UnsupportedTower, match=message):
        ck.patch(model, ck.EViT(0.5))
    assert [type(module) for module in model.modules()] == classes


class _Odd(timm.models.vision_transformer.VisionTransformer):
    def forward_features(self, x, attn_mask=None):
        return super().forward_features(x).flip(1)


def _parallel():
    from timm.models.vision_transformer import ParallelScalingBlock

    return ParallelScalingBlock


def _with(change):
    model, _ = build("vit_base_patch16_224")
    change(model.blocks[1].attn)
    return model


@torch.no_grad()
def test_a_hook_on_the_bypassed_container_is_refused():
    model, images = build("vit_base_patch16_clip_224")
    ck.patch(model, ck.Dense())
    handle = model.blocks.register_forward_hook(lambda *_: None)
    with pytest.raises(ck.UnsupportedTower, match="its Sequential carries a hook"):
        model(images)
    handle.remove()
    assert model(images).isfinite().all()


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "vit_pe_core_base_patch16_224"])
@pytest.mark.parametrize("order", ["before", "after"])
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # torch.ao.quantization warns about itself
def test_dynamically_quantized_projections_are_called(name, order):
    quantize = partial(torch.ao.quantization.quantize_dynamic, qconfig_spec={nn.Linear}, dtype=torch.qint8)
    model, images = build(name)
    host = quantize(model)
    expected = host(images)
    assert not torch.allclose(expected, model(images), rtol=1e-3, atol=1e-3)
    patched = ck.patch(host, ck.Dense()) if order == "before" else quantize(ck.patch(model, ck.Dense()))
    torch.testing.assert_close(patched(images), expected, rtol=1e-3, atol=1e-3)
    for method in (ck.EViT(0.5), ck.ToMe(8), patch_ranking(patched)):
        assert ck.patch(patched, method)(images).isfinite().all()
    assert torch.equal(ck.unpatch(patched)(images), expected)


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224", "eva02_base_patch16_clip_224"])
@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 3, 48, 48), (2, 3, 64, 32)])
def test_images_of_another_shape_are_refused_in_one_line(name, shape):
    model = ck.patch(build(name)[0], ck.Dense())
    actual = ",".join(map(str, shape))
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=rf"^images must be \(B,3,64,64\), got \({actual}\)$"):
            call(torch.zeros(shape))
