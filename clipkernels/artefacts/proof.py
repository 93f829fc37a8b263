"""Proofs that a folder gives a model again: weights, embeddings, ids and pixels, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from clipkernels import adapters
from clipkernels.adapters import UnsupportedTower
from clipkernels.adapters.text import find_text_encoder
from clipkernels.adapters.tokenizers import ids_of
from clipkernels.arguments import describe
from clipkernels.artefacts.contents import has_text
from clipkernels.artefacts.load import open_artefact
from clipkernels.artefacts.weights import first_difference, same_bits
from clipkernels.classifier import eval_mode
from clipkernels.data import Preprocess
from clipkernels.encode import tower_weight
from clipkernels.messages import first_line

TEXTS = ("", "a photo of a cat.", "Ärger? 7 days, <x> & co!", "The   END")


def prove(model: nn.Module, folder: Path, tokenizer: Any, preprocess: Any) -> None:
    """Raise ValueError unless a folder gives a model's weights and embeddings, its tokenizer and its preprocessing.

    Args:
        model: the model that was saved.
        folder: the folder, with its clipkernels.json.
        tokenizer, preprocess: the model's, or None; those that were saved as they are need no proof.
    """
    expected = "expected a folder that gives the model again"
    try:
        loaded = open_artefact(folder, tower_weight(model).device)
    except Exception as error:  # the libraries raise many types
        reason = first_line(error).replace(str(folder), "it")
        raise ValueError(f"{expected}, got one that does not load: check config: {reason}") from error
    different = first_difference(model, loaded.model)
    if different is not None:
        raise ValueError(f"{expected}, got one with another {different}: check config")
    answers, others = answers_of(model), answers_of(loaded.model)
    for name, answer in answers.items():
        if not same_bits(answer, others[name]):
            difference = (answer - others[name]).abs().max()
            raise ValueError(
                f"{expected}, got one whose embeddings of {name} differ by up to {difference:.2g}: check config, such "
                "as quick_gelu and the number of heads"
            )
    if tokenizer is not None and loaded.tokenizer is not None and not hasattr(tokenizer, "image_processor"):
        context = find_text_encoder(model).context if has_text(model) else None
        if not same_ids(tokenizer, loaded.tokenizer, context):
            raise ValueError(
                f"expected a tokenizer with the ids of the folder's {describe(loaded.tokenizer)}, got "
                f"{describe(tokenizer)} with others"
            )
    if callable(preprocess) and not hasattr(preprocess, "save_pretrained"):
        assert loaded.preprocess is not None
        if not same_pixels(preprocess, loaded.preprocess):
            raise ValueError(
                "expected a preprocessing with the pixels of the folder's, got one with others: pass its configuration "
                "as a dict, which the folder keeps"
            )


@torch.no_grad()
def answers_of(model: nn.Module) -> dict[str, Tensor]:
    """The embeddings that a model's own forward gives of two images of noise and, if it has a text tower, of two texts.

    Raises:
        UnsupportedTower: a model whose forward is unknown.
    """
    generator = torch.Generator().manual_seed(0)
    weight = tower_weight(model)
    images = torch.randn(2, 3, *_image_size(model), generator=generator).to(weight.device, weight.dtype)
    with eval_mode(model), _frozen(model):
        answers = {"images": _encode(model)(images)}
        text = _text_answers(model, weight.device)
    return answers if text is None else answers | {"texts": text}


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Freeze all weights for the length of a `with` block; torch rounds attention otherwise where some are not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def same_ids(first: Any, second: Any, context: int | None) -> bool:
    """Return true if two tokenizers give the same ids of a few texts."""
    one, other = (ids_of(tokenizer, list(TEXTS), context) for tokenizer in (first, second))
    return torch.equal(one, other)


def same_pixels(first: Preprocess, second: Preprocess) -> bool:
    """Return true if two preprocessings give the same tensor of an image of noise."""
    noise = torch.randint(256, (97, 131, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    return torch.equal(first(image), second(image))


def _encode(model: Any) -> Callable[[Tensor], Tensor]:
    try:
        encode: Callable[[Tensor], Tensor] = adapters.find_tower(model).encode
        return encode
    except UnsupportedTower:
        if hasattr(model, "encode_image"):
            encode = model.encode_image
            return encode
        if hasattr(model, "pretrained_cfg"):
            return model
        raise


def _image_size(model: Any) -> tuple[int, int]:
    try:
        return adapters.find_tower(model).image_size
    except UnsupportedTower:
        visual = getattr(model, "visual", model)
        size = getattr(visual, "image_size", None) or getattr(visual, "input_resolution", None)
        size = size or getattr(model, "pretrained_cfg", {}).get("input_size", ())[1:]
        if not size:
            raise
        return (size, size) if isinstance(size, int) else tuple(size)


def _text_answers(model: Any, device: torch.device) -> Tensor | None:
    """The embeddings of two texts of arbitrary ids, the largest of which ends them; None for a model without text."""
    if not has_text(model):
        return None
    encoder = find_text_encoder(model)
    tables = [(name.rpartition(".")[2], part) for name, part in model.named_modules() if isinstance(part, nn.Embedding)]
    sizes = [part.num_embeddings for name, part in tables if "token" in name or "word" in name]
    if not sizes:
        return None
    last = max(sizes) - 1
    ids = torch.zeros(2, encoder.context or 8, dtype=torch.int64, device=device)
    ids[:, :4] = torch.tensor([[2, 3, 1, last], [1, 2, last, 0]], device=device)
    return encoder.encode(ids)
