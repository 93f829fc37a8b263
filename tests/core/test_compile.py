"""Whole towers of every library under torch.compile and torch.export: no graph break, no recompilation per batch."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import clipkernels as ck
from clipkernels.testing import (
    open_clip_tower,
    openai_tower,
    patch_ranking,
    patched_with,
    randomized,
    timm_tower,
    transformers_tower,
)

METHODS = [ck.Dense(), ck.EViT(0.5), ck.ToMe(8), ck.TCA(0.1), partial(patch_ranking, learnt=2)]
SMALL = {"embed_dim": 64, "num_heads": 2, "img_size": 64, "num_classes": 24}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "patch_size": 8, "image_size": 64}
pytestmark = pytest.mark.filterwarnings("ignore:.*lru_cache.*")


def _need(module):
    """The module, or skip the test if it is not installed."""
    return pytest.importorskip(module, reason=f"{module} is not installed")


def _open_clip():
    return open_clip_tower("ViT-B-32", 3, width=64, head_width=32, image_size=64, patch_size=8)


def _transformers(family):
    _need("transformers")
    if torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 cannot trace the host's own forward in transformers 5")
    return transformers_tower(family, 3, **SIZES)


def _timm(name):
    _need("timm")
    return timm_tower(name, 3, **SMALL)


def _openai():
    _need("clip.model")
    return openai_tower(3, 64, 8, 64, 32)


TOWERS = {
    "open_clip": _open_clip,
    "transformers CLIP": lambda: _transformers("CLIPModel"),
    "transformers SigLIP": lambda: _transformers("SiglipModel"),
    "timm CLIP": lambda: _timm("vit_base_patch16_clip_224"),
    "timm SigLIP": lambda: _timm("vit_base_patch16_siglip_224"),
    "timm EVA02": lambda: _timm("eva02_base_patch16_clip_224"),
    "OpenAI": _openai,
}


def build(name, method, sizes=(1, 2, 3, 5)):
    """The adapter of a patched tower, and batches of images of these sizes."""
    torch._dynamo.reset()
    model = patched_with(randomized(TOWERS[name]()), method)
    generator = torch.Generator().manual_seed(0)
    return ck.tower_of(model), [torch.randn(n, 3, 64, 64, generator=generator) for n in sizes]


def _pairs():
    """Pairs of tower and method. One method per library is quick, with CLS and without; the others are slow."""
    without_cls = "timm SigLIP"
    for name in TOWERS:
        for method in METHODS:
            plain = name in ("open_clip", "transformers CLIP", "OpenAI") and isinstance(method, ck.EViT)
            quick = plain or (name == without_cls and isinstance(method, ck.ToMe))
            yield pytest.param(name, method, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize(("name", "method"), list(_pairs()))
@torch.no_grad()
def test_one_graph_serves_every_batch(name, method):
    tower, batches = build(name, method)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(tower.encode, fullgraph=True, backend=counter)  # a graph break is an error
    for batch in batches:
        torch.testing.assert_close(compiled(batch), tower.encode(batch), rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 3  # batch 1, batch 2, any batch


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_dynamic_batch_is_compiled_once(name, method):
    # Start with 7: torch identifies a batch size that equals another size (3 channels, 2 heads) with it.
    tower, batches = build(name, method, (7, 4, 5))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(tower.encode, fullgraph=True, dynamic=True, backend=counter)
    for batch in batches:
        torch.testing.assert_close(compiled(batch), tower.encode(batch), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    assert torch._dynamo.explain(tower.encode)(batches[1]).graph_break_count == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_inductor_gives_the_eager_embedding_in_every_mode(name, mode):
    for method in METHODS:
        tower, batches = build(name, method)
        compiled = torch.compile(tower.encode, fullgraph=True, mode=mode)
        torch.testing.assert_close(compiled(batches[2]), tower.encode(batches[2]), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_compiled_tower_reads_new_weights():
    tower, batches = build("transformers CLIP", ck.EViT(0.5))
    compiled = torch.compile(tower.encode, fullgraph=True, backend="eager")
    before = compiled(batches[1])
    for parameter in tower.root.parameters():
        parameter.data = parameter.data * 1.1  # a new storage: the weights are no longer packed
    after = compiled(batches[1])
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, tower.encode(batches[1]), rtol=1e-4, atol=1e-4)
