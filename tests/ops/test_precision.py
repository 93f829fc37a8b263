"""Half precision: no further from fp32 than the host's own forward, and finite where half sums would overflow."""

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


def drift(came, exact):
    return 1 - torch.cosine_similarity(came.double(), exact, dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_dense_is_no_further_from_fp32_than_the_host(name, dtype):
    model, tower, images = build(name)
    exact = tower.encode(images).double()
    model.to(dtype)
    if name == "clip":  # the package keeps its norms in fp32
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.float()
    host = drift(tower.encode(images.to(dtype)), exact)
    ck.patch(model, ck.Dense())
    came = drift(tower.encode(images.to(dtype)), exact)
    assert host.max() < 0.01
    assert came.mean() <= 1.5 * host.mean()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "method", [ck.EViT(0.5), ck.ToMe(8), ck.TCA(0.1), patch_ranking(ck.bundled()[0], learnt=2)], ids=str
)
@torch.no_grad()
def test_a_reduced_tower_keeps_its_direction_in_half_precision(method, dtype):
    """The bundled weights, whose attention is trained: near ties may fall otherwise, the embedding must not."""
    model = ck.patch(ck.bundled()[0], method)
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = model.encode_image(images).double()
    came = model.to(dtype).encode_image(images.to(dtype))
    assert drift(came, exact).mean() < 0.01 and came.isfinite().all()


@torch.no_grad()
def test_attention_in_fp16_does_not_overflow():
    q = torch.full((1, 2, 9, 64), 200.0, dtype=torch.float16)
    v = torch.randn(1, 2, 9, 64, dtype=torch.float16)
    out, scores = ck.ops.attention(q, q * 200, v, signal="cls")
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(scores, torch.full_like(scores, 1 / 9))


@torch.no_grad()
def test_a_fused_token_is_summed_in_fp32():
    x = torch.full((1, 4098, 8), 4.0, dtype=torch.float16)
    fused = ck.ops.prune_tokens(x, torch.ones(1, 4097), 1, fuse=True).tokens[:, -1]
    # In fp16 a running sum stops growing at 8192, where 4 is half of a unit.
    assert torch.equal(fused, torch.full_like(fused, 4096 * 4.0))
