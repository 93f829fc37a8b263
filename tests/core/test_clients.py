"""Libraries that contain a CLIP: after patching, their public interfaces give the reduced results."""

import json

import pytest
import torch
from open_clip.timm_model import TimmModel
from PIL import Image

import clipkernels as ck
from clipkernels.testing import open_clip_tower, openai_tower, randomized, timm_tower, transformers_tower

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
METHODS = [ck.Dense(), ck.EViT(0.5), ck.ToMe(8), ck.TCA(0.1)]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "patch_size": 8, "image_size": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny CLIP saved by transformers: weights, a tokenizer of single letters, an image processor."""
    path = tmp_path_factory.mktemp("clip")
    randomized(transformers_tower("CLIPModel", 3, **SIZES)).save_pretrained(path)
    letters = [chr(code) for code in range(97, 123)]
    tokens = ["<|startoftext|>", "<|pad|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {token: index for index, token in enumerate(tokens)} | {"<|endoftext|>": 63}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(path / "vocab.json"), str(path / "merges.txt"), pad_token="<|endoftext|>", model_max_length=16
    )
    size = {"height": 64, "width": 64}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=size)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(path)
    return path


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 64, 64, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in pixels]


def embeddings(folder, pictures, method):
    """A model patched directly, and its embeddings of the pictures."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    ck.patch(model, method)
    with torch.no_grad():
        return model, ck.encode_image(model, pixels).embedding


@pytest.mark.parametrize("method", METHODS)
def test_a_sentence_transformers_clip_is_patched_directly(folder, pictures, method):
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    client = st.SentenceTransformer(str(folder), device="cpu")
    before = client.encode(pictures, convert_to_tensor=True)
    assert ck.patch(client, method) is client
    actual = client.encode(pictures, convert_to_tensor=True)
    _, expected = embeddings(folder, pictures, method)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    ck.unpatch(client)
    assert torch.equal(client.encode(pictures, convert_to_tensor=True), before)
    assert torch.allclose(actual, before, rtol=1e-4, atol=1e-4) == (method == ck.Dense())


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_shot_pipeline_is_patched_through_its_model(folder, pictures, method):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    client = transformers.pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
    labels = ["a", "b", "c"]
    before = client(pictures, candidate_labels=labels, hypothesis_template="{}")
    ck.patch(client.model, method)
    actual = client(pictures, candidate_labels=labels, hypothesis_template="{}")
    model, embedding = embeddings(folder, pictures, method)
    with torch.no_grad():
        text = client.tokenizer(labels, return_tensors="pt", padding=True)
        features = model.get_text_features(**text)
        features = features if isinstance(features, torch.Tensor) else features.pooler_output
        logits = torch.nn.functional.cosine_similarity(embedding[:, None], features[None], dim=-1)
        expected = (logits * model.logit_scale.exp()).softmax(-1)
    for row, scores in zip(actual, expected, strict=True):
        assert {guess["label"]: guess["score"] for guess in row} == pytest.approx(
            dict(zip(labels, scores.tolist(), strict=True)), abs=1e-4
        )
    ck.unpatch(client.model)
    assert client(pictures, candidate_labels=labels, hypothesis_template="{}") == before


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_open_clips_own_encode_image_gives_the_reduced_embedding(tiny, images, method):
    before = tiny.encode_image(images)
    ck.patch(tiny, method)
    expected = ck.encode_image(tiny, images).embedding
    torch.testing.assert_close(tiny.encode_image(images), expected, rtol=1e-4, atol=1e-4)
    normalised = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(tiny.encode_image(images, normalize=True), normalised, rtol=1e-4, atol=1e-4)
    assert torch.equal(ck.unpatch(tiny).encode_image(images), before)


@torch.no_grad()
def test_a_model_inside_a_wrapper_is_found(tiny, images):
    parallel = torch.nn.DataParallel(tiny)
    ck.patch(parallel, ck.EViT(0.5))
    assert ck.method_of(tiny) == ck.EViT(0.5) == ck.method_of(parallel)
    compiled = torch.compile(tiny, backend="eager")
    assert ck.method_of(compiled) == ck.EViT(0.5)


class Forwarding(torch.nn.Module):
    """A wrapper that looks like the model inside it, as PEFT's do."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


@pytest.mark.parametrize("host", ["open_clip", "open_clip with timm", "timm", "OpenAI", "transformers"])
@torch.no_grad()
def test_a_wrapper_that_forwards_attributes_is_not_the_tower(host):
    if host == "OpenAI":
        pytest.importorskip("clip.model", reason="OpenAI's clip is not installed")
    small = {"embed_dim": 64, "num_heads": 2, "img_size": 32, "num_classes": 24}
    tower = {
        "open_clip": lambda: open_clip_tower("ViT-B-32", width=64, head_width=32, image_size=32, patch_size=8).visual,
        "open_clip with timm": lambda: TimmModel("vit_tiny_patch16_224", 24).eval(),
        "timm": lambda: timm_tower("vit_base_patch8_224", **small),
        "OpenAI": lambda: openai_tower(2, 32, 8, 64, 24).visual,
        "transformers": lambda: transformers_tower("CLIPVisionModel", **{**SIZES, "image_size": 32}),
    }[host]()
    root = ck.tower_of(tower).root
    images = torch.randn(2, 3, *ck.tower_of(tower).image_size)
    for wrapper in (Forwarding(tower), Forwarding(Forwarding(tower)), torch.compile(tower, backend="eager")):
        assert ck.tower_of(wrapper).root is root
        ck.patch(wrapper, ck.EViT(0.5))
        assert ck.method_of(tower) == ck.EViT(0.5)
        embedding = ck.encode_image(wrapper, images).embedding
        assert torch.equal(embedding, ck.encode_image(tower, images).embedding)
