"""Vision-language models of transformers: fewer image tokens in the tower and in the prompt.

    ck.patch(model, ck.Select(keep=0.25), hand_over=True)     # or a method whose steps shorten the tower
    ck.vlm.image_tokens(model)                                # tokens of an image in the prompt, before any forward
    model.generate(**processor(images=image, text=text, return_tensors="pt"))

Source: VisionZip, arXiv 2412.04467, for the choice at the end of a tower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipkernels.arguments import check_int
from clipkernels.vlm.counts import chosen, method_of, pack, planned, tiles_of, tower_of
from clipkernels.vlm.families import family_of, find_container
from clipkernels.vlm.hand_over import is_installed
from clipkernels.vlm.prompt import stays_of

__all__ = ["image_tokens", "kept"]


def image_tokens(model: nn.Module, image_size: tuple[int, int] | None = None) -> int:
    """The number of tokens that the language model gets for one image, from sizes alone.

    Args:
        model: a model that is patched with `hand_over=True`.
        image_size: height and width of the image in pixels, for models that divide it into tiles: LLaVA-NeXT and
            LLaVA-OneVision. Newlines count. The image is alone in its text, because LLaVA-OneVision does not divide
            others. For other models the number is that of one tile, and is the same for all.
    Raises:
        ValueError: the model is not patched, or a size is missing or out of range.
        UnsupportedTower: no vision-language model that can hand tokens over.
    """
    container = find_container(model)
    tower = tower_of(container)
    if not is_installed(container):
        raise ValueError("expected a model patched with hand_over=True, got one that is not: call ck.patch")
    if not family_of(container).packs:
        return planned(container, tower.num_tokens - tower.prefix, {})
    if image_size is None:
        raise ValueError(f"expected image_size=(height, width), because {family_of(container).title} divides an image")
    height, width = image_size if isinstance(image_size, (tuple, list)) and len(image_size) == 2 else (image_size, None)
    check_int("height in image_size=(height, width)", height, 1)
    check_int("width in image_size=(height, width)", width, 1)
    values = {"image_sizes": torch.tensor([[height, width]])}
    patches = torch.zeros(tiles_of(container, values["image_sizes"])[0], tower.num_tokens - tower.prefix, 1)
    (packed,) = pack(container, patches, values, 1.0)
    newlines = int(packed.sum())
    return newlines + chosen(method_of(container), len(packed) - newlines)


def kept(outputs: Any) -> list[Tensor]:
    """The rows of the tokens that the language model got, one tensor (n,C) per text, without padding.

    Outputs have the host's length, in which each slot that was cut repeats the row before it. For ColPali these are the
    vectors to store: repeats do not change MaxSim.

    Args:
        outputs: outputs of a model patched with `hand_over=True` for a text with images; its `embeddings` (B,N,C), or
            else its `last_hidden_state`.
    Raises:
        ValueError: outputs without images, or without either of the two.
    """
    stays = stays_of(outputs)
    rows = getattr(outputs, "embeddings", None)
    rows = getattr(outputs, "last_hidden_state", None) if rows is None else rows
    if stays is None or rows is None:
        raise ValueError(
            "expected outputs with embeddings or last_hidden_state, for a text with images, of a model patched with "
            f"hand_over=True, got {type(outputs).__name__}"
        )
    return [row[stay] for row, stay in zip(rows, stays, strict=True)]
