"""Every kind of pool of every library after merging: merging equal tokens leaves the result unchanged."""

import pytest
import torch

import clipkernels as ck
from clipkernels.marks import unmerge
from clipkernels.testing import open_clip_tower, openai_tower, randomized, timm_tower, transformers_tower
from clipkernels.tower import Reads, TowerInput, run

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "patch_size": 8, "image_size": 64}
NARROW = {"embed_dim": 64, "num_heads": 2, "img_size": 64, "num_classes": 24}
PLAIN = {"width": 64, "head_width": 32, "image_size": 64, "patch_size": 8}
TOWERS = {
    "open_clip CLS": lambda: open_clip_tower("ViT-B-32", 3, **PLAIN),
    "open_clip average": lambda: open_clip_tower("ViT-L-14-CLIPA", 3, **PLAIN),
    "open_clip queries": lambda: open_clip_tower("coca_ViT-B-32", 3, **PLAIN),
    "transformers CLS": lambda: transformers_tower("CLIPModel", 3, **SIZES),
    "transformers query": lambda: transformers_tower("SiglipModel", 3, **SIZES),
    "timm CLS": lambda: timm_tower("vit_base_patch16_clip_224", 3, **NARROW),
    "timm query": lambda: timm_tower("vit_base_patch16_siglip_224", 3, **NARROW),
    "timm average, registers": lambda: timm_tower("vit_base_patch16_reg4_gap_256", 3, **NARROW),
    "timm CLS, registers": lambda: timm_tower("vit_base_patch14_reg4_dinov2", 3, **{**NARROW, "img_size": 56}),
    "timm rotary, CLS": lambda: timm_tower("eva02_base_patch16_clip_224", 3, **NARROW),
    "timm rotary, query": lambda: timm_tower("vit_pe_core_base_patch16_224", 3, **NARROW),
    "timm post-norm": lambda: timm_tower("eva02_enormous_patch14_clip_224", 3, **{**NARROW, "img_size": 56}),
    "clip CLS": lambda: openai_tower(3, 64, 8, 64, 32),
}
PAIRS = 3


@pytest.fixture(params=TOWERS)
def tower(request):
    pytest.importorskip(request.param.split()[0], reason="the library is not installed")
    return ck.tower_of(randomized(TOWERS[request.param]()))


def twins(tower):
    """Tokens (2,N,C) with PAIRS pairs of equal neighbours at equal positions, and their rotary table or None."""
    x, rope = tower.embed(torch.randn(2, 3, *tower.image_size))
    x = x * 3 + torch.randn_like(x)
    rope = None if rope is None else rope.clone()
    first = tower.prefix + tower.prefix % 2
    for even in range(first, first + 2 * PAIRS, 2):
        x[:, even] = x[:, even + 1]
        if rope is not None:
            rope[..., even - tower.prefix, :] = rope[..., even + 1 - tower.prefix, :]
    return x, rope


@torch.no_grad()
def test_merging_equal_tokens_changes_nothing(tower):
    x, rope = twins(tower)
    dense = run(tower, TowerInput(x, rope), ck.Dense().plan(tower.num_tokens, 3, tower.prefix)).x
    plan = ck.ToMe([PAIRS]).plan(tower.num_tokens, 3, tower.prefix)
    output = run(tower, TowerInput(x, rope), plan, Reads(track=True))
    assert output.x.shape[1] == tower.num_tokens - PAIRS
    restored = unmerge(output.x, output.sources, tower.prefix)
    torch.testing.assert_close(restored, dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tower.pool(restored), tower.pool(dense), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_merging_without_sizes_changes_the_tokens(tower):
    """Without proportional attention the result differs, so the test above can fail."""
    x, rope = twins(tower)
    dense = run(tower, TowerInput(x, rope), ck.Dense().plan(tower.num_tokens, 3, tower.prefix)).x
    plan = ck.ToMe([PAIRS], proportional=False).plan(tower.num_tokens, 3, tower.prefix)
    output = run(tower, TowerInput(x, rope), plan, Reads(track=True))
    assert not torch.allclose(unmerge(output.x, output.sources, tower.prefix), dense, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_prefix_stays_in_front_and_holds_no_patches(tower):
    x, rope = twins(tower)
    for method in (ck.EViT(0.3), ck.ToMe(8)):
        plan = method.plan(tower.num_tokens, 3, tower.prefix)
        output = run(tower, TowerInput(x, rope), plan.ranked_by("received"), Reads(track=True))
        assert output.x.shape[1] == plan.tokens[-1]
        for source in output.sources:
            assert ((source < 0) | (source >= tower.prefix)).all()
