"""Patching: undo, replacement, refusals, and all uses of a model that a patch must not break."""

import copy
import gc
import pickle
import re
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import clipkernels as ck
from clipkernels.testing import openai_tower, patch_ranking, timm_tower, transformers_tower

METHODS = [ck.Dense(), ck.EViT(0.5), ck.EViT(0.5, fuse=False), ck.EViT(0.5, score="random"), ck.ToMe(8), ck.TCA(0.1)]
METHODS.append(patch_ranking(ck.bundled()[0], learnt=2))
pytestmark = pytest.mark.filterwarnings("ignore:.*lru_cache.*")


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_unpatching_restores_the_model_bit_for_bit(tiny, images, method):
    before, keys, cls = tiny.encode_image(images), list(tiny.state_dict()), type(tiny.visual.transformer)
    assert ck.patch(tiny, method) is tiny
    assert ck.method_of(tiny) == method
    assert list(tiny.state_dict()) == keys
    assert ck.unpatch(tiny) is tiny
    assert ck.method_of(tiny) is None
    assert type(tiny.visual.transformer) is cls
    assert "_clipkernels" not in vars(tiny.visual.transformer)
    assert torch.equal(tiny.encode_image(images), before)


@torch.no_grad()
def test_dense_equals_the_host_up_to_rounding(tiny, images):
    expected = tiny.encode_image(images)
    with ck.patched(tiny, ck.Dense()):
        torch.testing.assert_close(tiny.encode_image(images), expected, atol=5e-6, rtol=1e-5)


@torch.no_grad()
def test_unpatching_an_unpatched_model_does_nothing(tiny, images):
    before = tiny.encode_image(images)
    assert torch.equal(ck.unpatch(tiny).encode_image(images), before)


@torch.no_grad()
def test_patching_again_replaces_the_method(tiny, images):
    ck.patch(tiny, ck.EViT(0.5))
    ck.patch(tiny, ck.ToMe(8))
    once = ck.patch(ck.bundled()[0], ck.ToMe(8))
    assert torch.equal(tiny.encode_image(images), once.encode_image(images))
    ck.unpatch(tiny)
    assert ck.method_of(tiny) is None


def test_patched_restores_the_previous_method_after_an_error(tiny):
    ck.patch(tiny, ck.EViT(0.5))
    with pytest.raises(KeyError), ck.patched(tiny, ck.ToMe(8)) as inside:
        assert inside is tiny and ck.method_of(tiny) == ck.ToMe(8)
        raise KeyError
    assert ck.method_of(tiny) == ck.EViT(0.5)
    ck.unpatch(tiny)
    with ck.patched(tiny, ck.Dense()):
        pass
    assert ck.method_of(tiny) is None


@torch.no_grad()
def test_the_visual_tower_alone_can_be_patched(tiny, images):
    ck.patch(tiny.visual, ck.EViT(0.5))
    assert ck.method_of(tiny) == ck.EViT(0.5)
    assert torch.equal(tiny.visual(images), tiny.encode_image(images))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_copy_is_patched_and_independent(tiny, images, method, copier):
    before = tiny.encode_image(images)
    expected = ck.patch(tiny, method).encode_image(images)
    other = copier(tiny)
    assert torch.equal(other.encode_image(images), expected)
    for parameter in other.parameters():
        parameter.zero_()
    assert torch.equal(tiny.encode_image(images), expected)
    ck.unpatch(other)
    assert ck.method_of(tiny) == method
    assert torch.equal(ck.unpatch(tiny).encode_image(images), before)


@torch.no_grad()
def test_torch_save_and_load_keep_the_patch(tiny, images, tmp_path):
    expected = ck.patch(tiny, ck.EViT(0.5)).encode_image(images)
    torch.save(tiny, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert ck.method_of(loaded) == ck.EViT(0.5)
    assert torch.equal(loaded.encode_image(images), expected)


@torch.no_grad()
def test_a_patched_tower_reads_new_weights_and_dtypes(tiny, images):
    ck.patch(tiny, ck.EViT(0.5))
    other = {name: tensor + 0.01 for name, tensor in tiny.state_dict().items()}
    tiny.load_state_dict(other)
    fresh = ck.bundled()[0]
    fresh.load_state_dict(other)
    assert torch.equal(tiny.encode_image(images), ck.patch(fresh, ck.EViT(0.5)).encode_image(images))
    assert tiny.half().encode_image(images.half()).dtype == torch.float16
    assert tiny.double().encode_image(images.double()).dtype == torch.float64
    assert tiny.to(torch.bfloat16).encode_image(images.bfloat16()).dtype == torch.bfloat16
    assert tiny.to("meta").encode_image(images.bfloat16().to("meta")).shape == (3, 128)


def test_a_patched_tower_reads_the_weights_of_an_optimiser_step(tiny, images):
    ck.patch(tiny, ck.EViT(0.5))
    optimiser = torch.optim.SGD(tiny.visual.parameters(), lr=0.1)
    before = tiny.encode_image(images)
    before.pow(2).sum().backward()
    optimiser.step()
    fresh = ck.bundled()[0]
    fresh.load_state_dict(tiny.state_dict())
    after = tiny.encode_image(images)
    assert not torch.equal(after, before)
    assert torch.equal(after, ck.patch(fresh, ck.EViT(0.5)).encode_image(images))


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_gives_the_same_result_and_gradients(tiny, images, method):
    ck.patch(tiny.train(), method)
    grads = []
    for checkpointing in (False, True):
        tiny.zero_grad()
        tiny.visual.set_grad_checkpointing(checkpointing)
        tiny.encode_image(images).pow(2).sum().backward()
        grads.append([p.grad.clone() for p in tiny.visual.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_gradients_reach_every_weight_of_a_reduced_tower(tiny, images):
    for method in METHODS:
        tiny.zero_grad()
        ck.patch(tiny.train(), method).encode_image(images).pow(2).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in tiny.visual.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_eight_threads_with_different_batches_share_one_model(tiny, method):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 3, 32, 32, generator=generator) for n in (1, 2, 3, 5, 8, 1, 4, 7)]
    ck.patch(tiny, method)

    def encode(batch):
        with torch.no_grad():
            return [tiny.encode_image(batch) for _ in range(3)]

    alone = [encode(batch)[0] for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        for expected, actual in zip(alone, pool.map(encode, batches), strict=True):
            assert all(torch.equal(one, expected) for one in actual)


@torch.no_grad()
def test_nothing_is_written_to_a_module_while_it_runs(tiny, images):
    ck.patch(tiny, ck.ToMe(8))
    before = {name: dict(vars(module)) for name, module in tiny.named_modules()}
    tiny.encode_image(images)
    ck.encode_image(tiny, images, tokens=True, cls_path=True, source=True)
    for name, module in tiny.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(vars(module)[key] is value for key, value in before[name].items())


@torch.no_grad()
def test_hooks_on_the_tower_and_its_norms_and_mlps_fire(tiny, images):
    calls, visual = [], tiny.visual
    block = visual.transformer.resblocks[0]
    hooked = {"visual": visual, "transformer": visual.transformer, "norm": block.ln_1, "mlp": block.mlp}
    ck.patch(tiny, ck.EViT(0.5))
    for name, module in hooked.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    tiny.encode_image(images)
    assert sorted(calls) == sorted(hooked)


@torch.no_grad()
def test_a_hook_on_the_transformer_sees_every_row(tiny, images):
    ck.patch(tiny, ck.Dense())
    shapes = []
    tiny.visual.transformer.register_forward_hook(lambda _, __, out: shapes.append(out.shape))
    tiny.encode_image(images)
    assert shapes == [(3, 65, 128)]


@torch.no_grad()
def test_a_hook_on_a_bypassed_module_is_refused_now_and_later(tiny, images):
    module = tiny.visual.transformer.resblocks[2].attn
    handle = module.register_forward_hook(lambda *_: None)
    with pytest.raises(ck.UnsupportedTower, match=r"block 2: its attn \(MultiheadAttention\) carries a hook"):
        ck.patch(tiny, ck.EViT(0.5))
    assert ck.method_of(tiny) is None
    handle.remove()
    ck.patch(tiny, ck.EViT(0.5))
    module.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ck.UnsupportedTower, match="carries a hook"):
        tiny.encode_image(images)


def test_a_replaced_forward_is_refused(tiny):
    tiny.visual.transformer.forward = lambda x: x
    with pytest.raises(ck.UnsupportedTower, match="the forward of Transformer was replaced"):
        ck.patch(tiny, ck.Dense())


def test_a_block_with_another_forward_is_refused(tiny):
    class Doubled(type(tiny.visual.transformer.resblocks[0])):
        def forward(self, q_x, *args, **kwargs):
            return 2 * super().forward(q_x, *args, **kwargs)

    tiny.visual.transformer.resblocks[3].__class__ = Doubled
    with pytest.raises(ck.UnsupportedTower, match="block 3: expected a plain attention block, got Doubled"):
        ck.patch(tiny, ck.EViT(0.5))
    assert ck.method_of(tiny) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_that_is_small_beside_the_input_is_verified(tiny, dtype):
    class More(type(tiny.visual.transformer.resblocks[0])):
        def forward(self, q_x, *args, **kwargs):
            return q_x + 1.1 * (super().forward(q_x, *args, **kwargs) - q_x)

    for block in tiny.visual.transformer.resblocks:
        torch.nn.init.constant_(block.mlp.c_proj.weight, 1e-5)
        torch.nn.init.constant_(block.attn.out_proj.weight, 1e-5)
        torch.nn.init.constant_(block.mlp.c_proj.bias, 1e-4)
        torch.nn.init.constant_(block.attn.out_proj.bias, 1e-4)
    ck.unpatch(ck.patch(tiny.to(dtype), ck.Dense()))
    for block in tiny.visual.transformer.resblocks:
        block.__class__ = More
    with pytest.raises(ck.UnsupportedTower, match="got More, whose residual differs"):
        ck.patch(tiny, ck.Dense())


def test_a_wrapped_or_separately_compiled_block_is_refused(tiny):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    blocks = tiny.visual.transformer.resblocks
    plain = blocks[2]
    blocks[2] = checkpoint_wrapper(plain)
    with pytest.raises(ck.UnsupportedTower, match="block 2: expected ln_1, attn, ln_2 and mlp, got CheckpointWrapper"):
        ck.patch(tiny, ck.Dense())
    blocks[2] = plain
    plain.compile()
    with pytest.raises(ck.UnsupportedTower, match="block 2: its ResidualAttentionBlock is compiled by itself"):
        ck.patch(tiny, ck.Dense())


def test_attention_with_unsupported_options_is_refused(tiny):
    attn = tiny.visual.transformer.resblocks[1].attn
    for name, value in (("dropout", 0.1), ("add_zero_attn", True), ("bias_k", nn.Parameter(torch.zeros(1, 1, 128)))):
        before = getattr(attn, name)
        setattr(attn, name, value)
        with pytest.raises(ck.UnsupportedTower, match="block 1: expected attention without bias_k, add_zero_attn"):
            ck.patch(tiny, ck.Dense())
        setattr(attn, name, before)
    attn.register_full_backward_hook(lambda *_: None)
    with pytest.raises(ck.UnsupportedTower, match="carries a hook"):
        ck.patch(tiny, ck.Dense())


def test_a_block_that_cannot_be_copied_is_patched_with_a_warning(tiny, images):
    import threading

    tiny.visual.transformer.resblocks[0].mlp.lock = threading.Lock()
    with pytest.warns(UserWarning, match="block 0 could not be verified: cannot pickle"):
        ck.patch(tiny, ck.EViT(0.5))
    assert tiny.encode_image(images).shape == (3, 128)


def test_a_block_whose_parts_do_not_run_is_refused_unchanged(tiny, images):
    class WithGain(nn.LayerNorm):
        def forward(self, x, gain):
            return super().forward(x) * gain

    class Block(type(tiny.visual.transformer.resblocks[0])):
        def forward(self, x, **_):
            x = x + self.attention(self.ln_1(x, 1.0))
            return x + self.mlp(self.ln_2(x))

    block = tiny.visual.transformer.resblocks[0]
    before = tiny.encode_image(images)
    block.__class__, block.ln_1.__class__ = Block, WithGain
    with pytest.raises(ck.UnsupportedTower, match=r"block 0: its own forward runs, its parts do not: .*'gain'"):
        ck.patch(tiny, ck.Dense())
    assert ck.method_of(tiny) is None
    torch.testing.assert_close(tiny.encode_image(images), before)


def test_a_backend_that_cannot_run_here_is_a_warning(tiny, monkeypatch):
    monkeypatch.setenv("CLIPKERNELS_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.warns(UserWarning, match="block 0 could not be verified: CLIPKERNELS_BACKEND=triton is set"):
        ck.patch(tiny, ck.Dense())


@pytest.mark.parametrize(
    ("steps", "learnt", "message"),
    [
        (
            (None, ck.Predict(9, 0), None, None, None, None),
            0,
            r"a plan with Predict steps needs .* 'predictor', got none",
        ),
        ((None,) * 6, 2, r"a plan with learnt tokens needs a method whose weights\(\) have 'learnt', got none"),
    ],
)
def test_a_plan_without_the_weights_it_needs_is_refused(tiny, steps, learnt, message):
    class Bare:
        def plan(self, tokens, blocks, prefix=1):
            return ck.Plan(steps[:blocks], tokens, prefix, learnt)

    with pytest.raises(ValueError, match=message):
        ck.patch(tiny, Bare())
    assert ck.method_of(tiny) is None


def test_a_hook_that_cannot_be_copied_does_not_stop_verification(tiny):
    import threading

    lock = threading.Lock()
    tiny.visual.transformer.resblocks[0].mlp.register_forward_hook(lambda *_, lock=lock: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ck.patch(tiny, ck.EViT(0.5))


def test_patching_under_autocast_verifies_in_full_precision(tiny):
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        ck.patch(tiny, ck.Dense())


def test_checkpointing_recomputes_every_block_in_the_backward(tiny, images):
    ck.patch(tiny.train(), ck.EViT(0.5))
    calls = []
    for block in tiny.visual.transformer.resblocks:
        block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    tiny.visual.set_grad_checkpointing(True)
    tiny.encode_image(images).sum().backward()
    assert len(calls) == 12


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_last_block_computes_the_cls_row_alone(tiny, images, method):
    ck.patch(tiny, method)
    rows = []
    tiny.visual.transformer.resblocks[5].mlp.register_forward_hook(lambda _, args, out: rows.append(out.shape[1]))
    tiny.encode_image(images)
    ck.encode_image(tiny, images)
    ck.encode_image(tiny, images, tokens=True)
    assert rows == [1, 1, method.plan(tokens=65, blocks=6).passes[-1][1]]


@torch.no_grad()
def test_output_tokens_can_be_enabled_after_patching(tiny, images):
    ck.patch(tiny, ck.ToMe(8))
    tiny.visual.output_tokens = True
    assert tiny.visual(images)[1].shape == (3, 64, 128)


@torch.no_grad()
def test_removing_blocks_after_patching_makes_a_new_plan(tiny, images):
    ck.patch(tiny, ck.ToMe(8))
    tiny.visual.prune_intermediate_layers([2])
    fresh = ck.bundled()[0]
    fresh.visual.prune_intermediate_layers([2])
    assert torch.equal(tiny.visual(images), ck.patch(fresh, ck.ToMe(8)).visual(images))


@torch.no_grad()
def test_a_patched_model_is_freed_without_the_garbage_collector(tiny):
    model = ck.patch(copy.deepcopy(tiny), ck.EViT(0.5))
    watch = weakref.ref(model.visual)
    gc.disable()
    try:
        del model
        assert watch() is None
    finally:
        gc.enable()


def test_a_subclass_of_torchs_attention_is_refused(tiny):
    class Wrapped(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    tiny.visual.transformer.resblocks[0].attn.__class__ = Wrapped
    with pytest.raises(
        ck.UnsupportedTower, match=r"block 0: expected torch's own nn\.MultiheadAttention, got the subclass"
    ):
        ck.patch(tiny, ck.Dense())
    tiny.visual.transformer.resblocks[0].attn = nn.Identity()
    with pytest.raises(ck.UnsupportedTower, match="expected attention with in_proj_weight"):
        ck.patch(tiny, ck.Dense())


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_tower_is_refused(tiny):
    class Model(nn.Module):
        pass

    model = Model()
    model.visual = torch.jit.trace(tiny.visual, torch.zeros(1, 3, 32, 32), check_trace=False)
    with pytest.raises(
        ck.UnsupportedTower,
        match=r"expected an image ViT of open_clip, .*, got TopLevelTracedModule",
    ):
        ck.patch(model, ck.Dense())
    tiny.visual.transformer.resblocks[1].mlp = torch.jit.script(nn.Linear(128, 128))
    with pytest.raises(ck.UnsupportedTower, match="expected modules in Python, got the ScriptModule"):
        ck.patch(tiny, ck.Dense())


def test_patching_keeps_the_mode_and_the_random_state(tiny):
    calls = []
    tiny.visual.transformer.resblocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    tiny.train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    ck.patch(tiny, ck.EViT(0.5))
    assert torch.equal(torch.rand(1), expected)
    assert calls == []
    assert all(module.training for module in tiny.modules())


def test_a_model_on_the_meta_device_is_patched_with_a_warning(tiny):
    with pytest.warns(UserWarning, match="meta device, its blocks could not be verified"):
        ck.patch(tiny.to("meta"), ck.EViT(0.5))
    assert tiny.encode_image(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 128)


def test_a_model_with_unloaded_weights_is_patched_with_a_warning(tiny):
    torch.nn.init.constant_(tiny.visual.transformer.resblocks[0].ln_1.weight, float("nan"))
    with pytest.warns(UserWarning, match="weights are not finite, its blocks could not be verified"):
        ck.patch(tiny, ck.EViT(0.5))


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (ck.EViT(0.5, blocks=(6,)), ValueError, r"blocks must be ints in \[0, 5\] on a tower of 6 blocks, got 6"),
        (ck.ToMe([1] * 7), ValueError, "at most one entry per block, 6 here, got 7"),
        (ck.EViT, TypeError, r"method must be a method such as ck.EViT\(keep=0.7\)"),
        (0.7, TypeError, "method must be a method such as"),
    ],
)
@torch.no_grad()
def test_a_method_that_does_not_fit_leaves_the_model_unchanged(tiny, images, method, error, message):
    before = tiny.encode_image(images)
    with pytest.raises(error, match=message):
        ck.patch(tiny, method)
    assert torch.equal(tiny.encode_image(images), before)
    ck.patch(tiny, ck.ToMe(4))
    with pytest.raises(error, match=message):
        ck.patch(tiny, method)
    assert ck.method_of(tiny) == ck.ToMe(4)


@pytest.mark.parametrize(("model", "error"), [(nn.Linear(2, 2), ck.UnsupportedTower), ("ViT-B-16", TypeError)])
def test_a_model_that_is_not_a_clip_is_refused(model, error):
    with pytest.raises(
        error,
        match=r"expected an image ViT of open_clip, .*, got Linear|model must be a torch\.nn\.Module",
    ):
        ck.patch(model, ck.EViT(0.5))


@torch.no_grad()
def test_a_mask_is_refused_rather_than_ignored(tiny):
    ck.patch(tiny, ck.Dense())
    with pytest.raises(ValueError, match=r"a patched tower takes no mask, got an attn_mask of shape \(65, 65\)"):
        tiny.visual.transformer(torch.zeros(1, 65, 128), attn_mask=torch.zeros(65, 65))


def test_patch_dropout_keeps_the_share_of_patches_in_training(tiny, images):
    from open_clip.transformer import PatchDropout

    tiny.visual.patch_dropout = PatchDropout(0.5)
    ck.patch(tiny.train(), ck.EViT(0.5))
    encoded = ck.encode_image(tiny, images, tokens=True)
    assert encoded.tokens.shape[1] == ck.EViT(0.5).plan(tokens=33, blocks=6).tokens[-1]


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_data_parallel_replicas_run_their_own_weights(tiny, images, method):
    ck.patch(tiny, method)
    expected = tiny.encode_image(images)
    owner = tiny.visual.transformer
    replica = owner._replicate_for_data_parallel()
    x = tiny.visual._embeds(images)
    replica.resblocks = copy.deepcopy(owner.resblocks)
    for parameter in owner.resblocks.parameters():
        parameter.add_(1)
    pooled = tiny.visual._pool(replica(x))[0] @ tiny.visual.proj
    assert torch.equal(pooled, expected)


NARROW = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "patch_size": 16, "image_size": 64}
OTHERS = {
    "transformers": lambda: transformers_tower("CLIPModel", **NARROW),
    "timm": lambda: timm_tower("vit_base_patch16_clip_224", embed_dim=64, num_heads=2, img_size=64),
    "timm.models.eva": lambda: timm_tower("eva02_base_patch16_clip_224", embed_dim=64, num_heads=2, img_size=64),
    "clip.model": lambda: openai_tower(2, 64, 16, 64, 32),
    "open_clip": lambda: ck.bundled()[0],
}


@pytest.mark.parametrize("library", OTHERS)
def test_a_patched_model_prints_its_method(library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    model = OTHERS[library]()
    before = repr(model)
    assert "clipkernels" not in before
    ck.patch(model, ck.EViT(0.5))
    assert repr(model).count("clipkernels: EViT(keep=0.5, ") == 1
    ck.patch(model, ck.Dense())
    assert repr(model).count("clipkernels: Dense()") == 1
    assert repr(ck.unpatch(model)) == before


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            ck.ToMe(100),
            "ToMe(r=100) asks to merge 600 tokens in 6 blocks and merges 63 of 65, at most half of the patches in a "
            "block: 9 is the most that every block can merge",
        ),
        (ck.EViT(0.999), "EViT(keep=0.999) removes none of 65 tokens: there are too few patches for this share"),
        (
            ck.EViT(0.5, multiple=128),
            "EViT(keep=0.5) leaves 34 tokens, no multiple of 128: there are too few patches to keep more",
        ),
    ],
)
def test_a_method_that_cannot_do_what_it_asks_for_is_a_warning(tiny, images, method, message):
    with pytest.warns(UserWarning, match=re.escape(message)) as record:
        ck.patch(tiny, method)
        tiny.encode_image(images)
        ck.encode_image(tiny, images)
    assert len(record) == 1 and record[0].filename == __file__
    assert ck.method_of(tiny) == method


@pytest.mark.parametrize("method", [*METHODS, ck.ToMe(9), ck.EViT(1.0), ck.TCA(0), ck.EViT(0.5, multiple=8)])
def test_a_method_that_does_what_it_asks_for_is_no_warning(tiny, method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ck.patch(tiny, method)


def test_a_warning_made_an_error_leaves_the_model_unchanged(tiny):
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="asks to merge"):
        warnings.simplefilter("error")
        ck.patch(tiny, ck.ToMe(100))
    assert ck.method_of(tiny) is None
