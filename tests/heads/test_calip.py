"""CALIP and its few-shot form: literal formulas, the published grid, towers of every kind, files."""

from functools import partial

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

import clipkernels as ck
from clipkernels.heads.presets import CALIP_PRESETS
from clipkernels.heads.weight_search import count_correct, search, spaced
from clipkernels.learn.calip_fs import MAPS, FewShotCALIP
from clipkernels.testing import openai_tower, timm_tower, transformers_tower
from tests.mutants import read, write

WIDTH, CLASSES = 12, 5


def features(count=6, patches=9, prefix=1, seed=0, dtype=torch.float64):
    """Encoded images and class embeddings, not normalised."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(count, WIDTH, generator=generator).to(dtype)
    tokens = 3 * torch.randn(count, prefix + patches, WIDTH, generator=generator).to(dtype)
    text = 2 * torch.randn(CLASSES, WIDTH, generator=generator).to(dtype)
    return ck.Encoded(embedding, tokens, prefix=prefix), text


def literal(encoded, text, alpha, beta2, beta3, maps=None):
    """The paper's formula, image by image; `maps` holds weights and biases by name, None means identities."""

    def mapped(name, x):
        return x if maps is None else x @ maps[f"maps.{name}.weight"].T + maps[f"maps.{name}.bias"]

    classes, logits = normalize(text, dim=1), []
    for pooled, tokens in zip(encoded.embedding, encoded.tokens, strict=True):
        image, patches = normalize(pooled, dim=0), normalize(tokens[encoded.prefix :], dim=1)
        of_text = mapped("query_text", classes) @ mapped("key_image", patches).T / alpha
        of_image = mapped("query_image", patches) @ mapped("key_text", classes).T / alpha
        attended_patches = mapped("out_text", of_text.softmax(1) @ mapped("value_image", patches))
        attended_classes = mapped("out_image", of_image.softmax(1) @ mapped("value_text", classes))
        both = attended_classes.mean(0) + attended_classes.max(0).values
        logits.append(100 * (classes @ image + beta2 * attended_patches @ image + beta3 * classes @ both))
    return torch.stack(logits)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_logits_match_the_papers_formula(prefix, alpha):
    encoded, text = features(prefix=prefix)
    logits = ck.CALIP(text, alpha, 1.3, 0.7)(encoded)
    torch.testing.assert_close(logits, literal(encoded, text, alpha, 1.3, 0.7), atol=1e-10, rtol=1e-10)


def test_zero_weights_give_zero_shot_logits():
    encoded, text = features(dtype=torch.float32)
    assert torch.equal(ck.CALIP(text, beta2=0, beta3=0)(encoded), ck.ZeroShot(text)(encoded))


def test_the_scale_multiplies_every_term():
    encoded, text = features()
    torch.testing.assert_close(ck.CALIP(text, scale=7.0)(encoded) / 7, ck.CALIP(text)(encoded) / 100)


def test_half_features_give_single_logits_near_the_exact_ones():
    encoded, text = features(patches=49)
    half = ck.Encoded(encoded.embedding.bfloat16(), encoded.tokens.bfloat16())
    logits = ck.CALIP(text.float())(half)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), ck.CALIP(text)(encoded), atol=0.3, rtol=0)


def test_presets_set_weights_that_arguments_override():
    text = torch.randn(3, 4)
    head = ck.CALIP(text, preset="eurosat")
    assert (head.beta2, head.beta3) == (6.08, 0.06)
    assert ck.CALIP(text, beta3=0.5, preset="eurosat").beta3 == 0.5
    assert ck.CALIP(text).beta2 == CALIP_PRESETS["imagenet"].beta2
    with pytest.raises(ValueError, match=r'preset must be "caltech101", .* or "ucf101", got .mnist.'):
        ck.CALIP(text, preset="mnist")


@pytest.mark.parametrize("batched", [False, True])
def test_fit_finds_the_first_best_weights_of_the_published_grid(batched):
    encoded, text = features(60)
    labels = torch.randint(0, CLASSES, (60,), generator=torch.Generator().manual_seed(1))
    head = ck.CALIP(text)
    first, second, third = head.terms(encoded)
    best, chosen = -1, None
    for beta2 in [i * (2 - 0.001) / 200 + 0.001 for i in range(200)]:
        for beta3 in [i * (0.1 - 0.001) / 200 + 0.001 for i in range(200)]:
            right = int(((first + beta2 * second + beta3 * third).argmax(1) == labels).sum())
            if right > best:
                best, chosen = right, (beta2, beta3)
    parts = [ck.Encoded(encoded.embedding[i : i + 25], encoded.tokens[i : i + 25]) for i in (0, 25, 50)]
    accuracy = head.fit(iter(parts) if batched else encoded, labels)
    assert accuracy == best / 60 and (head.beta2, head.beta3) == pytest.approx(chosen)
    assert int((head(encoded).argmax(1) == labels).sum()) == best


def test_the_search_counts_like_argmax_including_ties():
    generator = torch.Generator().manual_seed(0)
    base, first, second = (torch.randn(300, 7, generator=generator).mul(2).round() for _ in range(3))
    labels, us, vs = torch.randint(0, 7, (300,), generator=generator), spaced(0, 2, 8), spaced(-1, 3, 16)
    expected = [
        [int(((base + u * first + v * second).argmax(1) == labels).sum()) for v in vs.tolist()] for u in us.tolist()
    ]
    assert count_correct(base, first, second, labels, us, vs).tolist() == expected


def test_images_with_nan_logits_never_count_as_correct():
    base = torch.tensor([[float("nan"), 0.0], [1.0, 0.0]])
    none = torch.zeros_like(base)
    for place in range(3):
        parts = [base.clone() if at == place else torch.tensor([[1.0, 0.0]] * 2) * (at == 0) for at in range(3)]
        for wrong in (float("nan"), float("inf"), -float("inf")):
            parts[place][0, 1] = wrong
            assert search(*parts, torch.tensor([0, 0]), spaced(1, 2, 1), spaced(1, 2, 2)).accuracy == 0.5
    assert search(none, none, none, torch.tensor([0, 1]), spaced(0, 1, 1), spaced(0, 1, 1)).accuracy == 0.5


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), r"labels must be \(n,\) = \(6\) torch.int64, got \(5\) torch.int64"),
        (torch.zeros(6), "torch.float32"),
        (torch.full((6,), 5), "labels must be from 0 to 4, got 5 to 5"),
    ],
)
def test_invalid_labels_are_refused(labels, message):
    encoded, text = features()
    for head in (ck.CALIP(text), FewShotCALIP(text)):
        with pytest.raises(ValueError, match=message):
            head.fit(encoded, labels)


def test_features_without_patches_are_refused():
    encoded, text = features()
    for head in (ck.CALIP(text), FewShotCALIP(text)):
        for wrong in (encoded.embedding, encoded._replace(tokens=None)):
            with pytest.raises(ValueError, match="features must be an Encoded with tokens"):
                head(wrong)
        with pytest.raises(ValueError, match="at least one patch"):
            head(encoded._replace(tokens=encoded.tokens[:, :1]))


def test_fit_refuses_unusable_features():
    encoded, text = features()
    none = encoded._replace(embedding=encoded.embedding[:0], tokens=encoded.tokens[:0])
    labels = torch.zeros(6, dtype=torch.int64)
    for head, empty in ((ck.CALIP(text), none), (ck.CALIP(text), iter([])), (FewShotCALIP(text), none)):
        with pytest.raises(ValueError, match="features must be of at least one image, got none"):
            head.fit(empty, labels[:0])
    with pytest.raises(ValueError, match="batch_size must be an int of at least 1, got 0"):
        FewShotCALIP(text).fit(encoded, labels, epochs=1, batch_size=0)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"outside of torch\.inference_mode"):
        FewShotCALIP(text).fit(encoded, labels)
    with torch.no_grad():
        assert len(FewShotCALIP(text).fit(encoded, labels, epochs=2)) == 2


def test_numbers_that_are_not_finite_are_refused():
    text = torch.randn(3, 4)
    for make in (ck.CALIP, FewShotCALIP):
        for name in ("beta2", "beta3", "scale"):
            with pytest.raises(ValueError, match=f"{name} must be a finite number, got nan"):
                make(text, **{name: float("nan")})
        with pytest.raises(ValueError, match="alpha must be a positive number, got 0"):
            make(text, 0)


def test_tokens_of_other_images_are_refused():
    encoded, text = features()
    for head in (ck.CALIP(text), FewShotCALIP(text)):
        for tokens in (encoded.tokens[:1], encoded.tokens[..., :5], encoded.tokens[0]):
            with pytest.raises(ValueError, match=r"features must hold tokens \(B,N,E\) for an embedding"):
                head(encoded._replace(tokens=tokens))


def test_autocast_leaves_logits_unchanged():
    encoded, text = features(dtype=torch.float32)
    for head in (ck.CALIP(text), FewShotCALIP(text)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(encoded)
        assert logits.dtype == torch.float32 and torch.equal(logits, head(encoded))


@pytest.mark.parametrize(
    "kind", ["calip", "tip", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("few", "tipx"))]
)
def test_a_classifier_compiles_with_its_head(tiny, images, kind):
    torch._dynamo.reset()
    _, _, tokenizer = ck.bundled()
    support, labels = torch.randn(6, 128, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 2, 1, 0])
    tip = {"features": support, "labels": labels}
    heads = {
        "calip": ck.CALIP,
        "few": FewShotCALIP,
        "tip": partial(ck.TipAdapter, **tip),
        "tipx": partial(ck.TipX, **tip),
    }
    classifier = ck.Classifier(tiny, tokenizer, ["cat", "dog", "ship"], method=ck.EViT(0.7), head=heads[kind])
    compiled = torch.compile(classifier.__call__, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), classifier(images), atol=1e-3, rtol=1e-4)


def towers():
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 64}
    text = {"context_length": 16, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
    resnet = {"image_size": 32, "layers": [1] * 4, "width": 16, "patch_size": None}
    return {
        "open_clip": lambda: open_clip.CLIP(WIDTH, vision, text),
        "average": lambda: open_clip.CLIP(WIDTH, {**vision, "pool_type": "avg"}, text),
        "resnet": lambda: open_clip.CLIP(32, resnet, text),
        "timm": lambda: timm_tower("vit_base_patch16_siglip_224"),
        "registers": lambda: timm_tower("vit_small_patch14_reg4_dinov2", img_size=28),
        "transformers": lambda: transformers_tower("CLIPModel", image_size=32, patch_size=8),
        "openai": lambda: openai_tower(size=32, patch=8, width=64, out=WIDTH),
    }


@pytest.mark.parametrize("tower", ["open_clip", "average", "resnet", "timm", "registers", "transformers", "openai"])
def test_calip_reads_the_patches_of_every_library(tower):
    torch.manual_seed(0)
    library = {"openai": "clip", "registers": "timm"}.get(tower, tower)
    if library in ("clip", "timm", "transformers"):
        pytest.importorskip(library, reason=f"{library} is not installed, or not whole", exc_type=ImportError)
    model = towers()[tower]().eval()
    size = {"timm": 224, "registers": 28}.get(tower, 32)
    with torch.no_grad():
        encoded = ck.encode_image(model, torch.randn(2, 3, size, size), tokens=True)
        patches = {"timm": 196, "registers": 4, "resnet": 1}.get(tower, 16)
        assert encoded.tokens.shape[1] - encoded.prefix == patches
        text = torch.randn(CLASSES, encoded.embedding.shape[1])
        expected = literal(encoded, text, 0.5, 1.12, 0.02)
        torch.testing.assert_close(ck.CALIP(text)(encoded), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("method", [ck.EViT(0.7), ck.ToMe(2), ck.TCA(0.1)])
def test_a_classifier_reads_the_patches_that_a_method_leaves(tiny, images, method):
    _, _, tokenizer = ck.bundled()
    head = partial(ck.CALIP, beta2=0.5, beta3=0.05)
    with torch.no_grad():
        classifier = ck.Classifier(tiny, tokenizer, ["cat", "dog", "ship"], method=method, head=head)
        logits = classifier(images)
        encoded = ck.encode_image(tiny, images, tokens=True)
        assert encoded.tokens.shape[1] < 65
        expected = literal(encoded, classifier.head.zero_shot.text, 0.5, 0.5, 0.05)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4)


def test_untrained_few_shot_calip_equals_calip():
    encoded, text = features()
    torch.testing.assert_close(FewShotCALIP(text)(encoded), ck.CALIP(text)(encoded), atol=1e-10, rtol=1e-10)


def test_few_shot_calip_matches_its_formula_for_any_weights():
    encoded, text = features()
    head = FewShotCALIP(text, 0.8, 1.3, 0.6)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, 0.5)
    assert len(MAPS) == 8
    expected = literal(encoded, text, 0.8, 1.3, 0.6, head.state_dict())
    torch.testing.assert_close(head(encoded), expected, atol=1e-9, rtol=1e-9)


def test_training_improves_on_the_text_and_is_deterministic():
    encoded, text = features(40, dtype=torch.float32)
    labels = torch.arange(40) % CLASSES
    heads, epochs = [FewShotCALIP(text) for _ in range(2)], []
    settings = {"epochs": 30, "batch_size": 8, "lr": 1e-2, "seed": 3, "progress": lambda epoch, _: epochs.append(epoch)}
    losses = [head.fit(encoded, labels, **settings) for head in heads]
    assert losses[0] == losses[1] and epochs == [*range(1, 31)] * 2
    assert losses[0][-1] < 0.2 * losses[0][0]
    assert (heads[0](encoded).argmax(1) == labels).float().mean() > 0.95


def test_a_saved_head_loads_with_its_weights_and_numbers(tmp_path):
    encoded, text = features(dtype=torch.float32)
    head = FewShotCALIP(text, 0.7, 1.5, 0.3, scale=50.0)
    head.fit(encoded, torch.arange(6) % CLASSES, epochs=1)
    head.save(tmp_path / "head.safetensors")
    again = FewShotCALIP(text).load(tmp_path / "head.safetensors")
    assert torch.equal(again(encoded), head(encoded))


def test_other_files_are_refused_and_change_nothing(tmp_path):
    encoded, text = features(dtype=torch.float32)
    file, head = tmp_path / "head.safetensors", FewShotCALIP(text)
    before = head(encoded)
    FewShotCALIP(text.roll(1, 0)).save(file)
    with pytest.raises(ValueError, match="expected weights for the same classes, prompts and model"):
        head.load(file)
    FewShotCALIP(text).save(file)
    about, tensors = read(file)
    write(file, {**about, "format": "other"}, tensors)
    with pytest.raises(ValueError, match="with format 'other'"):
        head.load(file)
    write(file, {**about, "alpha": "nan"}, tensors)
    with pytest.raises(ValueError, match=r"Expected `float`, got `str` - at `\$.alpha`"):
        head.load(file)
    write(file, about, {**tensors, "maps.out_text.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"maps.out_text.bias of shape \(3\) instead of \(12\)"):
        head.load(file)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        head.load(tmp_path / "text")
    assert torch.equal(head(encoded), before)
