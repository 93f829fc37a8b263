"""A frozen CLIP as a teacher: words and texts of every library, regions of dense and of reduced towers, what is left
alone, what is refused."""

import copy
from concurrent.futures import ThreadPoolExecutor

import open_clip
import pytest
import torch
from open_clip import tokenizer as open_clip_tokenizer
from torch import nn

import clipkernels as ck
from clipkernels.adapters import text
from clipkernels.identity import fingerprint, same_glance, same_tower, stamp
from clipkernels.learn.distill import Teacher, TeacherFeatures, align_words
from clipkernels.testing import openai_tower, patch_ranking, randomized, timm_tower

pytestmark = pytest.mark.usefixtures("one_thread")

VISION = {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "head_width": 32}
TEXT = {"context_length": 16, "vocab_size": 64, "width": 48, "heads": 2, "layers": 2}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
TEXTS = ["a cat", "two dogs, asleep", "a cat", "", "a very long text that must be cut"]


class Letters:
    """A tokenizer of 64 ids: a letter each, between a start, an end and padding where it has them."""

    def __init__(self, start=62, end=63, padding=0, length=16):
        self.start, self.end, self.padding, self.length = start, end, padding, length
        self.texts = []

    def __call__(self, texts):
        self.texts += texts
        ids = torch.full((len(texts), self.length), self.padding)
        for row, sentence in zip(ids, texts, strict=True):
            around = [[mark] if mark is not None else [] for mark in (self.start, self.end)]
            letters = [2 + ord(letter) % 59 for letter in sentence][: self.length - sum(map(len, around))]
            made = around[0] + letters + around[1]
            row[: len(made)] = torch.tensor(made)
        return ids


def clip():
    return open_clip.CLIP(32, VISION, TEXT)


def custom():
    return open_clip.CustomTextCLIP(32, VISION, {**TEXT, "pool_type": "eos", "eos_id": 63})


def siglip():
    """Sees all tokens, pools the last, projects with a bias."""
    pool = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    return open_clip.CustomTextCLIP(32, VISION, {**TEXT, **pool})


def coca(**vision):
    text_cfg = {**TEXT, "context_length": 15, "embed_cls": True, "output_tokens": True}
    multimodal = {"width": 48, "heads": 2, "layers": 1, "context_length": 15}
    return open_clip.CoCa(32, multimodal, text_cfg, {**VISION, "output_tokens": True, **vision})


def wrapped(pooler="mean_pooler", proj="linear"):
    """A text tower of transformers as open_clip wraps it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = clip()
    custom = open_clip.CustomTextCLIP(32, VISION, TEXT)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.RobertaConfig(**sizes, vocab_size=64, pad_token_id=0, max_position_embeddings=32)
    custom.text = open_clip.hf_model.HFTextEncoder("none", 32, config, pooler, proj)
    custom.visual = model.visual
    return custom


def of_transformers(family):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not hasattr(transformers, family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    maker = getattr(transformers, family)
    vision = {**SIZES, "num_hidden_layers": 3}
    if "Siglip2" in family:
        vision = {**vision, "num_patches": 16}
        del vision["image_size"]
    width = 64 if "Siglip" in family else 48
    words = {"hidden_size": width, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    words |= {"vocab_size": 64, "max_position_embeddings": 32 if family == "AltCLIPModel" else 16, "project_dim": 48}
    words |= {"bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 0, "projection_size": 64}
    model = maker(maker.config_class(vision_config=vision, text_config=words, projection_dim=32))
    if family in ("AltCLIPModel", "ChineseCLIPModel"):
        try:
            model.get_text_features(input_ids=torch.ones(1, 4, dtype=torch.int64))
        except TypeError as error:  # such as 4.57, whose ChineseCLIP projects a pooled row that it does not have
            pytest.skip(f"{family}.get_text_features of transformers {transformers.__version__} is broken: {error}")
    return model


def of_openai():
    pytest.importorskip("clip.model", reason="OpenAI's clip (openai-clip or clip-anytorch) is not installed")
    return openai_tower(layers=3, size=32, patch=8, width=64, out=32)


def captured(module, call):
    """What a module gives while something is called."""
    seen = []
    handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    call()
    handle.remove()
    return seen[-1] if isinstance(seen[-1], torch.Tensor) else seen[-1][0]


def words_of(norm, project):
    """What the host's own forward leaves in its final norm, projected."""
    return lambda model, ids, host: project(model)(captured(norm(model), lambda: host(ids)))


def by_matrix(holder):
    return lambda model: lambda x: x @ holder(model).text_projection


TOWERS = {
    "open_clip's CLIP": (clip, Letters(), words_of(lambda m: m.ln_final, by_matrix(lambda m: m))),
    "pools its end": (custom, Letters(), words_of(lambda m: m.text.ln_final, by_matrix(lambda m: m.text))),
    "SigLIP of open_clip": (
        siglip, Letters(None, None, 1), words_of(lambda m: m.text.ln_final, lambda m: m.text.text_projection),
    ),
    "CoCa": (
        coca, Letters(length=15),
        lambda m, ids, host: m.text.ln_final(captured(m.text.transformer, lambda: host(ids))[:, :-1])
        @ m.text.text_projection,
    ),
    "averages": (
        wrapped, Letters(), lambda m, ids, host: m.text.proj(captured(m.text.transformer, lambda: host(ids))),
    ),
    "CLIP of transformers": (
        lambda: of_transformers("CLIPModel"), Letters(padding=63),
        words_of(lambda m: m.text_model.final_layer_norm, lambda m: m.text_projection),
    ),
    "SigLIP of transformers": (
        lambda: of_transformers("SiglipModel"), Letters(None, 1, 1),
        words_of(lambda m: m.text_model.final_layer_norm, lambda m: m.text_model.head),
    ),
    "SigLIP2": (
        lambda: of_transformers("Siglip2Model"), Letters(None, 1),
        words_of(lambda m: m.text_model.final_layer_norm, lambda m: m.text_model.head),
    ),
    "MetaCLIP2": (
        lambda: of_transformers("MetaClip2Model"), Letters(padding=1),
        words_of(lambda m: m.text_model.final_layer_norm, lambda m: m.text_projection),
    ),
    "AltCLIP": (
        lambda: of_transformers("AltCLIPModel"), Letters(),
        words_of(lambda m: m.text_model.transformation, lambda m: m.text_projection),
    ),
    "ChineseCLIP": (
        lambda: of_transformers("ChineseCLIPModel"), Letters(),
        words_of(lambda m: m.text_model.encoder, lambda m: m.text_projection),
    ),
    "OpenAI's": (of_openai, Letters(), words_of(lambda m: m.ln_final, by_matrix(lambda m: m))),
}  # fmt: skip


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_words_and_texts_are_the_hosts_own(name):
    make, tokenizer, rows = TOWERS[name]
    model = randomized(make()).eval()
    came = Teacher(model, tokenizer)(texts=TEXTS)
    read = list(dict.fromkeys(TEXTS))  # each text once, as the teacher reads them
    again = [read.index(sentence) for sentence in TEXTS]
    ids = tokenizer(read)
    tower = text.find(model)
    assert torch.equal(came.text, tower.host(ids)[again])
    torch.testing.assert_close(came.words, rows(model, ids, tower.host)[again], rtol=1e-5, atol=1e-5)
    assert came.image is came.regions is came.answers is came.regions_mask is None
    assert came.text.dtype == came.words.dtype == torch.float32
    letters = [min(len(sentence), tokenizer.length - sum(mark is not None for mark in (tokenizer.start, tokenizer.end)))
               for sentence in TEXTS]  # fmt: skip
    first = int(tokenizer.start is not None)
    expected = [[first <= place < first + count for place in range(tokenizer.length)] for count in letters]
    assert came.words_mask.tolist() == expected


@torch.no_grad()
def test_the_word_that_a_clip_pools_is_its_end():
    model = randomized(clip()).eval()
    came, ids = Teacher(model, Letters())(texts=TEXTS), Letters()(TEXTS)
    end = came.words[torch.arange(5), ids.argmax(1)]
    torch.testing.assert_close(end, came.text)


@pytest.mark.parametrize(
    ("empty", "some", "row", "words"),
    [
        ([8, 9, 0, 0, 0], [8, 3, 4, 9, 0], [8, 0, 0, 9, 0], [1, 2]),  # CLIP: its padding is a word too
        ([8, 9, 0, 0, 0], [8, 3, 4, 9, 0], [8, 3, 4, 5, 9], [1, 2, 3]),
        ([8, 9, 9, 9, 9], [8, 3, 4, 9, 9], [8, 3, 9, 9, 9], [1]),  # transformers' CLIP pads with the end
        ([1, 1, 1, 1, 1], [3, 4, 1, 1, 1], [3, 4, 5, 6, 7], [0, 1, 2, 3, 4]),  # SigLIP likewise, and has no start
        ([1, 0, 0, 0, 0], [3, 4, 1, 0, 0], [3, 4, 5, 6, 1], [0, 1, 2, 3]),  # SigLIP2
        ([0, 2, 1, 1, 1], [0, 3, 4, 2, 1], [0, 3, 2, 1, 1], [1]),  # RoBERTa
        ([7, 0, 2, 1, 1], [7, 0, 3, 2, 1], [7, 0, 3, 4, 2], [2, 3]),  # a language before the start
        ([8, 9, 0, 0, 0], [8, 3, 4, 9, 0], [8, 9, 0, 0, 0], []),
    ],
)
def test_marks_and_padding_are_no_words(empty, some, row, words):
    marks = text.Marks.of(torch.tensor([empty, some]))
    assert marks.words(torch.tensor([row, some]))[0].nonzero().flatten().tolist() == words


@pytest.mark.parametrize(
    ("empty", "some"),
    [
        ([0, 0, 0, 8, 9], [0, 0, 8, 3, 9]),  # a start and an end behind the padding
        ([9, 9, 9, 8, 9], [9, 9, 8, 3, 9]),  # which is the end again
        ([0, 0, 0, 0, 9], [0, 0, 0, 3, 9]),  # no start
        ([0, 0, 0, 0, 8], [0, 0, 0, 8, 3]),  # no end
        ([0, 0, 0, 0, 0], [0, 0, 0, 0, 3]),  # neither
        ([8, 9, 0, 0, 0], [8, 9, 0, 0, 0]),  # no text has any word
        ([8, 9], [8, 9]),
        ([8, 3, 9, 4, 0], [8, 3, 9, 4, 0]),
    ],
)
def test_a_tokenizer_that_pads_before_a_text_is_refused(empty, some):
    with pytest.raises(
        ValueError, match=r"tokenizer must put its padding behind a text, got ids .* padding_side to right"
    ):
        text.Marks.of(torch.tensor([empty, some]))


def test_a_tokenizer_with_other_marks_for_some_texts_is_refused():
    with pytest.raises(
        ValueError, match=r"the same marks around each text, got 0 words of no text and .*1, 0.* of some"
    ):
        text.Marks.of(torch.tensor([[8, 9, 0, 0, 0], [8, 3, 9, 0, 0], [8, 9, 0, 0, 0]]))


@torch.no_grad()
def test_images_texts_and_answers_are_what_the_model_embeds(tiny, images):
    model, _, tokenizer = ck.bundled()
    teacher = Teacher(model, tokenizer)
    came = teacher(images, ["is it a cat", "is it red", "is it a cat"], ["yes", "no, not at all"])
    assert teacher.width == 128
    torch.testing.assert_close(came.image, tiny.encode_image(images), rtol=1e-5, atol=1e-5)
    assert torch.equal(came.text[0], came.text[2])
    for row, sentence in enumerate(["is it a cat", "is it red", "is it a cat"]):
        for column, answer in enumerate(["yes", "no, not at all"]):
            expected = tiny.encode_text(tokenizer([f"{sentence} {answer}"]))[0]
            torch.testing.assert_close(came.answers[row, column], expected, rtol=1e-5, atol=1e-5)
    own = teacher(texts=["a", "b"], answers=[["c", "d"], ["d", "c"]], words=False)
    swapped = teacher(texts=["b", "a"], answers=[["d", "c"], ["c", "d"]]).answers
    torch.testing.assert_close(own.answers, swapped.flip(0), rtol=1e-5, atol=1e-5)
    assert own.words is own.words_mask is None and own.answers.shape == (2, 2, 128)


@torch.no_grad()
def test_answers_are_joined_as_told(tiny):
    tokenizer = ck.bundled()[2]
    expected = tiny.encode_text(tokenizer(["Q: {why}? A: yes {}"]))
    for join in ("Q: {}? A: {}", lambda one, other: f"Q: {one}? A: {other}"):
        came = Teacher(tiny, tokenizer, join=join)(texts=["{why}"], answers=["yes {}"]).answers
        torch.testing.assert_close(came[0], expected, rtol=1e-5, atol=1e-5)
    kept = Teacher(tiny, tokenizer, join="{{why}} {}: {}")(texts=["is it red"], answers=["no"]).answers
    torch.testing.assert_close(kept[0], tiny.encode_text(tokenizer(["{why} is it red: no"])), rtol=1e-5, atol=1e-5)
    for join in ("{}", "{} {} {name}", "{0} {1}", "{} {!r}", "{} {:>9}", "{} {} {", "{} {} {}"):
        with pytest.raises(
            ValueError, match=r"join must hold \{\} for the text and for the answer, and no other field"
        ) as e:
            Teacher(tiny, tokenizer, join=join)
        assert str(e.value).endswith(f'got "{join}"')


def test_each_text_is_read_once_and_many_in_parts(tiny, monkeypatch):
    from clipkernels.learn.distill import teacher as module

    tokenizer, read = ck.bundled()[2], []
    teacher = Teacher(tiny, lambda texts: read.append(list(texts)) or tokenizer(texts))
    read.clear()
    teacher(texts=["a", "b", "a", "a"], answers=["c", "c", "d"])
    assert read == [["a", "b"], ["a c", "a d", "b c", "b d"]]
    expected = teacher(texts=["a", "b", "c"])
    read.clear()
    monkeypatch.setattr(module, "PROMPTS_PER_BATCH", 2)
    came = teacher(texts=["a", "b", "c"])
    assert read == [["a", "b"], ["c"]]
    torch.testing.assert_close(came.words, expected.words, rtol=1e-5, atol=1e-5)


def test_texts_of_different_lengths_are_filled_up(monkeypatch):
    from clipkernels.learn.distill import teacher as module

    monkeypatch.setattr(module, "PROMPTS_PER_BATCH", 1)
    model = randomized(siglip())
    teacher = Teacher(model, lambda texts: Letters(None, None, 1, min(16, 1 + max(map(len, texts))))(texts))
    came = teacher(texts=["a cat", "a dog too"])
    assert came.words.shape == (2, 10, 32) and came.words_mask.sum(1).tolist() == [5, 9]
    assert not came.words[0, 6:].any() and came.words[0, :6].any(1).all()


@pytest.mark.parametrize("method", [None, ck.EViT(0.5), ck.ToMe(4), ck.TCA(0.1)])
def test_an_empty_batch_gives_nothing_of_the_right_shapes(method, tiny, images):
    if method is not None:
        ck.patch(tiny, method)
    came = Teacher(tiny, ck.bundled()[2])(images[:0], [], ["yes", "no", "perhaps"])
    assert came.image.shape == came.text.shape == (0, 128) and came.answers.shape == (0, 3, 128)
    assert came.words.shape == came.regions.shape == (0, 64, 128) == (*came.words_mask.shape, 128)
    assert came.regions_mask is None if method is None else came.regions_mask.shape == (0, 64)
    with pytest.raises(ValueError, match=r"images must be \(B,3,32,32\), got"):
        Teacher(tiny, ck.bundled()[2])(images[:0, ..., :16])


def test_an_empty_batch_of_a_resnet_and_of_no_answers(resnet, tiny):
    model = randomized(open_clip.create_model(resnet))
    teacher = Teacher(model, open_clip.get_tokenizer("ViT-B-32", context_length=16))
    assert teacher(torch.empty(0, 3, 32, 32)).regions.shape == (0, 1, 32)
    assert Teacher(tiny, ck.bundled()[2])(texts=[], answers=[]).answers.shape == (0, 0, 128)


REDUCED = {
    "EViT": lambda model: ck.EViT(0.5, fuse=False),
    "EViT, what is gone in one token": lambda model: ck.EViT(0.5),
    "ToMe": lambda model: ck.ToMe(4),
    "TCA": lambda model: ck.TCA(0.1),
    "Patch Ranking": lambda model: patch_ranking(model, learnt=2),
}


@pytest.mark.parametrize("name", REDUCED)
@torch.no_grad()
def test_regions_of_a_reduced_teacher_are_what_is_left_of_each_patch(name, tiny, images):
    ck.patch(tiny, REDUCED[name](tiny))
    came = Teacher(tiny, ck.bundled()[2])(images)
    encoded = ck.encode_image(tiny, images, tokens=True, source=True)
    source = encoded.source[:, -1]
    torch.testing.assert_close(came.image, encoded.embedding)
    assert came.regions.shape == (3, 64, 128) and torch.equal(came.regions_mask, source >= 0)
    for row in range(3):
        for patch in range(64):
            where = int(source[row, patch])
            expected = encoded.tokens[row, where] if where >= 0 else torch.zeros(128)
            torch.testing.assert_close(came.regions[row, patch], expected)
    gone = name in ("EViT", "Patch Ranking")
    assert came.regions_mask.all() == (not gone)
    if name == "ToMe":  # merged patches are one token, repeated
        assert all(len(regions.unique(dim=0)) == encoded.tokens.shape[1] - 1 for regions in came.regions)


@torch.no_grad()
def test_regions_of_a_dense_teacher_are_its_patches(tiny, images):
    expected = ck.encode_image(tiny, images, tokens=True).tokens[:, 1:]
    for model in (tiny, ck.patch(copy.deepcopy(tiny), ck.Dense())):
        came = Teacher(model, ck.bundled()[2])(images)
        torch.testing.assert_close(came.regions, expected, rtol=1e-5, atol=1e-5)
        assert came.regions_mask is None
    assert Teacher(tiny, ck.bundled()[2])(images, regions=False).regions is None


@torch.no_grad()
def test_registers_are_no_regions():
    pytest.importorskip("timm", reason="timm is not installed")
    model = clip()
    model.visual = timm_tower(
        "vit_base_patch14_reg4_dinov2", 3, embed_dim=64, num_heads=2, img_size=56, num_classes=32, global_pool="token"
    )
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    came = Teacher(randomized(model), Letters())(images)
    tokens = ck.encode_image(model, images, tokens=True).tokens
    assert tokens.shape[1] == 21 and torch.equal(came.regions, tokens[:, 5:])


@torch.no_grad()
def test_a_resnets_regions_are_the_positions_of_its_last_map(resnet):
    model = randomized(open_clip.create_model(resnet)).eval()
    images = torch.randn(2, 3, 64, 64)[..., :32, :32]
    came = Teacher(model, open_clip.get_tokenizer("ViT-B-32", context_length=16))(images, ["a cat", "a dog"])
    tokens = ck.encode_image(model, images, tokens=True).tokens
    torch.testing.assert_close(came.image, model.encode_image(images), rtol=1e-4, atol=1e-4)
    assert torch.equal(came.regions, tokens[:, 1:]) and came.regions_mask is None


@torch.no_grad()
def test_queries_are_no_regions():
    pooled = randomized(coca(attentional_pool=True, attn_pooler_heads=2)).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    teacher = Teacher(pooled, Letters(length=15))
    with pytest.raises(ck.UnsupportedTower, match=r"patches can be told apart, got .* queries: regions=False"):
        teacher(images)
    came = teacher(images, regions=False)
    torch.testing.assert_close(came.image, pooled.encode_image(images, normalize=False), rtol=1e-5, atol=1e-5)
    plain = randomized(coca()).eval()
    assert Teacher(plain, Letters(length=15))(images).regions.shape == (2, 16, 32)


def test_nothing_of_the_model_is_touched(images):
    model, _, tokenizer = ck.bundled()
    model.train()
    model.visual.transformer.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    held = [dict(vars(module)) for module in model.modules()]
    random = torch.get_rng_state()
    teacher = Teacher(model, tokenizer)
    came = teacher(images, ["a", "b", "c"], ["d"])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert [dict(vars(module)) for module in model.modules()] == held
    assert not any(x is not None and x.requires_grad for x in came)


def test_a_student_that_holds_a_teacher_has_none_of_its_weights_and_learns_beside_it(tiny, images):
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher, self.layer = Teacher(tiny, ck.bundled()[2]), nn.Linear(128, 128)

    student = Student()
    assert list(student.state_dict()) == ["layer.weight", "layer.bias"] and len(list(student.parameters())) == 2
    came = student.teacher(images, ["a", "b", "c"])
    # Tensors of inference mode could not be saved for this.
    (student.layer(came.regions) * came.regions).sum().add((student.layer(came.text) * came.text).sum()).backward()
    assert student.layer.weight.grad.isfinite().all() and all(p.grad is None for p in tiny.parameters())


def test_a_teacher_has_its_own_precision_whatever_the_student_has(tiny, images):
    teacher, texts = Teacher(tiny, ck.bundled()[2]), ["a", "b", "c"]
    expected = teacher(images, texts, ["d"])
    with torch.autocast("cpu", torch.bfloat16):
        came = teacher(images, texts, ["d"])
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(came, expected, strict=True))
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
    asked = [(images[:1], ["a cat"]), (images[1:], ["a dog", "a hat"])] * 3
    expected = [teacher(*each) for each in asked]
    with ThreadPoolExecutor(3) as pool:
        for came, own in zip(pool.map(lambda each: teacher(*each), asked), expected, strict=True):
            assert torch.equal(came.regions, own.regions) and torch.equal(came.words, own.words)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_what_has_no_text_tower_is_refused(tiny, images):
    with pytest.raises(ck.UnsupportedTower, match=r"a text tower of open_clip, .*, got VisionTransformer"):
        Teacher(tiny.visual, Letters())
    with pytest.raises(ck.UnsupportedTower, match=r"a text tower of .*, got \w+$"):
        Teacher(torch.jit.trace(tiny, (images, torch.zeros(3, 64).long()), check_trace=False), Letters())
    strange = clip()
    strange.text = nn.Linear(4, 4)
    with pytest.raises(ck.UnsupportedTower, match="got CLIP with Linear"):
        Teacher(strange, Letters())
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES, num_hidden_layers=1))
    with pytest.raises(ck.UnsupportedTower, match="got CLIPVisionModel"):
        Teacher(vision, Letters())


def test_a_text_tower_that_does_something_else_than_expected_is_refused(tiny):
    class Scaled(open_clip.CLIP):
        def encode_text(self, text, normalize=False):
            return 1.1 * super().encode_text(text, normalize)

    class Gated(open_clip.CLIP):
        def forward_intermediates(self, *args, **options):
            out = super().forward_intermediates(*args, **options)
            return {**out, "text_intermediates": [1.1 * each for each in out["text_intermediates"]]}

    class Brief(open_clip.CLIP):
        def encode_text(self, text, normalize=False):
            return (1 + 0.1 * (text[:, 2:3] == 63)) * super().encode_text(text, normalize)  # of one letter

    off = r"the host's own text embedding, got one that is off by 9\.1e-02"
    for kind, match in ((Scaled, off), (Brief, off), (Gated, "none that")):
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


def test_what_does_not_fit_is_an_error(tiny, images):
    teacher = Teacher(tiny, ck.bundled()[2])
    wrong = {
        "expected images or texts, got neither": (),
        r"images must be \(B,3,S,S\), got \(3, 32, 32\)": (images[0],),
        r"images must be \(B,3,32,32\), got \(3,3,16,16\)": (images[..., :16, :16],),
        "texts must be a list of strings, got the string 'a cat'": (None, "a cat"),
        "one text for each image, got 3 images and 2 texts": (images, ["a", "b"]),
        "expected texts with the answers, got none": (images, None, ["yes"]),
        "answers must be a list of strings, or one for each text, got 'yes'": (None, ["a"], "yes"),
        r"answers must be a list of strings, or one for each text, got \[\]": (None, ["a"], []),
        "expected answers for 2 texts, got them for 1": (None, ["a", "b"], [["yes"]]),
        r"expected 2 answers for each text, got \['yes'\]": (None, ["a", "b"], [["yes", "no"], ["yes"]]),
        r"images must be \(B,3,S,S\), got list": ([images[0]],),
        "texts must be a list of strings, got 3 at 1": (None, ["a", 3]),
        "texts must be a list of strings, got None at 0": (images, [None, "a", "b"]),
        "texts must be a list of strings, got 3$": (None, 3),
        "or one for each text, got 1 at 0": (None, ["a", "b"], [1, 2]),
        "or one for each text, got 2 at 1": (None, ["a", "b"], [["no"], 2]),
        "or one for each text, got 'no' at 1": (None, ["a", "b"], [["no"], "no"]),
        "or one for each text, got 5 at 1": (None, ["a", "b"], [["no", 5], ["yes", "no"]]),
        "or one for each text, got 7$": (None, ["a"], 7),
        r"expected answers for each text, got \[\[\], \[\]\]": (None, ["a", "b"], [[], []]),
    }
    for match, arguments in wrong.items():
        with pytest.raises(ValueError, match=match):
            teacher(*arguments)
    with pytest.raises(ValueError, match=r"tokenizer must give ids \(3,T\) of 3 texts, got list"):
        Teacher(tiny, lambda texts: [[1, 2]])
    narrow = clip()
    narrow.visual.proj = nn.Parameter(torch.randn(64, 16))
    narrow.visual.output_dim = 16
    with pytest.raises(ValueError, match="embeddings of one width, got 16 of images and 32 of texts"):
        Teacher(narrow, Letters())


def test_either_tower_the_method_and_the_tokenizer_tell_teachers_apart(tiny):
    tokenizer = ck.bundled()[2]
    about = Teacher(tiny, tokenizer).about

    def same(model, tokenizer):
        other = Teacher(model, tokenizer).about
        towers = [same_tower(about[name], other[name]) for name in ("image tower", "text tower")]
        read = "reading of a few texts"
        assert same_glance(about[read], other[read]) or tokenizer is not ck.bundled()[2]
        return [*towers, about["method"] == other["method"], about["tokenizer"] == other["tokenizer"]]

    assert same(ck.patch(copy.deepcopy(tiny), ck.Dense()), tokenizer) == [True] * 4
    assert same(copy.deepcopy(tiny).half(), tokenizer) == [True] * 4
    assert same(ck.patch(copy.deepcopy(tiny), ck.EViT(0.5)), tokenizer) == [True, True, False, True]
    assert same(tiny, lambda texts: tokenizer([each[::-1] for each in texts])) == [True, True, True, False]
    for place, weight in ((0, "visual.ln_post.bias"), (1, "ln_final.bias")):
        other = copy.deepcopy(tiny)
        with torch.no_grad():
            other.get_parameter(weight).add_(1e-3)
        assert same(other, tokenizer) == [place != 0, place != 1, True, True]


def test_the_text_towers_fingerprint_leaves_out_scales_and_a_decoder():
    one = coca()
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.logit_scale.add_(1)
        for parameter in (*other.text_decoder.parameters(), *other.visual.parameters()):
            parameter.add_(1)
    assert fingerprint(one, "text") == fingerprint(other, "text") and fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize("weights", ["fresh", "random"])
def test_what_a_text_tower_does_beside_its_weights_tells_it_apart(weights):
    def made(dtype=torch.float32, **options):
        torch.manual_seed(0)
        model = open_clip.CustomTextCLIP(32, VISION, {**TEXT, **options})
        return Teacher((randomized(model) if weights == "random" else model).to(dtype), Letters())

    def same(other):
        found = other.about
        assert same_tower(about["text tower"], found["text tower"])
        return same_glance(about["reading of a few texts"], found["reading of a few texts"])

    about = made().about
    for option in ({"heads": 4}, {"heads": 1}, {"no_causal_mask": True}, {"pool_type": "last"}, {"pool_type": "first"}):
        assert not same(made(**option)), option
    assert same(made()) and same(made(torch.float16)) and same(made(torch.bfloat16))
    assert same(made(pool_type="eos", eos_id=63))  # another way to say where the end is
    assert not same_glance([], about["reading of a few texts"])


def test_a_stamp_tells_when_weights_were_written_replaced_or_moved(tiny):
    seen = [stamp(tiny)]
    assert stamp(tiny) == seen[0]
    with torch.no_grad():
        tiny.ln_final.bias.add_(1)
    seen.append(stamp(tiny))
    tiny.load_state_dict(tiny.state_dict())
    seen.append(stamp(tiny))
    tiny.half()
    seen.append(stamp(tiny))
    tiny.ln_final.bias = nn.Parameter(torch.zeros(128))
    assert len({*seen, stamp(tiny)}) == 5
    with torch.inference_mode():
        frozen = copy.deepcopy(tiny)
    assert stamp(frozen) == stamp(frozen)


def words_tokenizer(**options):
    """One of transformers', of 64 whole words."""
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


def test_a_tokenizer_of_transformers_is_padded_to_the_towers_length():
    teacher = Teacher(randomized(of_transformers("CLIPModel")), words_tokenizer())
    came = teacher(texts=["a cat sat", "a"])
    assert came.words.shape == (2, 16, 32) and came.words_mask.sum(1).tolist() == [3, 1]
    assert teacher.pieces("a cat sat") == ["", "a", "cat", "sat", *[""] * 12]
    with torch.no_grad():
        ids = torch.tensor([[62, 2, 3, 4, 63], [62, 2, 63, 0, 0]])
        torch.testing.assert_close(came.text, teacher.reads.host(ids), rtol=1e-4, atol=1e-4)


def test_a_tokenizer_of_transformers_that_pads_before_a_text_is_asked_otherwise_and_left_as_it_is():
    model, tokenizer = randomized(of_transformers("CLIPModel")), words_tokenizer(padding_side="left")
    before = tokenizer(["a cat", "a"], padding=True)["input_ids"]
    held = {name: repr(value) for name, value in vars(tokenizer).items() if name != "_tokenizer"}
    expected = Teacher(model, words_tokenizer())(texts=["a cat sat", "a"])
    came = Teacher(model, tokenizer)(texts=["a cat sat", "a"])
    assert torch.equal(came.words, expected.words) and torch.equal(came.words_mask, expected.words_mask)
    assert {name: repr(value) for name, value in vars(tokenizer).items() if name != "_tokenizer"} == held
    assert tokenizer.padding_side == "left" and tokenizer(["a cat", "a"], padding=True)["input_ids"] == before

    class Old:
        """One that cannot be asked."""

        model_max_length, padding_side = 16, "left"

        def __call__(self, texts, padding, truncation, max_length, return_tensors):
            raise AssertionError

    with pytest.raises(ValueError, match="must pad behind a text, got Old that pads before it: set its padding_side"):
        Teacher(model, Old())


def test_pieces_stand_beside_the_words_they_were_cut_into():
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


def test_features_are_aligned_to_a_students_own_tokens():
    words, regions = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    mask = torch.tensor([[False, True, True, False], [False, True, False, False]])
    features = TeacherFeatures(torch.randn(2, 8), torch.randn(2, 8), regions, words, None, mask)
    index = torch.tensor([[1, 1, -1, 3, 2], [0, 1, 2, 3, -1]])
    came = features.align(index, torch.tensor([2, -1]))
    assert came.words_mask.tolist() == [[True, True, False, False, True], [False, True, False, False, False]]
    for row in range(2):
        for place, where in enumerate(index[row].tolist()):
            assert torch.equal(came.words[row, place], words[row, where] if where >= 0 else torch.zeros(8))
    assert torch.equal(came.regions[:, 0], regions[:, 2]) and not came.regions[:, 1].any()
    assert came.regions_mask.tolist() == [[True, False]] * 2
    assert came.image is features.image and came.text is features.text
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


SEEING = ["CLIP of transformers", "SigLIP of transformers", "SigLIP2", "AltCLIP", "ChineseCLIP", "OpenAI's", "averages"]
EVIT, FUSED, TOME, TCA = ck.EViT(0.5, fuse=False), ck.EViT(0.5), ck.ToMe(4), ck.TCA(0.1)


@pytest.mark.parametrize(("name", "method"), [
    *((name, None) for name in SEEING),
    *((name, TOME) for name in SEEING),
    *(("SigLIP of transformers", method) for method in (EVIT, FUSED, TCA)),
    *(("SigLIP2", method) for method in (EVIT, FUSED, TCA)),
])  # fmt: skip
@torch.no_grad()
def test_images_beside_texts_are_served_on_other_towers(name, method):
    make, tokenizer, _ = TOWERS[name]
    model = randomized(make()).eval()
    if method is not None:
        ck.patch(model, method)
    tower = ck.tower_of(model)
    images = torch.randn(2, 3, *tower.image_size, generator=torch.Generator().manual_seed(0))
    came = Teacher(model, tokenizer)(images, ["a cat", "a dog"], ["yes"])
    encoded = ck.encode_image(model, images, tokens=True, source=True)
    torch.testing.assert_close(came.image, encoded.embedding)
    if method is None:
        torch.testing.assert_close(came.image, tower.encode(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(came.regions, encoded.tokens[:, encoded.prefix :])
        assert came.regions_mask is None and came.regions.shape == (2, 16, came.answers.shape[-1])
        return
    assert encoded.tokens.shape[1] < 16 + encoded.prefix and encoded.prefix == ("SigLIP" not in name)
    for row in range(2):
        for patch, holder in enumerate(encoded.source[row, -1].tolist()):
            assert came.regions_mask[row, patch] == (holder >= 0)
            expected = encoded.tokens[row, holder] if holder >= 0 else torch.zeros_like(encoded.tokens[row, 0])
            torch.testing.assert_close(came.regions[row, patch], expected)
    assert came.regions_mask.all() == (method is not EVIT)
    assert len(encoded.source[:, -1].unique()) > 2


def test_weights_in_half_precision_of_openai_are_served():
    model = randomized(of_openai())
    from clip.model import convert_weights

    expected = Teacher(model, Letters())(torch.ones(1, 3, 32, 32), ["a cat"])
    convert_weights(model)
    came = Teacher(model, Letters())(torch.ones(1, 3, 32, 32), ["a cat"])
    for one, other in ((came.text, expected.text), (came.regions[0], expected.regions[0])):
        assert one.dtype == torch.float32 and torch.cosine_similarity(one, other).min() > 0.99
