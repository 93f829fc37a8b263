"""Half precision: as close to fp32 as the host's own forward, and finite where half-precision sums would overflow."""

import pytest
import torch

import clipkernels as ck
from clipkernels.testing import open_clip_tower, openai_tower, patch_ranking, randomized, timm_tower, transformers_tower

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "patch_size": 8, "image_size": 64}
NARROW = {"embed_dim": 64, "num_heads": 2, "img_size": 64, "num_classes": 24}
TOWERS = {
    "open_clip": lambda: open_clip_tower("ViT-B-32", 4, width=64, head_width=32, image_size=64, patch_size=8),
    "transformers": lambda: transformers_tower("CLIPModel", 4, **SIZES),
    "timm": lambda: timm_tower("vit_base_patch16_siglip_224", 4, **NARROW),
    "timm rotary": lambda: timm_tower("eva02_base_patch16_clip_224", 4, **NARROW),
    "clip": lambda: openai_tower(4, 64, 8, 64, 32),
}
DTYPES = [torch.float16, torch.bfloat16]


def build(name):
    library = name.split()[0]
    pytest.importorskip(library, reason=f"{library} is not installed")
    model = randomized(TOWERS[name]())
    return model, ck.tower_of(model), torch.randn(16, 3, 64, 64)


def drift(actual, exact):
    return 1 - torch.cosine_similarity(actual.double(), exact, dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_dense_is_as_close_to_fp32_as_the_host(name, dtype):
    model, tower, images = build(name)
    exact = tower.encode(images).double()
    model.to(dtype)
    if name == "clip":  # the clip package keeps its norms in fp32
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.float()
    host = drift(tower.encode(images.to(dtype)), exact)
    ck.patch(model, ck.Dense())
    actual = drift(tower.encode(images.to(dtype)), exact)
    assert host.max() < 0.01
    assert actual.mean() <= 1.5 * host.mean()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "method", [ck.EViT(0.5), ck.ToMe(8), ck.TCA(0.1), patch_ranking(ck.bundled()[0], learnt=2)], ids=str
)
@torch.no_grad()
def test_a_reduced_tower_keeps_its_direction_in_half_precision(method, dtype):
    # Bundled weights have trained attention. Near ties may be decided differently; the embedding must stay.
    model = ck.patch(ck.bundled()[0], method)
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = model.encode_image(images).double()
    actual = model.to(dtype).encode_image(images.to(dtype))
    assert drift(actual, exact).mean() < 0.01 and actual.isfinite().all()


@torch.no_grad()
def test_fp16_attention_does_not_overflow():
    q = torch.full((1, 2, 9, 64), 200.0, dtype=torch.float16)
    v = torch.randn(1, 2, 9, 64, dtype=torch.float16)
    out, scores = ck.ops.attention(q, q * 200, v, signal="cls")
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(scores, torch.full_like(scores, 1 / 9))


@torch.no_grad()
def test_fused_tokens_are_summed_in_fp32():
    x = torch.full((1, 4098, 8), 4.0, dtype=torch.float16)
    fused = ck.ops.prune_tokens(x, torch.ones(1, 4097), 1, fuse=True).tokens[:, -1]
    # A running sum in fp16 would stop at 8192, where adding 4, half the spacing of numbers, rounds to nothing.
    assert torch.equal(fused, torch.full_like(fused, 4096 * 4.0))
