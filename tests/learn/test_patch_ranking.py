"""Patch Ranking's predictor, method and learnt tokens: against literal forms, on changing towers, and in training."""

import copy
import io
import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

import clipkernels as ck
from clipkernels import support
from clipkernels.learn.patch_ranking import (
    Rankings,
    RankPredictor,
    VisualTokens,
    fit_predictor,
    fit_tokens,
    golden_ranking,
    overlap,
)
from clipkernels.learn.patch_ranking.predictor import target_distribution
from clipkernels.learn.patch_ranking.text_contexts import injected_contexts, text_tower
from clipkernels.testing import open_clip_tower, openai_tower, patch_ranking, randomized
from tests.local_transformers import clip_model, save_clip_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ("cat", "dog", "ship")
PROMPTS = support.photo(CLASSES, ("a photo of a {}.",))


def mixed(predictor, x):
    """Scores of the tokens that enter the block, by torch's modules."""
    pooled = nn.functional.adaptive_avg_pool1d(x, predictor.channels)
    act = nn.functional.gelu
    pooled = pooled + predictor.token_out(act(predictor.token_in(predictor.norm1(pooled).mT))).mT
    pooled = pooled + predictor.channel_out(act(predictor.channel_in(predictor.norm2(pooled))))
    return predictor.score(pooled)[:, predictor.prefix :, 0]


def literal(model, method, images):
    """The embedding by the host's blocks, with the learnt tokens after the patches, as in the paper's figure."""
    visual, predictor, tokens = model.visual, method.predictor, method.tokens
    learnt = [] if tokens is None else list(tokens())
    x, added = visual._embeds(images), 0
    for index, host in enumerate(visual.transformer.resblocks):
        patches = x[:, : x.shape[1] - added]
        if index == method.block:
            scores = mixed(predictor, patches)
            keep = math.ceil(method.keep * scores.shape[1])
            chosen = scores.topk(keep).indices.sort(1).values + predictor.prefix
            rows = [x[i : i + 1, [*range(predictor.prefix), *chosen[i].tolist()]] for i in range(len(x))]
            x = torch.cat([torch.cat(rows), x[:, x.shape[1] - added :]], 1)
            patches = x[:, : x.shape[1] - added]
        if index < len(learnt):
            added = learnt[index].shape[0]
            x = torch.cat([patches, learnt[index].expand(len(x), -1, -1)], 1)
        x = host(x)
    return visual.ln_post(x)[:, 0] @ visual.proj


def small(layers=4):
    return randomized(open_clip_tower("ViT-B-32", layers, width=64, image_size=32, patch_size=8)).double()


@pytest.mark.parametrize("keep", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("block", [0, 2, 3])
@pytest.mark.parametrize("learnt", [0, 2])
@torch.no_grad()
def test_a_patched_tower_matches_the_literal_forward(keep, block, learnt):
    model, images = small(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    method = patch_ranking(model, keep, block, learnt)
    expected, dense = literal(model, method, images), model.encode_image(images)
    ck.patch(model, method)
    torch.testing.assert_close(model.encode_image(images), expected, atol=1e-9, rtol=1e-9)
    encoded = ck.encode_image(model, images, tokens=True, cls_path=True, source=True)
    torch.testing.assert_close(encoded.embedding, expected, atol=1e-9, rtol=1e-9)
    patches = math.ceil(keep * 16)
    assert encoded.tokens.shape == (3, 1 + patches, 512) and encoded.cls_path.shape == (3, 4, 64)
    if patches < 16:
        rows = [sorted(row for row in image[0].tolist() if row >= 0) for image in encoded.source]
        assert rows == [list(range(1, 1 + patches))] * 3
    ck.unpatch(model)
    assert torch.equal(model.encode_image(images), dense)


@torch.no_grad()
def test_intermediates_place_every_patch_and_hide_learnt_tokens():
    model, images = small(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ck.patch(model, patch_ranking(model, 0.5, 2, learnt=3))
    states = model.visual.forward_intermediates(images, output_fmt="NLC")["image_intermediates"]
    assert [tuple(state.shape) for state in states] == [(2, 16, 64)] * 4
    assert [(state == 0).all(-1).sum(1).tolist() for state in states] == [[0, 0], [0, 0], [8, 8], [8, 8]]


def test_a_vit_b16_predictor_has_the_papers_size_and_cost():
    predictor = RankPredictor(197)
    assert sum(parameter.numel() for parameter in predictor.parameters()) == 46_246
    assert predictor.macs == pytest.approx(7.27e6, abs=0.005e6)


@pytest.mark.parametrize(("removed", "gmacs"), [(50, 14.16), (60, 13.48), (78, 12.27), (100, 10.80)])
def test_a_pruned_b16_has_the_published_gmacs_plus_the_predictors(removed, gmacs):
    plan = ck.PatchRanking(RankPredictor(197), keep=(196 - removed) / 196).plan(tokens=197, blocks=12)
    assert plan.tokens == (197, 197, 197, *[197 - removed] * 10)
    assert plan.gmacs(768) - RankPredictor(197).macs / 1e9 == pytest.approx(gmacs, abs=0.005)


def test_learnt_tokens_count_in_every_block():
    tokens = VisualTokens(2, 9, 768)
    plan = ck.PatchRanking(RankPredictor(197), tokens=tokens).plan(tokens=197, blocks=12)
    assert plan.tokens == (199, 199, 199, *[1 + 118 + 2] * 9, 1 + 118)
    without = ck.PatchRanking(RankPredictor(197)).plan(tokens=197, blocks=12)
    assert 0 < plan.gmacs(768) - without.gmacs(768) < 0.2


def test_scores_match_torch_modules_and_have_no_gradient():
    predictor = RankPredictor(17, 5).double()
    x = torch.randn(3, 17, 100, dtype=torch.float64, requires_grad=True)
    scores = predictor(x)
    torch.testing.assert_close(scores, mixed(predictor, x).detach(), atol=1e-12, rtol=1e-12)
    assert not scores.requires_grad
    led = torch.cat([x[:, :5], torch.full((3, 2, 100), float("nan"), dtype=x.dtype), x[:, 5:]], 1)
    assert torch.equal(predictor(led, 7), scores)


@torch.no_grad()
def test_weights_follow_the_tower_and_never_enter_its_state(tiny, images):
    method, keys = patch_ranking(tiny), list(tiny.state_dict())
    ck.patch(tiny, method)
    expected = tiny.encode_image(images)
    assert list(tiny.state_dict()) == keys and not any("predictor" in name for name, _ in tiny.named_parameters())
    tiny.double()
    torch.testing.assert_close(tiny.encode_image(images.double()).float(), expected, atol=1e-5, rtol=1e-4)
    assert method.predictor.score.weight.dtype == torch.float32
    tiny.to(torch.bfloat16)
    assert tiny.encode_image(images.bfloat16()).isfinite().all()
    tiny.float()
    assert tiny.encode_image(images).isfinite().all()


@torch.no_grad()
def test_a_patched_tower_copies_and_pickles_with_its_predictor(tiny, images):
    ck.patch(tiny, patch_ranking(tiny, learnt=2))
    expected = tiny.encode_image(images)
    twin = copy.deepcopy(tiny)
    file = io.BytesIO()
    torch.save(tiny, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for copied in (twin, loaded):
        assert torch.equal(copied.encode_image(images), expected)
        assert ck.method_of(copied).predictor is not ck.method_of(tiny).predictor
    nn.init.zeros_(ck.method_of(twin).predictor.channel_in.weight)
    assert torch.equal(tiny.encode_image(images), expected)


def trained(model, images):
    """A predictor with the fingerprint of its tower."""
    rankings = golden_ranking(model, images, score="feature", step=32, window=4, stride=4)
    return fit_predictor(rankings, epochs=1).predictor


def test_unpatching_restores_a_tower_that_was_trained_or_moved(tiny, images):
    method = ck.PatchRanking(trained(tiny, images))
    ck.patch(tiny, method)
    with torch.no_grad():
        for parameter in tiny.visual.parameters():
            parameter.mul_(1.01)
    with ck.patched(tiny, ck.Dense()):
        tiny.double()
    assert ck.method_of(tiny) is method
    with torch.no_grad():
        assert tiny.encode_image(images.double()).isfinite().all()


@torch.no_grad()
def test_blocks_may_be_cast_without_their_tower(tiny, images):
    for method in (ck.EViT(0.5), patch_ranking(tiny, learnt=2)):
        ck.patch(tiny, method)
        x = tiny.visual._embeds(images)
        for alone in (pickle.loads(pickle.dumps(tiny.visual.transformer)), copy.deepcopy(tiny.visual.transformer)):
            assert alone.double()(x.double()).dtype == torch.float64
            assert alone.to(torch.bfloat16)(x.bfloat16()).isfinite().all()


@torch.no_grad()
def test_weights_survive_a_cast_to_half_and_back(tiny, images):
    method = patch_ranking(tiny, learnt=2)
    ck.patch(tiny, method)
    expected = tiny.encode_image(images)
    state = {name: value.clone() for name, value in tiny.state_dict().items()}
    tiny.bfloat16().float().load_state_dict(state)
    torch.testing.assert_close(tiny.encode_image(images), expected, atol=1e-5, rtol=1e-5)
    tiny.to("meta").to_empty(device="cpu").load_state_dict(state)
    torch.testing.assert_close(tiny.encode_image(images), expected, atol=1e-5, rtol=1e-5)


def test_a_later_mismatch_raises(tiny, images):
    ck.patch(tiny, patch_ranking(tiny))
    for parameter in tiny.visual.parameters():
        parameter.data = parameter.data.double()
    with pytest.raises(ValueError, match=r"must be torch.float64 on cpu, got torch.float32"):
        tiny.encode_image(images.double())


@torch.no_grad()
def test_patch_ranking_runs_under_autocast(tiny, images):
    ck.patch(tiny, patch_ranking(tiny, learnt=2))
    expected = tiny.encode_image(images)
    with torch.autocast("cpu", torch.bfloat16):
        embedding = tiny.encode_image(images)
    assert nn.functional.cosine_similarity(embedding.float(), expected).min() > 0.99


def test_gradients_reach_learnt_tokens_and_tower_through_pruning():
    model, images = small(3), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    method = patch_ranking(model, 0.5, 1, learnt=1)
    ck.patch(model, method)

    def embed(values):
        with torch.no_grad():
            method.tokens.own.copy_(values)
        return ck.encode_image(model, images).embedding

    embedding = ck.encode_image(model, images).embedding
    weights = torch.randn_like(embedding)
    (embedding * weights).sum().backward()
    grad = method.tokens.own.grad.clone()
    assert all(parameter.grad is None for parameter in method.predictor.parameters())
    assert model.visual.conv1.weight.grad.abs().sum() > 0
    base, towards = method.tokens.own.detach().clone(), torch.randn_like(grad)
    with torch.no_grad():
        up, down = ((embed(base + sign * 1e-6 * towards) * weights).sum() for sign in (1, -1))
    assert ((up - down) / 2e-6).item() == pytest.approx((grad * towards).sum().item(), rel=1e-4)


def test_checkpointing_gives_the_same_gradients(tiny, images):
    method = patch_ranking(tiny, learnt=2)
    ck.patch(tiny, method)
    grads = []
    for recompute in (False, True):
        tiny.set_grad_checkpointing(recompute)
        method.tokens.zero_grad()
        tiny.encode_image(images).square().sum().backward()
        grads.append(method.tokens.own.grad.clone())
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"predictor": None}, TypeError, "predictor must be a RankPredictor, got None"),
        ({"tokens": 3}, TypeError, "tokens must be VisualTokens or None, got 3"),
        ({"keep": 0}, ValueError, r"keep must be a number in \(0, 1\], got 0"),
        ({"block": 2}, ValueError, "block must be that of the predictor, 3, got 2"),
    ],
)
def test_bad_configurations_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ck.PatchRanking(**{"predictor": RankPredictor(65), **arguments})


def test_a_predictor_of_another_tower_is_refused_without_changes(tiny, images):
    predictor = trained(tiny, images)
    tokens = VisualTokens(2, 2, 128)
    assert ck.patch(tiny, ck.PatchRanking(predictor, tokens=tokens)) is tiny
    half = copy.deepcopy(ck.unpatch(tiny)).half()
    ck.patch(half, ck.PatchRanking(predictor))
    ck.patch(tiny.visual, ck.PatchRanking(predictor))  # the same tower, passed as `model.visual`
    ck.unpatch(tiny)
    ck.patch(tiny, ck.EViT(0.5))
    visual = tiny.visual
    for weight in (visual.conv1.weight, visual.positional_embedding, visual.transformer.resblocks[0].mlp.c_fc.bias):
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(2)
        with pytest.raises(ValueError, match=r"expected the tower of the predictor .*, got another tower"):
            ck.patch(tiny, ck.PatchRanking(predictor))
        with torch.no_grad():
            weight.copy_(before)
    other = RankPredictor(50)
    with pytest.raises(ValueError, match="the predictor is for 50 tokens, 1 of them prefix, got 65 and 1"):
        ck.patch(tiny, ck.PatchRanking(other))
    with pytest.raises(ValueError, match="the predictor is for block 6, got a tower of 6 blocks"):
        ck.patch(tiny, ck.PatchRanking(RankPredictor(65, block=6)))
    with pytest.raises(ValueError, match=r"the predictor is for a tower with image size \[224, 224\], got one with \["):
        ck.patch(tiny, ck.PatchRanking(RankPredictor(65, about={"image_size": [224, 224]})))
    with pytest.raises(
        ValueError, match="learnt tokens are for a tower of width 64 and at least 2 blocks, got width 128"
    ):
        ck.patch(tiny, ck.PatchRanking(RankPredictor(65), tokens=VisualTokens(2, 2, 64)))
    assert ck.method_of(tiny) == ck.EViT(0.5)


def synthetic_rankings(images=64, patches=16):
    """Rankings that can be learnt from the features: the first channel gives a patch's rank."""
    features = torch.randn(images, 1 + patches, 64, generator=torch.Generator().manual_seed(0))
    order = features[:, 1:, 0].argsort(1, descending=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(patches).expand(images, -1))
    return Rankings(ranks, features, {"prefix": 1, "block": 2})


def test_features_that_are_not_finite_are_refused():
    rankings = synthetic_rankings()
    rankings.features[3, 2] = float("nan")
    with pytest.raises(ValueError, match="rankings must have finite features, got 1 image with others"):
        fit_predictor(rankings)


def test_a_share_keeps_as_many_patches_as_other_methods():
    for share in (0.07, 0.14, 0.28, 0.55, 0.56, 0.6, 147 / 196):
        pruned = ck.EViT(share, blocks=(3,), fuse=False).plan(226, 12)
        assert ck.PatchRanking(RankPredictor(226), share).plan(226, 12).tokens[-1] == pruned.tokens[-1]


def test_the_target_distribution_is_the_published_one():
    ranks = torch.randperm(196, generator=torch.Generator().manual_seed(0))[None]
    v = torch.tensor([0.0 if rank < 146 else -5 - 0.1 * rank for rank in ranks[0].tolist()])
    torch.testing.assert_close(target_distribution(ranks, 50)[0], v.softmax(0))


@pytest.mark.parametrize("margin", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
def test_a_predictor_learns_from_features(margin):
    progress = []
    fitted = fit_predictor(
        synthetic_rankings(1024),
        keep=0.5,
        margin=margin,
        epochs=30,
        lr=5e-3,
        progress=lambda *line: progress.append(line),
    )
    assert fitted.overlaps[-1] > 0.9 and fitted.losses[-1] < fitted.losses[0]
    assert progress[-1] == (30, fitted.losses[-1], fitted.overlaps[-1])
    assert not fitted.predictor.training and fitted.predictor.block == 2


def test_training_is_deterministic_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other = (fit_predictor(synthetic_rankings(), epochs=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert (
        repr(one.predictor)
        == repr(other.predictor)
        != repr(fit_predictor(synthetic_rankings(), epochs=2, seed=1).predictor)
    )


def test_overlap_counts_patches_removed_in_both():
    ranks = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    assert overlap(-ranks.float(), ranks, 2) == 1
    assert overlap(ranks.float(), ranks, 2) == 0
    assert overlap(torch.zeros(2, 4), ranks, 2) == 0.5  # the last two are removed


def test_a_saved_predictor_loads_unchanged(tmp_path):
    predictor = fit_predictor(synthetic_rankings(), epochs=1, token_hidden=16).predictor
    predictor.save(tmp_path / "predictor.safetensors")
    loaded = RankPredictor.load(tmp_path / "predictor.safetensors")
    assert repr(loaded) == repr(predictor) and loaded.about == predictor.about and not loaded.training
    tokens = VisualTokens(2, 3, 8, text_width=4, about={"keep": 0.5})
    tokens.save(tmp_path / "tokens.safetensors")
    again = VisualTokens.load(tmp_path / "tokens.safetensors")
    assert repr(again) == repr(tokens) and torch.equal(again(), tokens()) and again.about == {"keep": 0.5}
    with pytest.raises(ValueError, match=r"expected a predictor \(clipkernels.rank_predictor.2\), got .*tokens"):
        RankPredictor.load(tmp_path / "tokens.safetensors")


def test_the_eps_of_a_predictor_is_its_norms_and_part_of_its_file(tmp_path):
    x = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(1)) * 1e-3  # where eps matters
    released = fit_predictor(synthetic_rankings(), epochs=1, token_hidden=16, eps=1e-6).predictor
    released.save(tmp_path / "predictor.safetensors")
    loaded, usual = RankPredictor.load(tmp_path / "predictor.safetensors"), RankPredictor(17, block=2, token_hidden=16)
    usual.load_state_dict(released.state_dict())
    assert (loaded.eps, loaded.norm1.eps, loaded.norm2.eps, loaded.mixer().eps) == (1e-6,) * 4 and usual.eps == 1e-5
    assert torch.equal(loaded(x), released(x)) and not torch.allclose(loaded(x), usual(x))
    y = x.double()
    weights = {name: weight.double() for name, weight in released.state_dict().items()}

    def norm(z, number):
        centred = z - z.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f"norm{number}.weight"] + weights[f"norm{number}.bias"]

    def mlp(z, part):
        hidden = torch.nn.functional.gelu(z @ weights[f"{part}_in.weight"].T + weights[f"{part}_in.bias"])
        return hidden @ weights[f"{part}_out.weight"].T + weights[f"{part}_out.bias"]

    y = y + mlp(norm(y, 1).mT, "token").mT
    y = y + mlp(norm(y, 2), "channel")
    expected = y[:, 1:] @ weights["score.weight"][0] + weights["score.bias"]
    torch.testing.assert_close(loaded(x).double(), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="eps must be a positive number, got 0"):
        RankPredictor(17, eps=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1.0}, r"keep must be a number in \(0, 1\)"),
        ({"held_out": 1.0}, r"held_out must be a number in \[0, 1\)"),
        ({"epochs": 0}, "epochs must be an int of at least 1, got 0"),
        ({"lr": 0.0}, "lr must be a positive number, got 0.0"),
        ({"keep": 0.99}, "keep must remove at least one of 16 patches, got 0.99"),
        ({"margin": float("nan")}, r"margin must be a number in \[0, inf\), got nan"),
    ],
)
def test_predictor_training_refuses_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        fit_predictor(synthetic_rankings(), **options)
    with pytest.raises(RuntimeError, match="needs gradients"), torch.inference_mode():
        fit_predictor(synthetic_rankings())


@pytest.mark.parametrize("coupled", [False, True])
def test_learnt_tokens_fit_a_few_images_without_changing_the_model(tiny, coupled):
    images, labels = torch.randn(12, 3, 32, 32), torch.arange(12) % 3
    _, _, tokenizer = ck.bundled()
    tiny.train()
    tiny.logit_scale.requires_grad_(False)
    asking = [parameter.requires_grad for parameter in tiny.parameters()]
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    ck.patch(tiny, ck.EViT(0.5))
    progress = []
    fitted = fit_tokens(
        tiny, tokenizer, PROMPTS, images, labels, patch_ranking(tiny, 0.6, 3), coupled=coupled, epochs=15,
        progress=lambda *line: progress.append(line),
    )  # fmt: skip
    assert fitted.losses[-1] < 0.8 * fitted.losses[0] and progress[-1] == (15, fitted.losses[-1])
    assert ck.method_of(tiny) == ck.EViT(0.5) and tiny.training
    assert [parameter.requires_grad for parameter in tiny.parameters()] == asking
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny.parameters())
    assert not any(block._forward_pre_hooks for block in tiny.transformer.resblocks)
    again = fit_tokens(
        tiny, tokenizer, PROMPTS, images, labels, patch_ranking(tiny, 0.6, 3), coupled=coupled, epochs=15
    )
    assert repr(again.tokens) == repr(fitted.tokens)


@torch.no_grad()
def test_coupled_tokens_are_maps_of_the_texts_contexts(tiny, images):
    _, _, tokenizer = ck.bundled()
    tokens = VisualTokens(2, 4, 128, text_width=128)
    torch.testing.assert_close(tokens()[1], tokens.context[1] @ tokens.maps[1].weight.T + tokens.maps[1].bias)
    plain = support.class_embeddings(tiny, tokenizer, PROMPTS)
    prompted, inputs = tokens.class_embeddings(tiny, tokenizer, PROMPTS), []
    with injected_contexts(tiny, tokens.context):
        handles = [
            block.register_forward_hook(lambda _, args, out: inputs.append(args[0][:, :4].clone()))
            for block in tiny.transformer.resblocks
        ]
        tiny.encode_text(tokenizer([PROMPTS["cat"][0]]))
    for block_input, context, handle in zip(inputs, tokens.context, handles, strict=False):
        assert torch.equal(block_input[0, 1:3], context)
        handle.remove()
    assert torch.equal(support.class_embeddings(tiny, tokenizer, PROMPTS), plain)
    assert not torch.allclose(prompted, plain)
    method = ck.PatchRanking(patch_ranking(tiny).predictor, 0.5, tokens=tokens)
    classifier = ck.Classifier(tiny, tokenizer, CLASSES, method=method)
    expected = tiny.logit_scale.exp() * normalize(literal(ck.unpatch(tiny), method, images)) @ prompted.T
    ck.patch(tiny, method)
    torch.testing.assert_close(classifier(images), expected, atol=1e-3, rtol=1e-4)
    again = ck.Classifier(tiny, tokenizer, CLASSES)  # as it is patched
    assert torch.equal(again(images), classifier(images))


def test_tokens_are_trained_through_a_model_of_transformers(images, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, tokenizer = clip_model(), save_clip_tokenizer(tmp_path)
    method, labels = patch_ranking(model), torch.tensor([0, 1, 1])
    prompts = support.photo(["cat", "dog"])
    options = {"count": 2, "depth": 2, "epochs": 1, "batch_size": 3, "lr": 1e-12}
    tokens, losses = fit_tokens(model, tokenizer, prompts, images, labels, method, **options)
    with torch.no_grad(), ck.patched(model, replace(method, tokens=tokens)):
        embedding = normalize(ck.encode_image(model, images).embedding)
        logits = 100 * embedding @ support.class_embeddings(model, tokenizer, prompts).T
    assert losses == pytest.approx([torch.nn.functional.cross_entropy(logits, labels).item()], rel=1e-4)


@torch.no_grad()
def test_contexts_work_in_openais_text_tower():
    pytest.importorskip("clip.model", reason="openai-clip is not installed")
    torch.manual_seed(0)
    model = openai_tower(2, 64, 8, 64, 32)  # fresh weights attend to every word, sharper ones only to the last
    ids, contexts = torch.arange(48).view(3, 16), torch.randn(1, 2, model.transformer.width)
    x = model.token_embedding(ids) + model.positional_embedding
    x[:, 1:3] = contexts[0]
    expected = model.ln_final(model.transformer(x.transpose(0, 1))[-1]) @ model.text_projection
    with injected_contexts(model, contexts):
        together = model.encode_text(ids)
        alone = torch.cat([model.encode_text(row[None]) for row in ids])
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-4)
    assert (model.encode_text(ids) - expected).norm() > 0.1 * expected.norm()


def test_contexts_longer_than_the_prompts_are_refused(tiny):
    _, _, tokenizer = ck.bundled()
    tokens = VisualTokens(2, 2, 128, text_width=128)
    for template, names in (
        ("{}", ("aa", "bb")),
        ("{}", ("a", "bird")),
        ("a photo of a {}.", ("x" * 99, "x" * 99 + "y")),
    ):
        with pytest.raises(ValueError, match="prompts must differ after their first 2 tokens"):
            tokens.class_embeddings(tiny, tokenizer, support.photo(names, (template,)))
    with pytest.raises(ValueError, match="prompts must differ after their first 100 tokens"):
        VisualTokens(100, 2, 128, text_width=128).class_embeddings(tiny, tokenizer, PROMPTS)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="prompts must differ"):
        prompts = support.photo(("aa", "bb"), ("{}",))
        fit_tokens(tiny, tokenizer, prompts, images, labels, patch_ranking(tiny), coupled=True)


def test_contexts_of_another_text_tower_are_refused(tiny):
    _, _, tokenizer = ck.bundled()
    images, labels = torch.randn(3, 3, 32, 32), torch.arange(3)
    fitted = fit_tokens(tiny, tokenizer, PROMPTS, images, labels, patch_ranking(tiny), coupled=True, epochs=1)
    fitted.tokens.class_embeddings(tiny, tokenizer, PROMPTS)
    with torch.no_grad():
        tiny.transformer.resblocks[1].mlp.c_fc.bias[0] += 1
    with pytest.raises(ValueError, match=r"expected the tower of the learnt tokens' text .*, got another tower"):
        fitted.tokens.class_embeddings(tiny, tokenizer, PROMPTS)
    with pytest.raises(ValueError, match="the contexts are for a text tower of width 64, got 128"):
        VisualTokens(2, 2, 128, text_width=64).class_embeddings(tiny, tokenizer, PROMPTS)
    with pytest.raises(ValueError, match="coupled tokens need open_clip's or OpenAI's text tower, got Module"):
        text_tower(nn.Module())


def test_contexts_start_as_the_words_they_replace(tiny):
    _, _, tokenizer = ck.bundled()
    images, labels = torch.randn(1, 3, 32, 32), torch.tensor([0])
    fitted = fit_tokens(
        tiny, tokenizer, PROMPTS, images, labels, patch_ranking(tiny), coupled=True, depth=1, epochs=1, lr=1e-12
    )
    prompted = fitted.tokens.class_embeddings(tiny, tokenizer, PROMPTS)
    torch.testing.assert_close(prompted, support.class_embeddings(tiny, tokenizer, PROMPTS), atol=1e-5, rtol=1e-5)


def test_interrupted_training_restores_the_model(tiny):
    _, _, tokenizer = ck.bundled()
    images, labels = torch.randn(3, 3, 32, 32), torch.arange(3)
    ck.patch(tiny.train(), ck.EViT(0.5))

    def stop(epoch, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_tokens(tiny, tokenizer, PROMPTS, images, labels, patch_ranking(tiny), coupled=True, epochs=2, progress=stop)
    assert ck.method_of(tiny) == ck.EViT(0.5) and tiny.training
    assert all(parameter.requires_grad for parameter in tiny.visual.parameters())
    assert not any(block._forward_pre_hooks for block in tiny.transformer.resblocks)


def test_token_training_refuses_bad_arguments(tiny):
    _, _, tokenizer = ck.bundled()
    images, labels, method = torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), patch_ranking(tiny)
    with pytest.raises(ValueError, match="labels must be from 0 to 2, got 0 to 3"):
        fit_tokens(tiny, tokenizer, PROMPTS, images, torch.tensor([0, 3]), method)
    with pytest.raises(ValueError, match="images must hold at least one image, got none"):
        fit_tokens(tiny, tokenizer, PROMPTS, images[:0], labels[:0], method)
    with pytest.raises(ValueError, match=r"model must be float32 or float64 .*, got torch\.bfloat16"):
        fit_tokens(tiny.bfloat16(), tokenizer, PROMPTS, images, labels, method)
    with pytest.raises(RuntimeError, match="needs gradients"), torch.inference_mode():
        fit_tokens(tiny, tokenizer, PROMPTS, images, labels, method)
