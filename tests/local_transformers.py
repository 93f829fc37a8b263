"""Small models of transformers in a folder, with random weights, a tokenizer of letters and an image processor."""

from __future__ import annotations

import json
import math
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import torch

from clipkernels.testing import randomized, transformers_tower

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
START, END = "<|startoftext|>", "<|endoftext|>"


def family_model(family: str, layers: int, **sizes: int) -> Any:
    """A model of a family of transformers for 16 patches; skips the test if this transformers has no working one."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not hasattr(transformers, family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    images = {"num_patches": 16} if "Siglip2" in family else {"image_size": 32}
    model: Any = transformers_tower(family, layers, **sizes, **images)
    if family in ("AltCLIPModel", "ChineseCLIPModel"):
        try:
            model.get_text_features(input_ids=torch.ones(1, 4, dtype=torch.int64))
        except TypeError as error:  # such as 4.57, whose ChineseCLIP projects a pooled row that it does not have
            pytest.skip(f"{family}.get_text_features of transformers {transformers.__version__} is broken: {error}")
    return model


def clip_model(scale: float = 10.0) -> Any:
    """A CLIPModel for the tokenizer of `save_clip_tokenizer`."""
    model: Any = randomized(transformers_tower("CLIPModel", 4, **SIZES))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(scale))
    return model


def siglip_model(scale: float = 10.0, bias: float = -5.0) -> Any:
    """A SiglipModel for `letter_tokenizer`."""
    model: Any = randomized(transformers_tower("SiglipModel", 4, **SIZES))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(scale))
        model.logit_bias.fill_(bias)
    return model


def save_clip_tokenizer(folder: Path, length: int = 77) -> Any:
    """Save a CLIPTokenizer of 64 ids, letters with and without the end of a word, and return it."""
    from transformers import AutoTokenizer

    folder.mkdir(exist_ok=True, parents=True)
    words = [letter + end for end in ("", "</w>") for letter in (*ascii_lowercase, ".", "!", ",", "-", "'")]
    vocabulary = {word: index for index, word in enumerate([*words, START, END])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    marks = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def letter_tokenizer(length: int = 64, **marks: str) -> Any:
    """A tokenizer of single letters that ends a text with the id 1, which also pads, as SigLIP's does."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: index for index, letter in enumerate(["<unk>", "</s>", *ascii_lowercase, " ", "."])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    marks = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", **marks}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **marks)


def image_processor() -> Any:
    """An image processor to 32×32 pixels."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def save_clip(folder: Path) -> Any:
    """Save a CLIPModel with its tokenizer and image processor, and return the model."""
    model = clip_model()
    model.save_pretrained(folder)
    save_clip_tokenizer(folder)
    image_processor().save_pretrained(folder)
    return model


def save_siglip(folder: Path) -> Any:
    """Save a SiglipModel with its tokenizer and image processor, and return the model."""
    model = siglip_model()
    model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return model
