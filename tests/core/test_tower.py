"""encode_image: the results of one forward, patched or not, compared with the host run by hand."""

import open_clip
import pytest
import torch

import clipkernels as ck
from clipkernels.plan import Merge, Plan, Prune
from clipkernels.testing import open_clip_tower, timm_tower


def by_hand(model, images):
    """CLS after every block, and all tokens after norm and projection, from the host's own modules."""
    visual = model.visual
    x, path = visual._embeds(images), []
    for block in visual.transformer.resblocks:
        x = block(x)
        path.append(x[:, 0])
    return visual.ln_post(x) @ visual.proj, torch.stack(path, 1)


@pytest.mark.parametrize("patched", [False, True])
@torch.no_grad()
def test_an_unreduced_tower_returns_the_hosts_intermediates(tiny, images, patched):
    tokens, path = by_hand(tiny, images)
    embedding = tiny.encode_image(images)
    if patched:
        ck.patch(tiny, ck.Dense())
    encoded = ck.encode_image(tiny, images, tokens=True, cls_path=True, source=True)
    torch.testing.assert_close(encoded.embedding, embedding, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(encoded.tokens, tokens, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(encoded.cls_path, path, atol=5e-6, rtol=1e-5)
    assert encoded.source.shape == (3, 0, 64) and encoded.source.dtype == torch.int32


@torch.no_grad()
def test_only_requested_outputs_are_returned(tiny, images):
    assert ck.encode_image(tiny, images)[1:] == (None, None, None, 1)
    ck.patch(tiny, ck.EViT(0.5))
    encoded = ck.encode_image(tiny, images, cls_path=True)
    assert encoded.tokens is None and encoded.source is None
    torch.testing.assert_close(encoded.embedding, tiny.encode_image(images), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(tiny.visual.ln_post(encoded.cls_path[:, -1]) @ tiny.visual.proj, encoded.embedding)


def test_the_result_has_the_number_of_prefix_tokens():
    model = timm_tower("vit_small_patch14_reg4_dinov2", img_size=28)
    with torch.no_grad():
        encoded = ck.encode_image(model, torch.randn(2, 3, 28, 28), tokens=True)
    assert encoded.prefix == 5 and encoded.tokens.shape[1] == 5 + 4


def literal_evit(model, images, keep, blocks, fuse):
    """EViT as its docstring describes it, one image and one patch at a time, with the host's own modules."""
    import math

    visual, out, holders = model.visual, [], []
    for image in images:
        x = visual._embeds(image[None])[0]
        history, rows = [[] for _ in range(len(x) - 1)], list(range(len(x) - 1))
        for index, block in enumerate(visual.transformer.resblocks):
            normed = block.ln_1(x)[None]
            _, weights = block.attn(normed, normed, normed, need_weights=True, average_attn_weights=True)
            x = x + block.attn(normed, normed, normed, need_weights=False)[0][0]
            if index in blocks:
                patches, scores = x[1:], weights[0, 0, 1:]
                count = math.ceil(keep * len(patches))
                order = sorted(range(len(patches)), key=lambda i: (-float(scores[i]), i))
                survivors, others = sorted(order[:count]), order[count:]
                new = [x[0], *(patches[i] for i in survivors)]
                if fuse:
                    new.append(sum(scores[i] * patches[i] for i in others))
                x = torch.stack(new)
                new_row = dict.fromkeys(range(len(patches)), count + 1 if fuse else -1)
                new_row |= {i: 1 + row for row, i in enumerate(survivors)}
                rows = [new_row[row] if row >= 0 else -1 for row in rows]
                for patch, row in enumerate(rows):
                    history[patch].append(row)
                rows = [row - 1 if row >= 0 else -1 for row in rows]
            x = x + block.mlp(block.ln_2(x))
        out.append(visual.ln_post(x) @ visual.proj)
        holders.append(torch.tensor(history).T)
    return torch.stack(out), torch.stack(holders)


@pytest.mark.parametrize("fuse", [False, True])
@torch.no_grad()
def test_evit_equals_a_literal_implementation(tiny, images, fuse):
    tokens, source = literal_evit(tiny, images, 0.6, (1, 3, 4), fuse)
    ck.patch(tiny, ck.EViT(0.6, fuse=fuse))
    encoded = ck.encode_image(tiny, images, tokens=True, source=True)
    torch.testing.assert_close(encoded.tokens, tokens, atol=1e-5, rtol=1e-4)
    assert encoded.source.dtype == torch.int32 and torch.equal(encoded.source, source.int())


def literal_tome(model, images, r, proportional):
    """ToMe with attention written out, one image at a time, and groups of patches as Python lists."""
    visual, out, holders = model.visual, [], []
    for image in images:
        x = visual._embeds(image[None])[0]
        groups, steps = [[i] for i in range(len(x))], []
        for block in visual.transformer.resblocks:
            size = torch.tensor([float(len(g)) for g in groups])
            normed, attn = block.ln_1(x), block.attn
            q, k, v = (
                (normed @ w.T + b).unflatten(-1, (attn.num_heads, -1)).transpose(0, 1)
                for w, b in zip(attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3), strict=True)
            )
            logits = q @ k.mT / q.shape[-1] ** 0.5 + (size.log() if proportional else 0)
            x = x + attn.out_proj((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
            unit = torch.nn.functional.normalize(k.mean(0), dim=-1)
            similarity = unit[::2] @ unit[1::2].T
            similarity[0] = float("-inf")
            best, nearest = similarity.max(1)
            count = min(r, (len(x) - 1) // 2)
            order = sorted(range(len(best)), key=lambda i: (-float(best[i]), i))
            source, survivors = sorted(order[:count]), sorted(order[count:])
            rows, new = [], []
            for i in survivors:
                rows.append(x[2 * i])
                new.append(groups[2 * i])
            for j in range(len(x) // 2):
                members = [2 * j + 1] + [2 * i for i in source if int(nearest[i]) == j]
                rows.append(sum(size[m] * x[m] for m in members) / sum(size[m] for m in members))
                new.append([t for m in members for t in groups[m]])
            x, groups = torch.stack(rows), new
            steps.append([next(row for row, g in enumerate(groups) if t in g) for t in range(1, 65)])
            x = x + block.mlp(block.ln_2(x))
        out.append(visual.ln_post(x) @ visual.proj)
        holders.append(torch.tensor(steps))
    return torch.stack(out), torch.stack(holders)


@pytest.mark.parametrize("proportional", [False, True])
@torch.no_grad()
def test_tome_equals_a_literal_implementation(tiny, images, proportional):
    tokens, source = literal_tome(tiny, images, 9, proportional)
    ck.patch(tiny, ck.ToMe(9, proportional=proportional))
    encoded = ck.encode_image(tiny, images, tokens=True, source=True)
    torch.testing.assert_close(encoded.tokens, tokens, atol=1e-5, rtol=1e-4)
    assert torch.equal(encoded.source, source.int())


@torch.no_grad()
def test_a_random_subset_depends_on_the_seed_and_not_on_the_image(tiny, images):
    subsets = []
    for seed in (0, 0, 1):
        ck.patch(tiny, ck.EViT(0.5, score="random", seed=seed, fuse=False))
        source = ck.encode_image(tiny, images, source=True).source
        assert torch.equal(source[0], source[1])
        subsets.append(source[0, 0] >= 0)
    assert torch.equal(subsets[0], subsets[1]) and not torch.equal(subsets[0], subsets[2])
    assert [int(subset.sum()) for subset in subsets] == [32, 32, 32]


@torch.no_grad()
def test_a_plan_may_prune_in_one_block_and_merge_in_the_next(tiny, images):
    class Both:
        def plan(self, tokens, blocks, prefix=1):
            return Plan((Prune(40), Merge(12), *(None,) * (blocks - 2)), tokens, prefix)

    encoded = ck.encode_image(ck.patch(tiny, Both()), images, tokens=True, source=True)
    assert encoded.tokens.shape == (3, 30, 128)
    first, second = encoded.source.unbind(1)
    assert first.max() == 41 and second.max() == 29
    # Patches that shared a row still share one.
    for image in range(3):
        fused = second[image][first[image] == 41]
        assert (fused == fused[0]).all()


@pytest.mark.parametrize("fuse", [False, True])
@torch.no_grad()
def test_a_plan_may_merge_and_then_prune_and_merge_again(tiny, images, fuse):
    class Three:
        def plan(self, tokens, blocks, prefix=1):
            return Plan((Merge(12), Prune(20, fuse), Merge(4), *(None,) * (blocks - 3)), tokens, prefix)

    encoded = ck.encode_image(ck.patch(tiny, Three()), images, tokens=True, source=True)
    assert encoded.tokens.shape == (3, 17 + fuse, 128) and encoded.tokens.isfinite().all()
    assert ((encoded.source[:, 1] < 0).any(-1) != fuse).all()


@torch.no_grad()
def test_merging_and_dropping_is_refused_if_all_tokens_are_pooled():
    class Both:
        def plan(self, tokens, blocks, prefix=1):
            return Plan((Prune(40, fuse=False), Merge(1)), tokens, prefix)

    model = open_clip_tower("ViT-L-14-CLIPA", width=64, head_width=64, patch_size=32)
    with pytest.raises(ValueError, match="needs a tower that pools CLS"):
        ck.patch(model, Both())


@torch.no_grad()
def test_the_queries_of_a_pooler_see_merged_tokens_at_their_size():
    model = open_clip_tower("coca_ViT-B-32")
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    encoded = ck.encode_image(ck.patch(model, ck.ToMe(6)), images, tokens=True)
    torch.testing.assert_close(encoded.tokens[:, 0], encoded.embedding, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("indices", [None, 2, [1], [0, 4]])
@pytest.mark.parametrize("stop_early", [False, True])
@torch.no_grad()
def test_a_dense_tower_has_the_hosts_intermediates(tiny, images, indices, stop_early):
    expected = tiny.visual.forward_intermediates(images, indices=indices, stop_early=stop_early)
    actual = ck.patch(tiny, ck.Dense()).visual.forward_intermediates(images, indices=indices, stop_early=stop_early)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_random_ranking_has_the_towers_dtype_and_takes_any_seed(tiny, images):
    ck.patch(tiny.double(), ck.EViT(0.5, score="random", seed=2**40))
    assert tiny.encode_image(images.double()).dtype == torch.float64


@torch.no_grad()
def test_a_plan_for_other_tokens_is_refused(tiny):
    class Wrong:
        def plan(self, tokens, blocks, prefix=1):
            return Plan((None,) * blocks, tokens + 1, prefix)

    with pytest.raises(
        ValueError, match="must start at 65 tokens, 1 of them prefix, and have 6 steps, got 66, 1 and 6"
    ):
        ck.patch(tiny, Wrong())


@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize("method", [ck.Dense(), ck.EViT(0.5), ck.EViT(0.5, fuse=False), ck.ToMe(8)])
@torch.no_grad()
def test_intermediates_stay_on_the_grid(tiny, images, method, output_fmt):
    ck.patch(tiny, method)
    options = {"output_fmt": output_fmt, "normalize_intermediates": False}
    out = tiny.visual.forward_intermediates(images, indices=[0, 5], **options)
    torch.testing.assert_close(out["image_features"], tiny.encode_image(images), atol=1e-5, rtol=1e-4)
    first, last = out["image_intermediates"]
    if output_fmt == "NCHW":
        assert last.shape == (3, 128, 8, 8)
        first, last = first.flatten(2).mT, last.flatten(2).mT
    encoded = ck.encode_image(tiny, images, tokens=True, source=True)
    visual = tiny.visual
    projected = visual.ln_post(last) @ visual.proj
    for image in range(3):
        for patch in range(64):
            row = patch + 1 if method == ck.Dense() else int(encoded.source[image, -1, patch])
            if row < 0:
                assert (last[image, patch] == 0).all()
            else:
                torch.testing.assert_close(projected[image, patch], encoded.tokens[image, row], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_half_precision_towers_of_both_norm_kinds_run(images):
    for dtype in (torch.float16, torch.bfloat16):
        model = open_clip.CLIP(
            64,
            {"image_size": 32, "patch_size": 8, "width": 128, "layers": 3, "head_width": 64},
            {"context_length": 8, "vocab_size": 16, "width": 64, "heads": 1, "layers": 1},
            cast_dtype=dtype,
        ).eval()
        exact = ck.encode_image(model, images, tokens=True).tokens
        open_clip.model.convert_weights_to_lp(model, dtype)
        assert model.visual.ln_post.weight.dtype == torch.float32
        for method in (ck.Dense(), ck.EViT(0.5), ck.ToMe(3)):
            assert ck.encode_image(ck.patch(model, method), images.to(dtype)).embedding.dtype == dtype
        ck.unpatch(model)
        actual = ck.encode_image(model, images.to(dtype), tokens=True).tokens
        cosine = torch.nn.functional.cosine_similarity(actual.float(), exact, dim=-1)
        assert cosine.min() > (0.9999 if dtype == torch.float16 else 0.999)


@torch.no_grad()
def test_autocast_runs_a_reduced_tower(tiny, images):
    ck.patch(tiny, ck.EViT(0.5))
    expected = tiny.encode_image(images)
    with torch.autocast("cpu", torch.bfloat16):
        actual = tiny.encode_image(images)
    assert torch.nn.functional.cosine_similarity(actual.float(), expected).min() > 0.9


@pytest.mark.parametrize("shape", [(3, 3, 64, 64), (3, 32, 32), (3, 1, 32, 32)])
def test_images_of_another_size_are_refused(tiny, shape):
    with pytest.raises(ValueError, match=r"images must be \(B,3,32,32\), got"):
        ck.encode_image(tiny, torch.zeros(shape))


@torch.no_grad()
def test_a_resnet_returns_every_position_of_its_pool():
    torch.manual_seed(0)
    model = open_clip_tower("RN50", layers=[1, 1, 1, 1]).visual
    images = torch.randn(2, 3, 224, 224)
    encoded = ck.encode_image(model, images, tokens=True)
    assert encoded.tokens.shape == (2, 50, 1024)
    torch.testing.assert_close(encoded.embedding, model(images), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoded.tokens[:, 0], encoded.embedding)
    pool = model.attnpool
    x = model.layer4(model.layer3(model.layer2(model.layer1(model.stem(images))))).flatten(2).mT
    x = torch.cat([x.mean(1, keepdim=True), x], 1) + pool.positional_embedding
    q, k, v = (part(x).unflatten(-1, (32, 64)) for part in (pool.q_proj, pool.k_proj, pool.v_proj))
    mixed = torch.einsum("bhqk,bkhd->bqhd", torch.einsum("bqhd,bkhd->bhqk", q / 8, k).softmax(-1), v)
    torch.testing.assert_close(encoded.tokens, pool.c_proj(mixed.flatten(2)), atol=1e-5, rtol=1e-4)
    assert (encoded.tokens[:, 1:] != encoded.tokens[:, :1]).any()
    with pytest.raises(ck.UnsupportedTower, match="expected a ViT for cls_path, source and anchors, got a ResNet"):
        ck.encode_image(model, images, source=True)
