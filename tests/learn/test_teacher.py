"""Teacher: words and texts of every library, regions of dense and reduced towers, side effects, and refused models."""

import copy
from concurrent.futures import ThreadPoolExecutor

import open_clip
import pytest
import torch
from open_clip import tokenizer as open_clip_tokenizer
from torch import nn

import clipkernels as ck
from clipkernels.adapters import text, tokenizers
from clipkernels.fingerprint import fingerprint, same_probe, same_tower, weights_version
from clipkernels.learn.distill import Teacher, TeacherFeatures, align_words
from clipkernels.testing import openai_tower, patch_ranking, randomized, timm_tower
from tests.local_transformers import family_model

pytestmark = pytest.mark.usefixtures("one_thread")

VISION = {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "head_width": 32}
TEXT = {"context_length": 16, "vocab_size": 64, "width": 48, "heads": 2, "layers": 2}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "patch_size": 8}
TEXTS = ["a cat", "two dogs, asleep", "a cat", "", "a very long text that must be cut"]


class Letters:
    """A tokenizer of 64 ids, one per letter, with optional start, end and padding."""

    def __init__(self, start=62, end=63, padding=0, length=16):
        self.start, self.end, self.padding, self.length = start, end, padding, length
        self.texts = []

    def __call__(self, texts):
        self.texts += texts
        ids = torch.full((len(texts), self.length), self.padding)
        for row, sentence in zip(ids, texts, strict=True):
            around = [[mark] if mark is not None else [] for mark in (self.start, self.end)]
            letters = [2 + ord(letter) % 59 for letter in sentence][: self.length - sum(map(len, around))]
            sequence = around[0] + letters + around[1]
            row[: len(sequence)] = torch.tensor(sequence)
        return ids


def clip():
    return open_clip.CLIP(32, VISION, TEXT)


def custom():
    return open_clip.CustomTextCLIP(32, VISION, {**TEXT, "pool_type": "eos", "eos_id": 63})


def siglip():
    """open_clip's SigLIP text tower: no causal mask, pools the last token, projects with a bias."""
    pool = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    return open_clip.CustomTextCLIP(32, VISION, {**TEXT, **pool})


def coca(**vision):
    text_cfg = {**TEXT, "context_length": 15, "embed_cls": True, "output_tokens": True}
    multimodal = {"width": 48, "heads": 2, "layers": 1, "context_length": 15}
    return open_clip.CoCa(32, multimodal, text_cfg, {**VISION, "output_tokens": True, **vision})


def wrapped(pooler="mean_pooler", proj="linear"):
    """open_clip's CLIP with a wrapped text tower from transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = clip()
    custom = open_clip.CustomTextCLIP(32, VISION, TEXT)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.RobertaConfig(**sizes, vocab_size=64, pad_token_id=0, max_position_embeddings=32)
    custom.text = open_clip.hf_model.HFTextEncoder("none", 32, config, pooler, proj)
    custom.visual = model.visual
    return custom


def transformers_model(family):
    """A transformers model with 16 patches, the default text context and the default embedding width."""
    return family_model(family, 3, **SIZES)


def openai_model():
    pytest.importorskip("clip.model", reason="OpenAI's clip (openai-clip or clip-anytorch) is not installed")
    return openai_tower(layers=3, size=32, patch=8, width=64, out=32)


def last_output(module, call):
    """The last output of a module during a call."""
    outputs = []
    handle = module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    call()
    handle.remove()
    return outputs[-1] if isinstance(outputs[-1], torch.Tensor) else outputs[-1][0]


def words_of(norm, project):
    """The output of the final norm in the host's forward, projected."""
    return lambda model, ids, host: project(model)(last_output(norm(model), lambda: host(ids)))


def matrix_projection(holder):
    return lambda model: lambda x: x @ holder(model).text_projection


TOWERS = {
    "open_clip's CLIP": (clip, Letters(), words_of(lambda m: m.ln_final, matrix_projection(lambda m: m))),
    "CustomTextCLIP with eos pooling": (
        custom, Letters(), words_of(lambda m: m.text.ln_final, matrix_projection(lambda m: m.text)),
    ),
    "SigLIP of open_clip": (
        siglip, Letters(None, None, 1), words_of(lambda m: m.text.ln_final, lambda m: m.text.text_projection),
    ),
    "CoCa": (
        coca, Letters(length=15),
        lambda m, ids, host: m.text.ln_final(last_output(m.text.transformer, lambda: host(ids))[:, :-1])
        @ m.text.text_projection,
    ),
    "HFTextEncoder with mean pooling": (
        wrapped, Letters(), lambda m, ids, host: m.text.proj(last_output(m.text.transformer, lambda: host(ids))),
    ),
    "CLIP of transformers": (
        lambda: transformers_model("CLIPModel"), Letters(padding=63),
        words_of(lambda m: m.text_model.final_layer_norm, lambda m: m.text_projection),
    ),
    "SigLIP of transformers": (
        lambda: transformers_model("SiglipModel"), Letters(None, 1, 1),
        words_of(lambda m: m.text_model.final_layer_norm, lambda m: m.text_model.head),
    ),
    "SigLIP2": (
        lambda: transformers_model("Siglip2Model"), Letters(None, 1),
        words_of(lambda m: m.text_model.final_layer_norm, lambda m: m.text_model.head),
    ),
    "MetaCLIP2": (
        lambda: transformers_model("MetaClip2Model"), Letters(padding=1),
        words_of(lambda m: m.text_model.final_layer_norm, lambda m: m.text_projection),
    ),
    "AltCLIP": (
        lambda: transformers_model("AltCLIPModel"), Letters(),
        words_of(lambda m: m.text_model.transformation, lambda m: m.text_projection),
    ),
    "ChineseCLIP": (
        lambda: transformers_model("ChineseCLIPModel"), Letters(),
        words_of(lambda m: m.text_model.encoder, lambda m: m.text_projection),
    ),
    "OpenAI's": (openai_model, Letters(), words_of(lambda m: m.ln_final, matrix_projection(lambda m: m))),
}  # fmt: skip


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_words_and_texts_match_the_host(name):
    make, tokenizer, rows = TOWERS[name]
    model = randomized(make()).eval()
    features = Teacher(model, tokenizer)(texts=TEXTS)
    read = list(dict.fromkeys(TEXTS))  # each text once, as the teacher reads them
    rows_of_texts = [read.index(sentence) for sentence in TEXTS]
    ids = tokenizer(read)
    tower = text.find_text_tower(model)
    assert torch.equal(features.text, tower.host(ids)[rows_of_texts])
    expected = rows(model, ids, tower.host)[rows_of_texts]
    torch.testing.assert_close(features.words, expected, rtol=1e-5, atol=1e-5)
    assert features.image is features.regions is features.answers is features.regions_mask is None
    assert features.text.dtype == features.words.dtype == torch.float32
    letters = [min(len(sentence), tokenizer.length - sum(mark is not None for mark in (tokenizer.start, tokenizer.end)))
               for sentence in TEXTS]  # fmt: skip
    first = int(tokenizer.start is not None)
    expected = [[first <= place < first + count for place in range(tokenizer.length)] for count in letters]
    assert features.words_mask.tolist() == expected


@torch.no_grad()
def test_clip_pools_its_end_token():
    model = randomized(clip()).eval()
    features, ids = Teacher(model, Letters())(texts=TEXTS), Letters()(TEXTS)
    end = features.words[torch.arange(5), ids.argmax(1)]
    torch.testing.assert_close(end, features.text)


@pytest.mark.parametrize(
    ("empty", "some", "row", "words"),
    [
        ([8, 9, 0, 0, 0], [8, 3, 4, 9, 0], [8, 0, 0, 9, 0], [1, 2]),  # CLIP: its padding id is also a word's
        ([8, 9, 0, 0, 0], [8, 3, 4, 9, 0], [8, 3, 4, 5, 9], [1, 2, 3]),
        ([8, 9, 9, 9, 9], [8, 3, 4, 9, 9], [8, 3, 9, 9, 9], [1]),  # transformers' CLIP pads with the end
        (
            [1, 1, 1, 1, 1],
            [3, 4, 1, 1, 1],
            [3, 4, 5, 6, 7],
            [0, 1, 2, 3, 4],
        ),  # SigLIP pads with the end, and has no start
        ([1, 0, 0, 0, 0], [3, 4, 1, 0, 0], [3, 4, 5, 6, 1], [0, 1, 2, 3]),  # SigLIP2
        ([0, 2, 1, 1, 1], [0, 3, 4, 2, 1], [0, 3, 2, 1, 1], [1]),  # RoBERTa
        ([7, 0, 2, 1, 1], [7, 0, 3, 2, 1], [7, 0, 3, 4, 2], [2, 3]),  # a language before the start
        ([8, 9, 0, 0, 0], [8, 3, 4, 9, 0], [8, 9, 0, 0, 0], []),
    ],
)
def test_marks_and_padding_are_not_words(empty, some, row, words):
    marks = tokenizers.Marks.from_ids(torch.tensor([empty, some]))
    assert marks.words(torch.tensor([row, some]))[0].nonzero().flatten().tolist() == words


@pytest.mark.parametrize(
    ("empty", "some"),
    [
        ([0, 0, 0, 8, 9], [0, 0, 8, 3, 9]),  # a start and an end behind the padding
        ([9, 9, 9, 8, 9], [9, 9, 8, 3, 9]),  # padding and end have one id
        ([0, 0, 0, 0, 9], [0, 0, 0, 3, 9]),  # no start
        ([0, 0, 0, 0, 8], [0, 0, 0, 8, 3]),  # no end
        ([0, 0, 0, 0, 0], [0, 0, 0, 0, 3]),  # neither
        ([8, 9, 0, 0, 0], [8, 9, 0, 0, 0]),  # neither text has a word
        ([8, 9], [8, 9]),
        ([8, 3, 9, 4, 0], [8, 3, 9, 4, 0]),
    ],
)
def test_a_tokenizer_that_pads_on_the_left_is_refused(empty, some):
    with pytest.raises(ValueError, match=r"tokenizer must pad after a text, got ids .* padding_side to right"):
        tokenizers.Marks.from_ids(torch.tensor([empty, some]))


def test_a_tokenizer_with_inconsistent_marks_is_refused():
    with pytest.raises(
        ValueError, match=r"the same marks around each text, got 0 words in the empty text and .*1, 0.* in the"
    ):
        tokenizers.Marks.from_ids(torch.tensor([[8, 9, 0, 0, 0], [8, 3, 9, 0, 0], [8, 9, 0, 0, 0]]))


@torch.no_grad()
def test_images_texts_and_answers_match_the_models_embeddings(tiny, images):
    model, _, tokenizer = ck.bundled()
    teacher = Teacher(model, tokenizer)
    features = teacher(images, ["is it a cat", "is it red", "is it a cat"], ["yes", "no, not at all"])
    assert teacher.width == 128
    torch.testing.assert_close(features.image, tiny.encode_image(images), rtol=1e-5, atol=1e-5)
    assert torch.equal(features.text[0], features.text[2])
    for row, sentence in enumerate(["is it a cat", "is it red", "is it a cat"]):
        for column, answer in enumerate(["yes", "no, not at all"]):
            expected = tiny.encode_text(tokenizer([f"{sentence} {answer}"]))[0]
            torch.testing.assert_close(features.answers[row, column], expected, rtol=1e-5, atol=1e-5)
    first = teacher(texts=["a", "b"], answers=[["c", "d"], ["d", "c"]], words=False)
    swapped = teacher(texts=["b", "a"], answers=[["d", "c"], ["c", "d"]]).answers
    torch.testing.assert_close(first.answers, swapped.flip(0), rtol=1e-5, atol=1e-5)
    assert first.words is first.words_mask is None and first.answers.shape == (2, 2, 128)


@torch.no_grad()
def test_join_formats_texts_with_answers(tiny):
    tokenizer = ck.bundled()[2]
    expected = tiny.encode_text(tokenizer(["Q: {why}? A: yes {}"]))
    for join in ("Q: {}? A: {}", lambda one, other: f"Q: {one}? A: {other}"):
        features = Teacher(tiny, tokenizer, join=join)(texts=["{why}"], answers=["yes {}"]).answers
        torch.testing.assert_close(features[0], expected, rtol=1e-5, atol=1e-5)
    features = Teacher(tiny, tokenizer, join="{{why}} {}: {}")(texts=["is it red"], answers=["no"]).answers
    torch.testing.assert_close(features[0], tiny.encode_text(tokenizer(["{why} is it red: no"])), rtol=1e-5, atol=1e-5)
    for join in ("{}", "{} {} {name}", "{0} {1}", "{} {!r}", "{} {:>9}", "{} {} {", "{} {} {}"):
        with pytest.raises(
            ValueError, match=r"join must hold one \{\} for the text, one for the answer and no more"
        ) as e:
            Teacher(tiny, tokenizer, join=join)
        assert str(e.value).endswith(f"got {join!r}")


def test_each_distinct_text_is_encoded_once_in_batches(tiny, monkeypatch):
    from clipkernels.learn.distill import teacher as module

    tokenizer, batches = ck.bundled()[2], []
    teacher = Teacher(tiny, lambda texts: batches.append(list(texts)) or tokenizer(texts))
    batches.clear()
    teacher(texts=["a", "b", "a", "a"], answers=["c", "c", "d"])
    assert batches == [["a", "b"], ["a c", "a d", "b c", "b d"]]
    expected = teacher(texts=["a", "b", "c"])
    batches.clear()
    monkeypatch.setattr(module, "PROMPTS_PER_BATCH", 2)
    features = teacher(texts=["a", "b", "c"])
    assert batches == [["a", "b"], ["c"]]
    torch.testing.assert_close(features.words, expected.words, rtol=1e-5, atol=1e-5)


def test_texts_of_different_lengths_are_padded(monkeypatch):
    from clipkernels.learn.distill import teacher as module

    monkeypatch.setattr(module, "PROMPTS_PER_BATCH", 1)
    model = randomized(siglip())
    teacher = Teacher(model, lambda texts: Letters(None, None, 1, min(16, 1 + max(map(len, texts))))(texts))
    features = teacher(texts=["a cat", "a dog too"])
    assert features.words.shape == (2, 10, 32) and features.words_mask.sum(1).tolist() == [5, 9]
    assert not features.words[0, 6:].any() and features.words[0, :6].any(1).all()


@pytest.mark.parametrize("method", [None, ck.EViT(0.5), ck.ToMe(4), ck.TCA(0.1)])
def test_an_empty_batch_gives_empty_features_of_the_right_shapes(method, tiny, images):
    if method is not None:
        ck.patch(tiny, method)
    features = Teacher(tiny, ck.bundled()[2])(images[:0], [], ["yes", "no", "perhaps"])
    assert features.image.shape == features.text.shape == (0, 128) and features.answers.shape == (0, 3, 128)
    assert features.words.shape == features.regions.shape == (0, 64, 128) == (*features.words_mask.shape, 128)
    assert features.regions_mask is None if method is None else features.regions_mask.shape == (0, 64)
    with pytest.raises(ValueError, match=r"images must be \(B,3,32,32\), got"):
        Teacher(tiny, ck.bundled()[2])(images[:0, ..., :16])


def test_resnets_and_answers_allow_empty_batches(resnet, tiny):
    model = randomized(open_clip.create_model(resnet))
    teacher = Teacher(model, open_clip.get_tokenizer("ViT-B-32", context_length=16))
    assert teacher(torch.empty(0, 3, 32, 32)).regions.shape == (0, 1, 32)
    assert Teacher(tiny, ck.bundled()[2])(texts=[], answers=[]).answers.shape == (0, 0, 128)


REDUCED = {
    "EViT": lambda model: ck.EViT(0.5, fuse=False),
    "EViT with a fused token": lambda model: ck.EViT(0.5),
    "ToMe": lambda model: ck.ToMe(4),
    "TCA": lambda model: ck.TCA(0.1),
    "Patch Ranking": lambda model: patch_ranking(model, learnt=2),
}


@pytest.mark.parametrize("name", REDUCED)
@torch.no_grad()
def test_regions_of_a_reduced_teacher_follow_each_patch(name, tiny, images):
    ck.patch(tiny, REDUCED[name](tiny))
    features = Teacher(tiny, ck.bundled()[2])(images)
    encoded = ck.encode_image(tiny, images, tokens=True, source=True)
    source = encoded.source[:, -1]
    torch.testing.assert_close(features.image, encoded.embedding)
    assert features.regions.shape == (3, 64, 128) and torch.equal(features.regions_mask, source >= 0)
    for row in range(3):
        for patch in range(64):
            where = int(source[row, patch])
            expected = encoded.tokens[row, where] if where >= 0 else torch.zeros(128)
            torch.testing.assert_close(features.regions[row, patch], expected)
    removes = name in ("EViT", "Patch Ranking")
    assert features.regions_mask.all() == (not removes)
    if name == "ToMe":  # merged patches share one token
        assert all(len(regions.unique(dim=0)) == encoded.tokens.shape[1] - 1 for regions in features.regions)


@torch.no_grad()
def test_regions_of_a_dense_teacher_are_its_patches(tiny, images):
    expected = ck.encode_image(tiny, images, tokens=True).tokens[:, 1:]
    for model in (tiny, ck.patch(copy.deepcopy(tiny), ck.Dense())):
        features = Teacher(model, ck.bundled()[2])(images)
        torch.testing.assert_close(features.regions, expected, rtol=1e-5, atol=1e-5)
        assert features.regions_mask is None
    assert Teacher(tiny, ck.bundled()[2])(images, regions=False).regions is None


@torch.no_grad()
def test_registers_are_not_regions():
    pytest.importorskip("timm", reason="timm is not installed")
    model = clip()
    model.visual = timm_tower(
        "vit_base_patch14_reg4_dinov2", 3, embed_dim=64, num_heads=2, img_size=56, num_classes=32, global_pool="token"
    )
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    features = Teacher(randomized(model), Letters())(images)
    tokens = ck.encode_image(model, images, tokens=True).tokens
    assert tokens.shape[1] == 21 and torch.equal(features.regions, tokens[:, 5:])


@torch.no_grad()
def test_a_resnets_regions_are_the_positions_of_its_last_map(resnet):
    model = randomized(open_clip.create_model(resnet)).eval()
    images = torch.randn(2, 3, 64, 64)[..., :32, :32]
    features = Teacher(model, open_clip.get_tokenizer("ViT-B-32", context_length=16))(images, ["a cat", "a dog"])
    tokens = ck.encode_image(model, images, tokens=True).tokens
    torch.testing.assert_close(features.image, model.encode_image(images), rtol=1e-4, atol=1e-4)
    assert torch.equal(features.regions, tokens[:, 1:]) and features.regions_mask is None


@torch.no_grad()
def test_queries_are_not_regions():
    pooled = randomized(coca(attentional_pool=True, attn_pooler_heads=2)).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    teacher = Teacher(pooled, Letters(length=15))
    with pytest.raises(ck.UnsupportedTower, match=r"outputs its patches, got .* queries: pass regions=False"):
        teacher(images)
    features = teacher(images, regions=False)
    torch.testing.assert_close(features.image, pooled.encode_image(images, normalize=False), rtol=1e-5, atol=1e-5)
    plain = randomized(coca()).eval()
    assert Teacher(plain, Letters(length=15))(images).regions.shape == (2, 16, 32)


def test_the_model_is_left_unchanged(images):
    model, _, tokenizer = ck.bundled()
    model.train()
    model.visual.transformer.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [dict(vars(module)) for module in model.modules()]
    random = torch.get_rng_state()
    teacher = Teacher(model, tokenizer)
    features = teacher(images, ["a", "b", "c"], ["d"])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert not any(x is not None and x.requires_grad for x in features)


def test_a_student_with_a_teacher_trains_without_its_weights(tiny, images):
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher, self.layer = Teacher(tiny, ck.bundled()[2]), nn.Linear(128, 128)

    student = Student()
    assert list(student.state_dict()) == ["layer.weight", "layer.bias"] and len(list(student.parameters())) == 2
    features = student.teacher(images, ["a", "b", "c"])
    # Inference-mode tensors could not be saved for this backward.
    (student.layer(features.regions) * features.regions).sum().add(
        (student.layer(features.text) * features.text).sum()
    ).backward()
    assert student.layer.weight.grad.isfinite().all() and all(p.grad is None for p in tiny.parameters())


def test_a_teacher_runs_in_its_own_precision_under_autocast(tiny, images):
    teacher, texts = Teacher(tiny, ck.bundled()[2]), ["a", "b", "c"]
    expected = teacher(images, texts, ["d"])
    with torch.autocast("cpu", torch.bfloat16):
        features = teacher(images, texts, ["d"])
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(features, expected, strict=True))
        assert (tiny.ln_final.weight @ tiny.ln_final.weight).dtype == torch.bfloat16
    double = teacher(images.double())
    assert torch.equal(double.regions, expected.regions)
    half = Teacher(copy.deepcopy(tiny).bfloat16(), ck.bundled()[2])(images, texts)
    assert half.image.dtype == half.regions.dtype == half.words.dtype == half.text.dtype == torch.float32
    for one, other in ((half.image, expected.image), (half.text, expected.text)):
        assert 0.99 < torch.cosine_similarity(one, other).min() < 1


def test_threads_share_a_teacher(tiny, images):
    ck.patch(tiny, ck.EViT(0.5, fuse=False))
    teacher = Teacher(tiny, ck.bundled()[2])
    arguments = [(images[:1], ["a cat"]), (images[1:], ["a dog", "a hat"])] * 3
    expected = [teacher(*args) for args in arguments]
    with ThreadPoolExecutor(3) as pool:
        for features, expected_features in zip(pool.map(lambda args: teacher(*args), arguments), expected, strict=True):
            assert torch.equal(features.regions, expected_features.regions) and torch.equal(
                features.words, expected_features.words
            )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_models_without_a_text_tower_are_refused(tiny, images):
    with pytest.raises(ck.UnsupportedTower, match=r"a text tower of open_clip, .*, got VisionTransformer"):
        Teacher(tiny.visual, Letters())
    with pytest.raises(ck.UnsupportedTower, match=r"a text tower of .*, got \w+$"):
        Teacher(torch.jit.trace(tiny, (images, torch.zeros(3, 64).long()), check_trace=False), Letters())
    strange = clip()
    strange.text = nn.Linear(4, 4)
    with pytest.raises(ck.UnsupportedTower, match="got CLIP with Linear"):
        Teacher(strange, Letters())
    with pytest.raises(ck.UnsupportedTower, match="got CLIPVisionModel"):
        Teacher(transformers_model("CLIPVisionModel"), Letters())


def test_text_towers_with_unexpected_outputs_are_refused(tiny):
    class Scaled(open_clip.CLIP):
        def encode_text(self, text, normalize=False):
            return 1.1 * super().encode_text(text, normalize)

    class Gated(open_clip.CLIP):
        def forward_intermediates(self, *args, **options):
            out = super().forward_intermediates(*args, **options)
            return {**out, "text_intermediates": [1.1 * x for x in out["text_intermediates"]]}

    class Brief(open_clip.CLIP):
        def encode_text(self, text, normalize=False):
            return (1 + 0.1 * (text[:, 2:3] == 63)) * super().encode_text(text, normalize)  # of one letter

    off = r"the host's own text embedding, got a relative difference of 9\.1e-02"
    for kind, match in ((Scaled, off), (Brief, off), (Gated, "expected one of the tokens")):
        with pytest.raises(ck.UnsupportedTower, match=match):
            Teacher(randomized(kind(32, VISION, TEXT)), Letters())

    class Narrow(open_clip.CustomTextCLIP):
        def encode_text(self, text, normalize=False):
            return (1 + 0.1 * (text.shape[1] < 16)) * super().encode_text(text, normalize)

    def growing(texts):
        return Letters(None, None, 1, min(16, 3 + max(map(len, texts))))(texts)

    Teacher(siglip(), growing)
    model = randomized(Narrow(32, VISION, {**TEXT, "no_causal_mask": True, "pool_type": "last"}))
    Teacher(model, Letters(None, None, 1))
    with pytest.raises(ck.UnsupportedTower, match=off):
        Teacher(model, growing)
    with pytest.raises(ValueError, match="as many ids as the text tower reads, got 4: The size of tensor a"):
        Teacher(clip(), growing)


def test_inputs_that_do_not_fit_are_refused(tiny, images):
    teacher = Teacher(tiny, ck.bundled()[2])
    cases = {
        "expected images or texts, got neither": (),
        r"images must be \(B,3,S,S\), got a tensor \(3,32,32\)": (images[0],),
        r"images must be \(B,3,32,32\), got \(3,3,16,16\)": (images[..., :16, :16],),
        "texts must be a list of strings, got the string 'a cat'": (None, "a cat"),
        "one text for each image, got 3 images and 2 texts": (images, ["a", "b"]),
        "expected texts with the answers, got none": (images, None, ["yes"]),
        "answers must be a list of strings, or one list for each text, got 'yes'": (None, ["a"], "yes"),
        r"answers must be a list of strings, or one list for each text, got \[\]": (None, ["a"], []),
        "expected answers for 2 texts, got answers for 1": (None, ["a", "b"], [["yes"]]),
        r"expected 2 answers for each text, got \['yes'\]": (None, ["a", "b"], [["yes", "no"], ["yes"]]),
        r"images must be \(B,3,S,S\), got list": ([images[0]],),
        "texts must be a list of strings, got 3 at 1": (None, ["a", 3]),
        "texts must be a list of strings, got None at 0": (images, [None, "a", "b"]),
        "texts must be a list of strings, got 3$": (None, 3),
        "or one list for each text, got 1 at 0": (None, ["a", "b"], [1, 2]),
        "or one list for each text, got 2 at 1": (None, ["a", "b"], [["no"], 2]),
        "or one list for each text, got 'no' at 1": (None, ["a", "b"], [["no"], "no"]),
        "or one list for each text, got 5 at 1": (None, ["a", "b"], [["no", 5], ["yes", "no"]]),
        "or one list for each text, got 7$": (None, ["a"], 7),
        r"expected answers for each text, got \[\[\], \[\]\]": (None, ["a", "b"], [[], []]),
    }
    for match, arguments in cases.items():
        with pytest.raises(ValueError, match=match):
            teacher(*arguments)
    with pytest.raises(ValueError, match=r"tokenizer must return ids \(3,T\) for 3 texts, got list"):
        Teacher(tiny, lambda texts: [[1, 2]])
    narrow = clip()
    narrow.visual.proj = nn.Parameter(torch.randn(64, 16))
    narrow.visual.output_dim = 16
    with pytest.raises(ValueError, match="embeddings of one width, got 16 for images and 32 for texts"):
        Teacher(narrow, Letters())


def test_towers_method_and_tokenizer_identify_a_teacher(tiny):
    tokenizer = ck.bundled()[2]
    about = Teacher(tiny, tokenizer).about

    def same(model, tokenizer):
        other = Teacher(model, tokenizer).about
        towers = [same_tower(about[name], other[name]) for name in ("image tower", "text tower")]
        probe = "reading of a few texts"
        assert same_probe(about[probe], other[probe]) or tokenizer is not ck.bundled()[2]
        return [*towers, about["method"] == other["method"], about["tokenizer"] == other["tokenizer"]]

    assert same(ck.patch(copy.deepcopy(tiny), ck.Dense()), tokenizer) == [True] * 4
    assert same(copy.deepcopy(tiny).half(), tokenizer) == [True] * 4
    assert same(ck.patch(copy.deepcopy(tiny), ck.EViT(0.5)), tokenizer) == [True, True, False, True]
    assert same(tiny, lambda texts: tokenizer([sentence[::-1] for sentence in texts])) == [True, True, True, False]
    for place, weight in ((0, "visual.ln_post.bias"), (1, "ln_final.bias")):
        other = copy.deepcopy(tiny)
        with torch.no_grad():
            other.get_parameter(weight).add_(1e-3)
        assert same(other, tokenizer) == [place != 0, place != 1, True, True]


def test_the_text_fingerprint_excludes_scales_and_a_decoder():
    one = coca()
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.logit_scale.add_(1)
        for parameter in (*other.text_decoder.parameters(), *other.visual.parameters()):
            parameter.add_(1)
    assert fingerprint(one, "text") == fingerprint(other, "text") and fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize("weights", ["fresh", "random"])
def test_the_probe_detects_text_options_beside_the_weights(weights):
    def teacher(dtype=torch.float32, **options):
        torch.manual_seed(0)
        model = open_clip.CustomTextCLIP(32, VISION, {**TEXT, **options})
        return Teacher((randomized(model) if weights == "random" else model).to(dtype), Letters())

    def same(other):
        actual = other.about
        assert same_tower(about["text tower"], actual["text tower"])
        return same_probe(about["reading of a few texts"], actual["reading of a few texts"])

    about = teacher().about
    for option in ({"heads": 4}, {"heads": 1}, {"no_causal_mask": True}, {"pool_type": "last"}, {"pool_type": "first"}):
        assert not same(teacher(**option)), option
    assert same(teacher()) and same(teacher(torch.float16)) and same(teacher(torch.bfloat16))
    assert same(teacher(pool_type="eos", eos_id=63))  # another option for the same pooled row
    assert not same_probe([], about["reading of a few texts"])


def test_the_weights_version_changes_on_write_replace_and_move(tiny):
    versions = [weights_version(tiny)]
    assert weights_version(tiny) == versions[0]
    with torch.no_grad():
        tiny.ln_final.bias.add_(1)
    versions.append(weights_version(tiny))
    tiny.load_state_dict(tiny.state_dict())
    versions.append(weights_version(tiny))
    tiny.half()
    versions.append(weights_version(tiny))
    tiny.ln_final.bias = nn.Parameter(torch.zeros(128))
    assert len({*versions, weights_version(tiny)}) == 5
    with torch.inference_mode():
        frozen = copy.deepcopy(tiny)
    assert weights_version(frozen) == weights_version(frozen)


def words_tokenizer(**options):
    """A transformers tokenizer with 64 whole words."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "a", "cat", "sat", *map(str, range(57))])}
    vocabulary |= {"<s>": 62, "</s>": 63}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 62), ("</s>", 63)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", eos_token="</s>", **options
    )
    return tokenizer


def test_a_transformers_tokenizer_pads_to_the_towers_length():
    teacher = Teacher(randomized(transformers_model("CLIPModel")), words_tokenizer())
    features = teacher(texts=["a cat sat", "a"])
    assert features.words.shape == (2, 77, 512) and features.words_mask.sum(1).tolist() == [3, 1]
    assert teacher.pieces("a cat sat") == ["", "a", "cat", "sat", *[""] * 73]
    with torch.no_grad():
        ids = torch.tensor([[62, 2, 3, 4, 63], [62, 2, 63, 0, 0]])
        torch.testing.assert_close(features.text, teacher.reads.host(ids), rtol=1e-4, atol=1e-4)


def test_a_left_padding_transformers_tokenizer_works_and_is_unchanged():
    model, tokenizer = randomized(transformers_model("CLIPModel")), words_tokenizer(padding_side="left")
    before = tokenizer(["a cat", "a"], padding=True)["input_ids"]
    attributes = {name: repr(value) for name, value in vars(tokenizer).items() if name != "_tokenizer"}
    expected = Teacher(model, words_tokenizer())(texts=["a cat sat", "a"])
    features = Teacher(model, tokenizer)(texts=["a cat sat", "a"])
    assert torch.equal(features.words, expected.words) and torch.equal(features.words_mask, expected.words_mask)
    assert {name: repr(value) for name, value in vars(tokenizer).items() if name != "_tokenizer"} == attributes
    assert tokenizer.padding_side == "left" and tokenizer(["a cat", "a"], padding=True)["input_ids"] == before

    class Old:
        """A slow tokenizer whose padding side cannot be passed."""

        model_max_length, padding_side = 16, "left"

        def __call__(self, texts, padding, truncation, max_length, return_tensors):
            raise AssertionError

    with pytest.raises(ValueError, match="must pad after a text, got Old, which pads before it: set its padding_side"):
        Teacher(model, Old())


def test_pieces_align_with_words():
    model = open_clip.CLIP(32, VISION, {**TEXT, "vocab_size": 49408})
    teacher = Teacher(model, open_clip_tokenizer.SimpleTokenizer(context_length=16))
    pieces = teacher.pieces("A photograph of 2 malamutes!")
    assert pieces[:7] == ["", "a</w>", "photograph</w>", "of</w>", "2</w>", "mal", "am"]
    words = teacher(texts=["A photograph of 2 malamutes!"]).words_mask[0]
    assert [piece != "" for piece in pieces] == words.tolist()
    student = ["[CLS]", "a", "photo", "##graph", "of", "2", "mala", "##mutes", "!", "[SEP]"]
    assert align_words(student, pieces) == [-1, 1, 2, 2, 3, 4, 5, 7, 8, -1]
    with pytest.raises(ValueError, match="convert_ids_to_tokens or a decoder, got Letters"):
        Teacher(clip(), Letters()).pieces("a")


def test_features_align_to_a_students_tokens():
    words, regions = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    mask = torch.tensor([[False, True, True, False], [False, True, False, False]])
    features = TeacherFeatures(torch.randn(2, 8), torch.randn(2, 8), regions, words, None, mask)
    index = torch.tensor([[1, 1, -1, 3, 2], [0, 1, 2, 3, -1]])
    aligned = features.align(index, torch.tensor([2, -1]))
    assert aligned.words_mask.tolist() == [[True, True, False, False, True], [False, True, False, False, False]]
    for row in range(2):
        for place, where in enumerate(index[row].tolist()):
            assert torch.equal(aligned.words[row, place], words[row, where] if where >= 0 else torch.zeros(8))
    assert torch.equal(aligned.regions[:, 0], regions[:, 2]) and not aligned.regions[:, 1].any()
    assert aligned.regions_mask.tolist() == [[True, False]] * 2
    assert aligned.image is features.image and aligned.text is features.text
    assert features.align() == features
    assert features.align(torch.zeros(2, 0).long()).words.shape == (2, 0, 8)
    for wrong, match in {
        torch.tensor([4]): "words must be from -1 to 3, got 4 to 4",
        torch.tensor([-2, 0]): "words must be from -1 to 3, got -2 to 0",
        torch.zeros(3, 1).long(): r"words must be \(2,n\) or \(n,\) int64, got \(3, 1\)",
        torch.zeros(2): r"int64, got \(2,\) torch.float32",
    }.items():
        with pytest.raises(ValueError, match=match):
            features.align(wrong)
    none = features._replace(words=words[:, :0], words_mask=mask[:, :0]).align(torch.tensor([-1, -1]))
    assert none.words.shape == (2, 2, 8) and not none.words.any() and not none.words_mask.any()
    with pytest.raises(ValueError, match="words must be from -1 to -1, got 0 to 0"):
        none._replace(words=words[:, :0]).align(torch.tensor([0]))
    with pytest.raises(ValueError, match="expected features with regions, got none"):
        features._replace(regions=None).align(regions=torch.tensor([0]))


IMAGE_TOWERS = [
    "CLIP of transformers",
    "SigLIP of transformers",
    "SigLIP2",
    "AltCLIP",
    "ChineseCLIP",
    "OpenAI's",
    "HFTextEncoder with mean pooling",
]
EVIT, FUSED, TOME, TCA = ck.EViT(0.5, fuse=False), ck.EViT(0.5), ck.ToMe(4), ck.TCA(0.1)


@pytest.mark.parametrize(("name", "method"), [
    *((name, None) for name in IMAGE_TOWERS),
    *((name, TOME) for name in IMAGE_TOWERS),
    *(("SigLIP of transformers", method) for method in (EVIT, FUSED, TCA)),
    *(("SigLIP2", method) for method in (EVIT, FUSED, TCA)),
])  # fmt: skip
@torch.no_grad()
def test_images_and_texts_work_on_other_towers(name, method):
    make, tokenizer, _ = TOWERS[name]
    model = randomized(make()).eval()
    if method is not None:
        ck.patch(model, method)
    tower = ck.tower_of(model)
    images = torch.randn(2, 3, *tower.image_size, generator=torch.Generator().manual_seed(0))
    features = Teacher(model, tokenizer)(images, ["a cat", "a dog"], ["yes"])
    encoded = ck.encode_image(model, images, tokens=True, source=True)
    torch.testing.assert_close(features.image, encoded.embedding)
    if method is None:
        torch.testing.assert_close(features.image, tower.encode(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(features.regions, encoded.tokens[:, encoded.prefix :])
        assert features.regions_mask is None and features.regions.shape == (2, 16, features.answers.shape[-1])
        return
    assert encoded.tokens.shape[1] < 16 + encoded.prefix and encoded.prefix == ("SigLIP" not in name)
    for row in range(2):
        for patch, holder in enumerate(encoded.source[row, -1].tolist()):
            assert features.regions_mask[row, patch] == (holder >= 0)
            expected = encoded.tokens[row, holder] if holder >= 0 else torch.zeros_like(encoded.tokens[row, 0])
            torch.testing.assert_close(features.regions[row, patch], expected)
    assert features.regions_mask.all() == (method is not EVIT)
    assert len(encoded.source[:, -1].unique()) > 2


def test_openais_half_precision_weights_work():
    model = randomized(openai_model())
    from clip.model import convert_weights

    expected = Teacher(model, Letters())(torch.ones(1, 3, 32, 32), ["a cat"])
    convert_weights(model)
    features = Teacher(model, Letters())(torch.ones(1, 3, 32, 32), ["a cat"])
    for one, other in ((features.text, expected.text), (features.regions[0], expected.regions[0])):
        assert one.dtype == torch.float32 and torch.cosine_similarity(one, other).min() > 0.99
