"""Tiny vision-language models of every family with random weights, and prompts for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from clipkernels.testing import randomized

transformers = pytest.importorskip("transformers", "5.23", reason="transformers 5.23 or later is not installed")

SIDE, IMAGE = 64, 199
CACHE = "cache" if "cache" in inspect.signature(transformers.LlavaModel.forward).parameters else "past_key_values"
"""The argument of a cache, whose name transformers 5.24 changed."""
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 4}
VISION |= {"patch_size": 8, "image_size": SIDE}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
TEXT |= {"num_hidden_layers": 2, "vocab_size": 200, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
PINPOINTS = [[64, 128], [128, 64], [128, 128]]


def _config(name: str, vision: Any, text: Any, **options: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=text, **options)
    model: nn.Module = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    return model


def _clip() -> Any:
    return transformers.CLIPVisionConfig(**VISION, projection_dim=32)


def _siglip() -> Any:
    return transformers.SiglipVisionConfig(**VISION, vision_use_head=False)


def _llama() -> Any:
    return transformers.LlamaConfig(**TEXT)


def _paligemma_config() -> Any:
    text = transformers.GemmaConfig(**TEXT)
    sizes = {"projection_dim": 32, "hidden_size": 32}
    return transformers.PaliGemmaConfig(vision_config=_siglip(), text_config=text, image_token_index=IMAGE, **sizes)


def _gemma3() -> nn.Module:
    layers = ["sliding_attention", "full_attention"]
    text = transformers.Gemma3TextConfig(**TEXT, layer_types=layers, sliding_window=512, query_pre_attn_scalar=8)
    return _config("Gemma3", _siglip(), text, mm_tokens_per_image=16, image_token_index=IMAGE)


def _shuffled(name: str) -> nn.Module:
    return _config(name, VISION, _llama(), image_token_id=IMAGE, scale_factor=2, pad_token_id=0)


class Kind(NamedTuple):
    """A family.

    build: the model.
    slots: image tokens of an image in a prompt of the host.
    patches: the number that a ratio is taken of; the others are newlines.
    steps: steps in the tower can shorten the prompt.
    """

    build: Callable[[], nn.Module]
    slots: int = 64
    patches: int = 64
    steps: bool = False


# An image of 96 × 128 pixels is cut to 6 × 8 patches of a tile of 2 × 2... see `tiles`.
KINDS = {
    "Llava": Kind(lambda: _config("Llava", _clip(), _llama(), image_token_index=IMAGE), steps=True),
    "PaliGemma": Kind(lambda: transformers.PaliGemmaForConditionalGeneration(_paligemma_config()), steps=True),
    "LlavaNext": Kind(
        lambda: _config("LlavaNext", _clip(), _llama(), image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS),
        64 + 12 * 17,
        64 + 12 * 16,
    ),
    "Idefics3": Kind(lambda: _shuffled("Idefics3"), 16, 16),
    "SmolVLM": Kind(lambda: _shuffled("SmolVLM"), 16, 16),
    "Gemma3": Kind(_gemma3, 16, 16),
    "LlavaOnevision": Kind(
        lambda: _config(
            "LlavaOnevision",
            _siglip(),
            transformers.Qwen2Config(**{k: v for k, v in TEXT.items() if k != "head_dim"}),
            image_token_index=IMAGE,
            image_grid_pinpoints=PINPOINTS,
            vision_feature_layer=-1,
        ),
        64 + 12 * 17,
        64 + 12 * 16,
    ),
}
"""Tiled families see images of 96 × 128 pixels: a thumbnail of 64 patches, and four tiles, of whose 16 × 16 patches the
host cuts 4 rows of padding; a newline ends each row."""


def build(name: str) -> Any:
    """A model in evaluation mode, with random weights."""
    torch.manual_seed(0)
    model: Any = KINDS[name].build().eval()
    model = randomized(model)
    for parameter in model.parameters():  # logits of a size at which greedy tokens differ
        parameter.requires_grad_(True)
    return model


def prompts(name: str, images: Sequence[int], words: Sequence[int], seed: int = 0) -> dict[str, Tensor]:
    """A batch of prompts, padded on the left: a row has `words` tokens of text around this number of images."""
    generator = torch.Generator().manual_seed(seed)
    slots, rows = KINDS[name].slots, []
    for count, length in zip(images, words, strict=True):
        text = torch.randint(5, 190, (length,), generator=generator).tolist()
        row = [1, *text[:2]]
        for _ in range(count):
            row += [IMAGE] * slots + [text[2]]
        rows.append(row + text[3:])
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    values = {"input_ids": ids, "attention_mask": mask, **pictures(name, images, generator)}
    if name == "PaliGemma":
        values["token_type_ids"] = torch.zeros_like(ids)
    if name == "Gemma3":
        values["token_type_ids"] = (ids == IMAGE).long()
    return values


def pictures(name: str, images: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
    """The arguments of the images of a batch of prompts."""
    total = sum(images)
    if name in ("LlavaNext", "LlavaOnevision"):
        tiles = torch.randn(total, 5, 3, SIDE, SIDE, generator=generator)
        values = {"pixel_values": tiles, "image_sizes": torch.tensor([[96, 128]] * total)}
        if name == "LlavaOnevision":
            values["batch_num_images"] = torch.ones(total, dtype=torch.int64)
        return values
    pixels = torch.randn(total, 3, SIDE, SIDE, generator=generator)
    if name in ("Idefics3", "SmolVLM"):  # padded with black images
        padded = torch.zeros(len(images), max(images), 3, SIDE, SIDE)
        start = 0
        for row, count in enumerate(images):
            padded[row, :count] = pixels[start : start + count]
            start += count
        return {"pixel_values": padded}
    return {"pixel_values": pixels}
