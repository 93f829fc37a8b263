"""Tokenizers and text towers: embeddings of transformers' own functions, processors, and texts that are cut."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import clipkernels as ck
from clipkernels import support
from clipkernels.adapters.tokenizers import find_cut, ids_of
from clipkernels.testing import randomized, transformers_tower
from tests.local_transformers import (
    SIZES,
    clip_model,
    family_model,
    image_processor,
    letter_tokenizer,
    save_clip_tokenizer,
    siglip_model,
)

PROMPTS = {"cat": ["a photo of a cat.", "a cat"], "dog": ["a dog."], "long": [" ".join(["very"] * 40) + " long"]}
FAMILIES = ["CLIPModel", "SiglipModel", "Siglip2Model", "MetaClip2Model", "ChineseCLIPModel", "AltCLIPModel"]
pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(family: str) -> Any:
    return randomized(family_model(family, 2, **{key: size for key, size in SIZES.items() if key != "image_size"}))


def embed(features: Any) -> Tensor:
    """The embeddings of transformers 4, or of transformers 5."""
    return features if isinstance(features, Tensor) else features.pooler_output


@pytest.mark.filterwarnings("ignore:the tokenizer cuts")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_class_embeddings_are_those_of_get_text_features(family: str) -> None:
    model = model_of(family)
    length = model.text_model.config.max_position_embeddings - 2 * ("AltCLIP" in family)
    # The marks that the text tower pools by.
    tokenizer = letter_tokenizer(length)
    model.text_model.config.eos_token_id = getattr(model.text_model, "eos_token_id", 1)
    if hasattr(model.text_model, "eos_token_id"):
        model.text_model.eos_token_id = 1
    rows = support.class_embeddings(model, tokenizer, PROMPTS)
    for row, sentences in zip(rows, PROMPTS.values(), strict=True):
        inputs = tokenizer(sentences, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        kept = {"input_ids": inputs["input_ids"]}
        if hasattr(model.text_model.config, "type_vocab_size"):  # BERTs are trained with a padding mask
            kept["attention_mask"] = (inputs["input_ids"] != model.text_model.config.pad_token_id).long()
        expected = normalize(embed(model.get_text_features(**kept)))
        torch.testing.assert_close(row, normalize(expected.mean(0), dim=0))


@torch.no_grad()
def test_padding_does_not_change_the_texts_of_clip(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, tokenizer = clip_model(), save_clip_tokenizer(tmp_path)
    for sentence in ("a", "a photo of a cat."):
        alone = embed(model.get_text_features(**tokenizer([sentence], return_tensors="pt")))
        row = support.class_embeddings(model, tokenizer, {"it": [sentence]})
        torch.testing.assert_close(row, normalize(alone))


@pytest.mark.parametrize("side", ["left", "right"])
def test_siglips_texts_have_its_full_length(side: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, lengths = siglip_model(), []
    model.text_model.register_forward_pre_hook(
        lambda module, arguments, options: lengths.append(options["input_ids"]), with_kwargs=True
    )
    tokenizer = letter_tokenizer(length=10**30, padding_side=side)
    support.class_embeddings(model, tokenizer, {"cat": ["a cat"]})
    ids = tokenizer("a cat")["input_ids"]
    assert lengths[0].tolist() == [ids + [1] * (64 - len(ids))]


@torch.no_grad()
def test_a_processor_stands_for_its_tokenizer(images: Tensor) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, tokenizer = siglip_model(), letter_tokenizer()
    processor = transformers.CLIPProcessor(image_processor(), tokenizer)
    expected = ck.Classifier(model, tokenizer, ["cat", "dog"])(images)
    assert torch.equal(ck.Classifier(model, processor, ["cat", "dog"])(images), expected)
    assert torch.equal(ids_of(processor, ["a cat"], 64), ids_of(tokenizer, ["a cat"], 64))


@pytest.mark.parametrize("method", [None, ck.EViT(0.5), ck.ToMe(2)])
@torch.no_grad()
def test_images_of_transformers_are_those_of_get_image_features(method: ck.Method | None, images: Tensor) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, tokenizer = siglip_model(), letter_tokenizer()
    classifier = ck.Classifier(model, tokenizer, ["cat", "dog"], method=method)
    expected = classifier.head(embed(model.get_image_features(pixel_values=images)))
    torch.testing.assert_close(classifier(images), expected)
    assert ck.method_of(model) == method
    with pytest.raises(ValueError, match=r"images must be \(B,3,32,32\), got \(3,3,32,24\)"):
        classifier(images[..., :24])


@torch.no_grad()
def test_heads_that_read_tokens_take_transformers(images: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, tokenizer = clip_model(), save_clip_tokenizer(tmp_path)
    for head in (ck.CALIP, ck.Reservoir):
        classifier = ck.Classifier(model, tokenizer, ["cat", "dog"], head=head, method=ck.TCA(0.1))
        text = support.class_embeddings(model, tokenizer, support.photo(["cat", "dog"]))
        expected = head(text)(ck.encode_image(model, images, tokens=True, cls_path=True))
        torch.testing.assert_close(classifier(images), expected)


def test_towers_without_a_text_half_are_refused() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    timm = pytest.importorskip("timm", reason="timm is not installed")
    for model in (timm.create_model("test_vit"), transformers_tower("CLIPVisionModel", 1, **SIZES)):
        with pytest.raises(ValueError, match=f"model must be a CLIP with .*, got {type(model).__name__}"):
            ck.Classifier(model, letter_tokenizer(), ["cat"])
        with pytest.raises(ck.UnsupportedTower, match=f"expected a text tower .*, got {type(model).__name__}"):
            support.class_embeddings(model, letter_tokenizer(), {"cat": ["a cat"]})


def test_an_image_tower_that_is_not_served_is_named() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    vision = {**SIZES, "num_hidden_layers": 1, "depths": [1], "num_heads": [1]}
    text = {**SIZES, "num_hidden_layers": 1, "vocab_size": 64}
    config = transformers.GroupViTConfig(vision_config=vision, text_config=text)
    with pytest.raises(ck.UnsupportedTower, match="GroupViT"):
        ck.Classifier(transformers.GroupViTModel(config), letter_tokenizer(), ["cat"])


class Words:
    """A tokenizer of whole words, with an end but no start, which pads to the longest text up to a length."""

    def __init__(self, length: int, end: bool = True) -> None:
        self.length, self.end = length, end

    def __call__(self, texts: list[str]) -> Tensor:
        rows = [[2 + sum(map(ord, word)) for word in text.split()][: self.length - self.end] for text in texts]
        rows = [row + [1] * self.end for row in rows]
        ids = torch.zeros(len(texts), max(map(len, rows)), dtype=torch.int64)
        for line, row in zip(ids, rows, strict=True):
            line[: len(row)] = torch.tensor(row)
        return ids


def cut(tokenizer: Any, texts: list[str], context: int | None = None) -> list[str]:
    return [texts[row] for row in find_cut(tokenizer, texts, ids_of(tokenizer, texts, context), context)]


def test_a_text_is_cut_from_one_token_too_many() -> None:
    texts = ["a", "a b", "a b c", "a b c d", "a b c d e f", "", "..."]
    assert cut(Words(4), texts) == ["a b c d", "a b c d e f"]
    assert cut(Words(3, end=False), texts) == ["a b c d", "a b c d e f"]
    assert cut(Words(99), texts) == []


def test_a_text_is_cut_from_one_byte_too_many() -> None:
    tokenizer = ck.bundled()[2]
    fits, over = ["x" * 62, "word " * 12 + "an"], ["x" * 61 + "yz", "word " * 12 + "and", "word " * 15]
    assert cut(tokenizer, ["a cat", *fits, *over]) == over


def test_a_lost_full_stop_is_no_cut_word() -> None:
    tokenizer = ck.bundled()[2]
    assert cut(tokenizer, ["x" * 62 + "."]) == []
    assert cut(tokenizer, ["x" * 61 + "y z."]) == ["x" * 61 + "y z."]


def test_open_clips_tokenizer_cuts_words_and_parts_of_words() -> None:
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    fits = " ".join(["cat"] * 74)
    texts = ["a cat", f"{fits} dog", f"{fits} dog cat", f"{fits} antidisestablishmentarianism"]
    assert cut(tokenizer, texts, 77) == texts[2:]


def test_tokenizers_of_transformers_cut(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    for tokenizer, marks in ((save_clip_tokenizer(tmp_path, 16), 2), (letter_tokenizer(16), 1)):
        fits = "abcdefghijklmnopqrstuvwxyz"[: 16 - marks]
        texts = ["a cat", fits, fits + "z"]
        assert cut(tokenizer, texts, 64) == texts[2:]


def test_a_warning_names_the_classes_that_are_cut(tiny: Any) -> None:
    tokenizer = ck.bundled()[2]
    long = [f"a class with a name that is too long to be read {end}" for end in ("left", "right")]
    expected = rf"the tokenizer cuts prompts of '{long[0]}', '{long[1]}', which are too long for the text tower"
    with pytest.warns(UserWarning, match=expected):
        ck.Classifier(tiny, tokenizer, ["cat", *long])
    with pytest.warns(UserWarning, match=expected):
        support.class_embeddings(tiny, tokenizer, support.photo(["cat", *long], support.ENSEMBLE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ck.Classifier(tiny, tokenizer, ["cat", "dog"])
