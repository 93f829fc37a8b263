"""Gradients of reduced towers of every library in fp64, compared with central differences along random directions."""

import pytest
import torch
from torch import nn

import clipkernels as ck
from clipkernels.testing import open_clip_tower, openai_tower, randomized, timm_tower, transformers_tower

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "patch_size": 8, "image_size": 64}
NARROW = {"embed_dim": 64, "num_heads": 2, "img_size": 64, "num_classes": 24, "patch_size": 8}
TOWERS = {
    "open_clip": lambda: open_clip_tower("ViT-B-32", 4, width=64, head_width=32, image_size=64, patch_size=8),
    "transformers CLIP": lambda: transformers_tower("CLIPModel", 4, **SIZES),
    "transformers SigLIP": lambda: transformers_tower("SiglipModel", 4, **SIZES),
    "timm": lambda: timm_tower("vit_base_patch16_clip_224", 4, **NARROW),
    "timm SigLIP": lambda: timm_tower("vit_base_patch16_siglip_224", 4, **NARROW),
    "timm EVA02": lambda: timm_tower("eva02_base_patch16_clip_224", 4, **NARROW),
    "clip": lambda: openai_tower(4, 64, 8, 64, 32),
}
METHODS = [ck.EViT(0.7), ck.TCA(0.1), ck.TCA(0.1, score="attention"), ck.ToMe(4)]
STEP = 1e-6


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", TOWERS)
def test_gradients_are_those_of_the_forward(monkeypatch, name, method):
    library = name.split()[0]
    pytest.importorskip(library, reason=f"{library} is not installed")
    if library == "clip":  # its norms compute in fp32
        monkeypatch.setattr("clip.model.LayerNorm.forward", nn.LayerNorm.forward)
    model = ck.patch(randomized(TOWERS[name]()).double(), method)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)
    weights = list(ck.tower_of(model).root.parameters())
    direction = [torch.randn(w.shape, generator=generator).double() * w.detach().abs().mean() for w in weights]
    output_weight = None

    def run():
        nonlocal output_weight
        encoded = ck.encode_image(model, images, source=True)
        if output_weight is None:
            output_weight = torch.randn(encoded.embedding.shape, generator=generator).double()
        return (encoded.embedding * output_weight).sum(), encoded.source

    value, source = run()
    gradients = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
    analytic = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item()
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            for weight, change in zip(weights, direction, strict=True):
                weight.add_(change, alpha=sign * STEP)
            value, moved = run()
            assert torch.equal(moved, source)
            values.append(value.item())
            for weight, change in zip(weights, direction, strict=True):
                weight.sub_(change, alpha=sign * STEP)
    difference = (values[0] - values[1]) / (2 * STEP)
    assert abs(analytic - difference) <= 1e-5 * max(abs(difference), 1e-3)
