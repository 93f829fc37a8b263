"""Text is generated from fewer image tokens, and equals that of the host without those tokens."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import clipkernels as ck
from clipkernels.vlm.prompt import stays_of
from tests.vlm.models import IMAGE, KINDS, build, prompts

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [IMAGE]}
BATCHES = {"one image": ([1], [9]), "two images": ([2], [9]), "rows of different lengths": ([1, 2], [12, 7])}


def kept(name: str, keep: float) -> int:
    """Image tokens of one image in the prompt."""
    kind = KINDS[name]
    return math.ceil(keep * kind.patches) + kind.slots - kind.patches


def layer_lengths(model: Any) -> list[int]:
    """A list that gets the number of tokens that enter the first layer of the language model in each forward."""
    lengths: list[int] = []
    language = model.model.text_model if hasattr(model.model, "text_model") else model.model.language_model
    language.layers[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    return lengths


def positions_of(model: Any, mask: Tensor) -> Tensor:
    """The positions that `generate` gives."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def host_values(host: Any, model: Any, values: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
    """The arguments of the host that hide the image tokens that a patched model drops, and those that stay (B,N)."""
    text = {name: values[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in values}
    images = {name: value for name, value in values.items() if name not in text}
    outputs = model.model.get_image_features(**images, return_dict=True)
    rows = outputs.pooler_output
    whole = [row.nan_to_num(0) for row in rows]
    outputs.pooler_output = torch.stack(whole) if isinstance(rows, Tensor) else whole
    with torch.no_grad():
        stays = stays_of(model.model(**values))
    positions = positions_of(host, text["attention_mask"])
    text |= {"attention_mask": stays.long(), "position_ids": positions}
    return {**text, "mm_encoder_outputs": {"image": outputs}}, stays


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("keep", [0.75, 0.5, 0.25])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_generated_tokens_are_those_of_the_masked_host(name: str, keep: float, batch: str) -> None:
    model, (images, words) = build(name), BATCHES[batch]
    values = prompts(name, images, words)
    host = copy.deepcopy(model)
    ck.patch(model, ck.Select(keep), hand_over=True)
    lengths = layer_lengths(model)
    actual = model.generate(**values, **GREEDY)
    planned = max(count * kept(name, keep) + count + length for count, length in zip(images, words, strict=True))
    assert lengths == [planned] + [1] * 7
    expected, _ = host_values(host, model, values)
    assert torch.equal(actual, host.generate(**expected, **GREEDY))
    assert torch.equal(actual, model.generate(**values, **GREEDY, use_cache=False))
