"""TCA in a tower: plan, condensation and anchors compared with a literal implementation, on towers of every kind."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import layer_norm

import clipkernels as ck
from bench.naive.tca import run_tower
from clipkernels.testing import open_clip_tower, randomized, timm_tower

# Tower: tokens, blocks, width, patch, embedding.
B16, L14 = (197, 12, 768, 16, 512), (257, 24, 1024, 14, 768)


@pytest.mark.parametrize(
    ("tower", "rate", "centers", "counts", "steps", "gmacs", "cut"),
    [
        (B16, 0.035, 2, [180, 163, 149], [(176, 14), (159, 14), (145, 12)], 15.45, 12.1),
        (B16, 0.1, 2, [141, 100, 74], [(137, 40), (96, 30), (70, 20)], 11.68, 33.5),
        (B16, 0.035, 4, [182, 167, 155], None, 15.71, 10.6),
        (B16, 0.1, 4, [143, 104, 77], None, 11.88, 32.5),
        (L14, 0.035, 2, [234, 211, 191], None, 65.23, 19.5),
        (L14, 0.1, 2, [183, 130, 95], None, 41.43, 48.9),
    ],
)
def test_plans_are_those_of_the_published_tables(tower, rate, centers, counts, steps, gmacs, cut):
    tokens, blocks, *geometry = tower
    plan = ck.TCA(rate, centers=centers).plan(tokens, blocks)
    assert [plan.tokens[block + 1] for block in (3, 6, 9)] == counts
    assert plan.tokens[0] == tokens and plan.tokens[-1] == counts[-1]
    actual = [(step.keep, step.merge) for step in plan.steps if step]
    assert actual == steps or (steps is None and len(actual) == 3)
    assert plan.gmacs(*geometry) == pytest.approx(gmacs, abs=0.005)
    dense = ck.Dense().plan(tokens, blocks).gmacs(*geometry)
    assert 100 * (1 - plan.gmacs(*geometry) / dense) == pytest.approx(cut, abs=0.06)


@pytest.mark.parametrize(
    ("tokens", "low", "high"), [(50, 0.023, 0.272), (197, 0.006, 0.301), (257, 0.004, 0.304), (577, 0.002, 0.285)]
)
def test_a_rate_that_does_not_fit_is_refused_with_the_valid_rates(tokens, low, high):
    message = rf"block \d cannot condense \d+ patches at rate .* into 2 centers: valid rates are {low:g} to {high:g}"
    for rate in (low, high):
        assert ck.TCA(rate).plan(tokens, 12).tokens[-1] < tokens
    for rate in (low - 0.001, high + 0.001):
        with pytest.raises(ValueError, match=message):
            ck.TCA(rate).plan(tokens, 12)


def test_a_tower_too_small_for_any_rate_is_refused():
    with pytest.raises(ValueError, match=r"block 3 cannot condense 4 patches at rate 0.1 into 2 centers: no rate is"):
        ck.TCA(0.1).plan(5, 12)


def test_a_rate_of_zero_is_dense_and_blocks_are_checked():
    assert ck.TCA(0).plan(197, 12) == ck.Dense().plan(197, 12)
    plan = ck.TCA(0.1, blocks=(5, 2)).plan(197, 12)
    assert [block for block, step in enumerate(plan.steps) if step] == [2, 5]
    for rate in (0, 0.1):
        with pytest.raises(ValueError, match=r"blocks must be ints in \[0, 11\]"):
            ck.TCA(rate, blocks=(12,)).plan(197, 12)


def test_a_seed_chooses_the_first_centre_of_each_block():
    first = [step.first for step in ck.TCA(0.1, seed=1).plan(197, 12).steps if step]
    repeated = [step.first for step in ck.TCA(0.1, seed=1).plan(197, 12).steps if step]
    assert first == repeated and len(set(first)) > 1
    assert [step.first for step in ck.TCA(0.1, seed=2).plan(197, 12).steps if step] != first
    assert [step.first for step in ck.TCA(0.1).plan(197, 12).steps if step] == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 1}, r"rate must be a number in \[0, 1\), got 1"),
        ({"rate": -0.1}, "got -0.1"),
        ({"rate": True}, "got True"),
        ({"centers": 0}, "centers must be an int of at least 1, got 0"),
        ({"score": "cls"}, 'score must be "rank" or "attention", got \'cls\''),
        ({"seed": -1}, "seed must be an int of at least 0, got -1"),
        ({"blocks": 3}, r"blocks must be a tuple of ints such as \(3, 6, 9\), got 3"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ck.TCA(**{"rate": 0.1, **arguments})


def run_literally(visual, images, method, anchors=()):
    """The last tokens, and the CLS token after every block, computed image by image."""
    results = [run_tower(visual, image, method, anchors) for image in images.split(1)]
    return (torch.stack(parts) for parts in zip(*results, strict=True))


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("centers", [2, 4])
@pytest.mark.parametrize("rate", [0.035, 0.1])
@pytest.mark.parametrize("score", ["rank", "attention"])
@torch.no_grad()
def test_a_tower_condenses_as_the_paper_says(tiny, images, score, rate, centers, anchored):
    model, images = tiny.double(), images.double()
    method = ck.TCA(rate, centers=centers, score=score)
    anchors = torch.randn(3, 6, 128, generator=torch.Generator().manual_seed(1)).double() if anchored else None
    tokens, path = run_literally(model.visual, images, method, [] if anchors is None else list(anchors))
    ck.patch(model, method)
    actual = ck.encode_image(model, images, tokens=True, cls_path=True, anchors=anchors)
    expected = model.visual.ln_post(tokens) @ model.visual.proj
    torch.testing.assert_close(actual.tokens, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(actual.cls_path, path, atol=1e-9, rtol=1e-9)
    if not anchored:
        torch.testing.assert_close(model.encode_image(images), actual.embedding, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_anchors_change_the_embedding_and_rows_of_zeros_do_not(tiny, images):
    ck.patch(tiny, ck.TCA(0.1))
    anchors = torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(1))
    plain = ck.encode_image(tiny, images).embedding
    with_one = ck.encode_image(tiny, images, anchors=anchors[:1]).embedding
    assert not torch.allclose(plain, with_one, atol=1e-4)
    padded = torch.cat([torch.zeros(1, 6, 128), anchors[:1], torch.zeros(2, 6, 128)])
    assert torch.equal(ck.encode_image(tiny, images, anchors=padded).embedding, with_one)
    # Each image chooses its own anchor, so a batch gives the same as its images one by one.
    both = ck.encode_image(tiny, images, anchors=anchors).embedding
    alone = torch.cat([ck.encode_image(tiny, image[None], anchors=anchors).embedding for image in images])
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_anchors_count_only_where_a_method_condenses(tiny, images):
    anchors = torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(1))
    for method in (ck.Dense(), ck.EViT(0.5), ck.TCA(0.1, blocks=(0,))):
        ck.patch(tiny, method)
        assert torch.equal(
            ck.encode_image(tiny, images, anchors=anchors).embedding, ck.encode_image(tiny, images).embedding
        )
    # The last block computes only CLS, and its anchor still counts.
    ck.patch(tiny, ck.TCA(0.1, blocks=(5,)))
    alone = ck.encode_image(tiny, images, anchors=anchors).embedding
    whole = ck.encode_image(tiny, images, anchors=anchors, tokens=True).embedding
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(alone, ck.encode_image(tiny, images).embedding, atol=1e-4)


@torch.no_grad()
def test_one_graph_serves_every_table_of_anchors():
    torch._dynamo.reset()
    tower = randomized(open_clip_tower("ViT-B-32", 3, width=64, image_size=32, patch_size=4))
    model = ck.patch(tower, ck.TCA(0.1))
    counter = CompileCounterWithBackend("eager")

    def encode(images, anchors):
        return ck.encode_image(model, images, cls_path=True, anchors=anchors)

    compiled = torch.compile(encode, fullgraph=True, backend=counter)
    generator = torch.Generator().manual_seed(1)
    for batch in (2, 3, 5):
        images, anchors = (torch.randn(*size, generator=generator) for size in ((batch, 3, 32, 32), (4, 3, 64)))
        actual, expected = compiled(images, anchors), encode(images, anchors)
        torch.testing.assert_close(actual.embedding, expected.embedding)
        torch.testing.assert_close(actual.cls_path, expected.cls_path)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("shape", [(6, 128), (2, 5, 128), (2, 6, 127), (0, 6, 128)])
def test_anchors_of_another_tower_are_refused(tiny, images, shape):
    ck.patch(tiny, ck.TCA(0.1))
    with pytest.raises(ValueError, match=r"anchors must be \(A,6,128\) with A ≥ 1, got"):
        ck.encode_image(tiny, images, anchors=torch.zeros(shape))


@torch.no_grad()
def test_anchors_need_a_cls_token():
    model = randomized(open_clip_tower("ViT-B-16-SigLIP"))
    with pytest.raises(ck.UnsupportedTower, match="expected a tower with a CLS token for cls_path and anchors"):
        ck.encode_image(model, torch.zeros(1, 3, 224, 224), anchors=torch.zeros(1, 2, 768))


@torch.no_grad()
def test_condensing_after_merging_keeps_sizes(tiny, images):
    class Both:
        def plan(self, tokens, blocks, prefix=1):
            merge, condense = ck.Merge(10), ck.Condense(keep=30, merge=10, centers=2)
            return ck.Plan((merge, condense, *[None] * (blocks - 2)), tokens, prefix)

    from clipkernels.tower import Reads, TowerInput, run

    ck.patch(tiny, Both())
    tower = ck.tower_of(tiny)
    plan = Both().plan(65, 6)
    sizes_by_block = []
    original = ck.ops.attention

    def spy(q, k, v, size, *rest):
        sizes_by_block.append(size)
        return original(q, k, v, size, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ck.ops, "attention", spy)
        output = run(tower, TowerInput(tower.embed(images)[0]), plan, Reads(track=True))
    sizes, source = sizes_by_block[2], output.sources[-1]
    assert sizes.shape == (3, 34) and torch.equal(sizes[:, -1], torch.ones(3))
    for image in range(3):
        members = torch.bincount(source[image], minlength=34)
        assert torch.equal(sizes[image, 1:-1], members[1:-1].float())


@pytest.mark.parametrize("name", ["eva02_base_patch16_clip_224", "vit_small_patch16_dinov3"])
@torch.no_grad()
def test_rotary_embeddings_follow_kept_patches_and_centres(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    try:
        model = randomized(timm_tower(name, 3, embed_dim=64, num_heads=2, img_size=64, num_classes=24))
    except RuntimeError as error:
        pytest.skip(f"timm {timm.__version__}: {error}")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    method = ck.TCA(0.1, blocks=(0,))
    tower = ck.tower_of(model)
    with ck.patched(model, method):
        actual = ck.encode_image(model, images, tokens=True, source=True)
    step, prefix = method.plan(tower.num_tokens, 3, tower.prefix).steps[0], tower.prefix
    x, rope = tower.embed(images)
    # The first block by hand, with the patch of each token from the op itself.
    parts = tower.parts(model.blocks[0])
    q, k, v = parts.qkv(x, None, None, rope)
    out, scores = ck.ops.attention(q, k, v, None, "cls" if tower.pools_cls else "received", prefix)
    branch = parts.project(out, False)
    x = x + branch.y * (1 if branch.scale is None else branch.scale)
    condensed = ck.ops.condense_tokens(x, scores, step.keep, step.merge, step.centers, scores, "rank", prefix)
    assert torch.equal(condensed.source, actual.source[:, 0].long())
    for image in range(2):
        tokens = condensed.tokens[image : image + 1]
        y = parts.mlp(tokens, None, False)
        tokens = tokens + y.y * (1 if y.scale is None else y.scale)
        table = rope[..., condensed.index[image], :]
        width = table.shape[-1] // 2
        still = torch.cat([torch.zeros_like(table[..., :1, :width]), torch.ones_like(table[..., :1, :width])], -1)
        for later in model.blocks[1:]:
            tokens = later(tokens, rope=torch.cat([table, still], -2))
        expected = tower.project(tokens)
        torch.testing.assert_close(actual.tokens[image : image + 1], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_average_pool_reads_every_patch_from_the_row_that_holds_it():
    model = randomized(open_clip_tower("ViT-L-14-CLIPA"))
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ck.patch(model, ck.TCA(0.1))
    encoded = ck.encode_image(model, images, source=True)
    tower = ck.tower_of(model)
    from clipkernels.tower import TowerInput, run

    plan = ck.TCA(0.1).plan(tower.num_tokens, 2).ranked_by("received")
    last = run(tower, TowerInput(tower.embed(images)[0]), plan).x[0]
    mean = last[encoded.source[0, -1].long()].mean(0)
    expected = layer_norm(mean, mean.shape, model.visual.ln_post.weight, model.visual.ln_post.bias) @ model.visual.proj
    torch.testing.assert_close(encoded.embedding[0], expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(model.encode_image(images), encoded.embedding, atol=1e-4, rtol=1e-4)
    assert math.isfinite(encoded.embedding.sum())
