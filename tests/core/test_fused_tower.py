"""Whole towers on the Triton backend, compared with the same tower on the reference."""

from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("open_clip", reason="open_clip is not installed, which defines the towers")

import clipkernels as ck
from clipkernels.ops import unchecked
from clipkernels.testing import (
    method_id,
    open_clip_tower,
    openai_tower,
    patch_ranking,
    patched_with,
    randomized,
    timm_tower,
    transformers_tower,
)

RANDOM = ck.EViT(0.5, fuse=False, score="random")
LEARNT = partial(patch_ranking, learnt=2)
METHODS = [ck.Dense(), ck.EViT(0.5), RANDOM, ck.ToMe(3), ck.ToMe(2, proportional=False), ck.TCA(0.1), LEARNT]
SMALL = {"width": 128, "image_size": 64, "patch_size": 16}


def tower(name="ViT-B-32", **vision):
    torch.manual_seed(0)
    return open_clip_tower(name, 3, **{**SMALL, **vision})


def images(device, batch=2):
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.fixture
def on(monkeypatch, triton):
    """A function that sets the backend for the rest of the test."""
    return lambda name: monkeypatch.setenv("CLIPKERNELS_BACKEND", name)


TOWERS = [
    ("ViT-B-32", {}),
    ("ViT-B-32-quickgelu", {}),
    ("ViT-M-16-alt", {"ls_init_value": 0.5}),
    ("ViT-L-14-CLIPA", {}),
]


def _pairs():
    """Every method on every tower. The quick set is all methods on one tower and one method on the others."""
    for name, vision in TOWERS:
        for method in METHODS:
            quick = name == "ViT-B-32" or method == ck.EViT(0.5)
            yield pytest.param(
                name, vision, method, marks=[] if quick else [pytest.mark.slow], id=f"{name}-{method_id(method)}"
            )


@pytest.mark.parametrize(("name", "vision", "method"), list(_pairs()))
@torch.no_grad()
def test_kernels_give_the_embedding_of_the_reference(device, on, name, vision, method):
    model = patched_with(tower(name, **vision), method).to(device)
    on("reference")
    expected = model.encode_image(images(device))
    on("triton")
    torch.testing.assert_close(model.encode_image(images(device)), expected, atol=2e-5, rtol=1e-4)
    encoded = ck.encode_image(model, images(device), tokens=True, source=True)
    torch.testing.assert_close(encoded.embedding, expected, atol=2e-5, rtol=1e-4)


SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "patch_size": 16, "image_size": 64}
NARROW = {"embed_dim": 128, "num_heads": 2, "img_size": 64, "num_classes": 24}
# Towers, by the modules in their epilogues.
OTHERS = {
    "transformers CLIPModel": "three packed projections, QuickGELU of transformers",
    "transformers SiglipModel": "no CLS, tanh GELU of transformers",
    "timm vit_base_patch16_siglip_224": "no CLS",
    "timm vit_base_patch16_reg4_gap_256": "registers, LayerScale",
    "timm eva02_base_patch16_clip_224": "rotary, SwiGLU, nothing to fuse after the MLP",
    "openai": "norms in fp32, sequence-first",
}


@pytest.mark.parametrize(
    "method", [pytest.param(ck.Dense(), marks=pytest.mark.slow), ck.EViT(0.5), ck.ToMe(3)], ids=str
)
@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_towers_of_other_libraries_give_the_embedding_of_the_reference(device, on, name, method):
    library, _, kind = name.partition(" ")
    pytest.importorskip("clip" if library == "openai" else library, reason=f"{library} is not installed")
    if library == "openai":
        model = openai_tower(2, 64, 16, 128, 24)
    else:
        model = transformers_tower(kind, **SIZES) if library == "transformers" else timm_tower(kind, **NARROW)
    adapter = ck.tower_of(ck.patch(randomized(model), method).to(device))
    on("reference")
    expected = adapter.encode(images(device))
    on("triton")
    torch.testing.assert_close(adapter.encode(images(device)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_with_wide_norms_stays_near_fp32(device, on, dtype):
    from open_clip.transformer import LayerNormFp32

    model = tower().to(device)
    on("reference")
    exact = model.encode_image(images(device))
    for module in model.visual.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = LayerNormFp32
        elif isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
            module.to(dtype)
    model.visual.proj.data = model.visual.proj.data.to(dtype)
    ck.patch(model, ck.Dense())
    plain = model.encode_image(images(device).to(dtype)).float()
    on("triton")
    fused = model.encode_image(images(device).to(dtype)).float()
    cosine = nn.functional.cosine_similarity
    assert cosine(fused, exact).min() > 0.999
    assert (fused - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.parametrize("method", [ck.Dense(), ck.EViT(0.5), ck.ToMe(3)], ids=str)
def test_gradients_are_those_of_the_reference(device, on, method):
    model = ck.patch(tower("ViT-B-32-quickgelu"), method).to(device)
    weights = dict(model.visual.named_parameters())
    gradients = []
    for backend in ("reference", "triton"):
        on(backend)
        loss = model.encode_image(images(device)).square().sum()
        gradients.append(torch.autograd.grad(loss, list(weights.values())))
    for reference, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, reference, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_a_block_has_three_launches_beside_attention(device, on, monkeypatch):
    model = ck.patch(tower("ViT-B-32-quickgelu"), ck.Dense()).to(device)
    called, normed = [], []
    for name in ("add_norm", "bias_act", "attention"):
        run = getattr(unchecked, name)
        monkeypatch.setattr(unchecked, name, lambda *a, name=name, run=run: called.append(name) or run(*a))
    monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda *a: normed.append(1) or torch.layer_norm(*a))
    on("triton")
    model.encode_image(images(device))
    assert called == ["attention", "add_norm", "bias_act", "add_norm"] * 3
    assert len(normed) == 3  # before the blocks, in the first block and after the last: the norms that follow no sum


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("ln_1", "mlp", "mlp.c_proj")]


@pytest.mark.parametrize("name", ["ln_2", "mlp.gelu", "ls_2", *SLOW])
@torch.no_grad()
def test_a_hook_on_a_fused_module_fires_and_changes_nothing(device, on, name):
    model = ck.patch(tower(ls_init_value=0.5), ck.EViT(0.5)).to(device)
    on("triton")
    expected = model.encode_image(images(device))
    calls = []
    for block in model.visual.transformer.resblocks:
        block.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model.encode_image(images(device)), expected, atol=1e-5, rtol=1e-4)
    assert len(calls) == 3


@torch.no_grad()
def test_a_hook_on_every_module_fires(device, on):
    model = ck.patch(tower(), ck.Dense()).to(device)
    on("triton")
    modules = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: modules.add(id(module)))
    try:
        model.encode_image(images(device))
    finally:
        handle.remove()
    block = model.visual.transformer.resblocks[1]
    assert {id(module) for module in (block.ln_1, block.ln_2, block.mlp, *block.mlp)} <= modules


@torch.no_grad()
def test_a_projection_of_a_subclass_is_called(device, on):
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = tower().to(device)
    block = model.visual.transformer.resblocks[1]
    block.mlp.c_proj.__class__ = Adapted
    expected = model.encode_image(images(device))
    ck.patch(model, ck.Dense())
    on("triton")
    torch.testing.assert_close(model.encode_image(images(device)), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_compiled_tower_leaves_sums_and_norms_to_the_compiler(device, monkeypatch):
    pytest.importorskip("triton")
    model = ck.patch(tower(), ck.EViT(0.5)).to(device)
    expected = model.encode_image(images(device))
    monkeypatch.setenv("CLIPKERNELS_BACKEND", "triton")
    targets = set()

    def record(graph, _):
        targets.update(str(node.target) for node in graph.graph.nodes)
        return graph

    actual = torch.compile(model.encode_image, fullgraph=True, backend=record)(images(device))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
    operators = {target.split(".")[1] for target in targets if target.startswith("clipkernels.")}
    assert operators == {"attention", "prune_tokens"}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("vision", [{}, {"ls_init_value": 0.5}], ids=["plain", "layer scale"])
@torch.no_grad()
def test_autocast_leaves_the_norms_to_the_host(device, on, vision, backend):
    model = ck.patch(tower(**vision), ck.EViT(0.5)).to(device)
    expected = model.encode_image(images(device))
    tokens = model.visual._embeds(images(device))
    on(backend)
    with torch.autocast(device.type, torch.bfloat16):
        actual = model.encode_image(images(device)).float()
        assert model.visual.transformer(tokens).isfinite().all()  # fp32 tokens meet narrower branches
    assert nn.functional.cosine_similarity(actual, expected).min() > 0.99
