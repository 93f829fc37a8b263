"""Ways to decode a shortened prompt: right, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import clipkernels as ck
from clipkernels.vlm.prompt import cache_of
from tests.vlm.models import CACHE, KINDS, _llama, build, prompts, transformers
from tests.vlm.test_generation import GREEDY, host_values, positions_of

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["Llava", "PaliGemma", "Gemma3"]


def patched(name: str, keep: float = 0.25) -> Any:
    return ck.patch(build(name), ck.Select(keep), hand_over=True)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_beams_are_those_of_the_masked_host(name: str, options: dict[str, int]) -> None:
    model, values = build(name), prompts(name, [1, 2], [12, 7])
    host = copy.deepcopy(model)
    ck.patch(model, ck.Select(0.25), hand_over=True)
    actual = model.generate(**values, **GREEDY, **options)
    expected, _ = host_values(host, model, values)
    assert torch.equal(actual, host.generate(**expected, **GREEDY, **options))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_assisted_decoding_gives_the_same_tokens(name: str) -> None:
    model, values = patched(name), prompts(name, [1], [12])
    expected = model.generate(**values, **GREEDY)
    assert torch.equal(model.generate(**values, **GREEDY, prompt_lookup_num_tokens=2), expected)


@torch.no_grad()
def test_an_assistant_gives_the_same_tokens() -> None:
    model, values = patched("Llava"), prompts("Llava", [1], [12])
    expected = model.generate(**values, **GREEDY)
    text = transformers.LlamaForCausalLM(_llama()).eval()
    for assistant in (patched("Llava", 0.5), text):
        assert torch.equal(model.generate(**values, **GREEDY, assistant_model=assistant), expected)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_decoding_by_hand_needs_neither_mask_nor_positions(name: str) -> None:
    # In fp64, because products of one, two and many rows round differently.
    model, values = patched(name).double(), prompts(name, [1, 1], [9, 9])
    values["pixel_values"] = values["pixel_values"].double()
    del values["attention_mask"]
    whole = torch.cat([values["input_ids"], torch.tensor([[7, 8, 9], [17, 18, 19]])], 1)
    kinds = {"token_type_ids": torch.zeros_like(whole)} if "token_type_ids" in values else {}
    if name == "Gemma3":
        kinds["token_type_ids"][:, : values["input_ids"].shape[1]] = values["token_type_ids"]
    images = {key: value for key, value in values.items() if key not in ("input_ids", "token_type_ids")}
    if name == "PaliGemma":  # its prefix sees itself alone, so that later tokens change nothing of it
        kinds["token_type_ids"][:, values["input_ids"].shape[1] :] = 1
    expected = model(input_ids=whole, **images, **kinds).logits
    for cache_name in {CACHE, "past_key_values"}:
        outputs = model(**values, use_cache=True)
        logits = [outputs.logits]
        for start, stop in ((-3, -1), (-1, None)):  # two tokens, then one
            tokens = whole[:, start:stop]
            more = {"token_type_ids": torch.zeros_like(tokens)} if name == "Gemma3" else {}
            outputs = model(input_ids=tokens, **{cache_name: cache_of(outputs)}, **more)
            logits.append(outputs.logits)
        torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-5, atol=1e-5 * float(expected.std()))


@torch.no_grad()
def test_a_copied_cache_goes_on_by_itself() -> None:
    model, values = patched("Llava"), prompts("Llava", [1], [9])
    cache = cache_of(model(**values, use_cache=True))
    other, token = copy.deepcopy(cache), torch.tensor([[7]])
    first = model(input_ids=token, **{CACHE: cache}).logits
    assert torch.equal(model(input_ids=token, **{CACHE: other}).logits, first)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_caches_that_cannot_hold_a_cut_prompt_are_refused(name: str) -> None:
    model, values = patched(name), prompts(name, [1, 2], [12, 7])
    with pytest.raises(ValueError, match=r"got a static one: omit cache_implementation"):
        model.generate(**values, **GREEDY, cache_implementation="static")
    with pytest.raises(ValueError, match=r"images belong in the first forward .* omit prefill_chunk_size"):
        model.generate(**values, **GREEDY, prefill_chunk_size=8)
    cache = cache_of(model(**values, use_cache=True))
    with pytest.raises(ValueError, match="images belong in the first forward of a cache, got a cache that holds"):
        model(**values, **{CACHE: cache})
    text = {key: value for key, value in values.items() if key in ("input_ids", "attention_mask")}
    longer = {key: torch.cat([value, value[:, -2:]], 1) for key, value in text.items()}
    with pytest.raises(ValueError, match=r"that follow the \d+ of the cache, got 2 × \d+ tokens: .* start a new cache"):
        model.generate(**longer, **GREEDY, **{CACHE: cache})
    with pytest.raises(ValueError, match="expected 2 rows of tokens that follow"):
        model(input_ids=torch.tensor([[5]]), **{CACHE: cache})
    with pytest.raises(ValueError, match=r"takes an attention mask \(B,N\), got one of 4 dimensions"):
        model(**{**values, "attention_mask": torch.zeros(2, 1, 3, 3)})


@torch.no_grad()
def test_a_cache_that_goes_on_without_a_mask_is_refused() -> None:
    model, values = patched("Llava"), prompts("Llava", [1], [9])  # without padding generate passes no mask
    cache = cache_of(model(**values, use_cache=True))
    ids = torch.cat([values["input_ids"], torch.tensor([[5, 6, 7]])], 1)
    with pytest.raises(ValueError, match="start a new cache"):
        model.generate(input_ids=ids, **GREEDY, **{CACHE: cache})


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_text_alone_is_that_of_the_host(name: str) -> None:
    model, ids = build(name), torch.tensor([[1, 5, 9, 12], [1, 7, 8, 30]])
    values = {"input_ids": ids} | ({"token_type_ids": ids * 0} if name in ("PaliGemma", "Gemma3") else {})
    expected = model.generate(**values, **GREEDY)
    ck.patch(model, ck.Select(0.25), hand_over=True)
    assert torch.equal(model.generate(**values, **GREEDY), expected)


@torch.no_grad()
def test_embedded_prompts_and_encoded_images_are_taken() -> None:
    model, values = patched("Llava"), prompts("Llava", [1], [9])
    expected = model(**values)
    embeds = model.get_input_embeddings()(values["input_ids"])
    others = {key: value for key, value in values.items() if key != "input_ids"}
    assert torch.equal(model(inputs_embeds=embeds, **others).logits, expected.logits)
    images = {"image": model.model.get_image_features(values["pixel_values"])}
    text = {key: values[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(model(**text, mm_encoder_outputs=images).logits, expected.logits)
    as_tuple = model.model(**values, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], model.model(**values).last_hidden_state)
    assert isinstance(model.model.get_image_features(values["pixel_values"], return_dict=False), tuple)


@pytest.mark.parametrize("way", ["reset", "crop"])
@torch.no_grad()
def test_an_emptied_cache_takes_other_prompts(way: str) -> None:
    model, values, ids = patched("Llava"), prompts("Llava", [1], [9]), torch.tensor([[1, 5, 6]])
    cache = transformers.DynamicCache(config=model.config)
    expected, text = model(**values).logits, model(input_ids=ids).logits
    for _ in range(2):
        assert torch.equal(model(**values, **{CACHE: cache}).logits, expected)
        cache.reset() if way == "reset" else cache.crop(-cache.get_seq_length())
    parts = [model(input_ids=part, **{CACHE: cache}).logits for part in (ids[:, :1], ids[:, 1:])]
    torch.testing.assert_close(torch.cat(parts, 1), text, rtol=1e-5, atol=1e-5 * float(text.std()))


@torch.no_grad()
def test_a_cropped_cache_goes_on_where_no_slot_is_cut() -> None:
    model, values, more = patched("Llava"), prompts("Llava", [1, 2], [12, 7]), torch.tensor([[5, 6, 7], [8, 9, 10]])
    values["position_ids"] = positions_of(model, values["attention_mask"])
    length = values["input_ids"].shape[1]
    mask = torch.cat([values["attention_mask"], torch.ones_like(more)], 1)
    last = values["position_ids"][:, -1:]
    for removed in (1, 2, 4):  # candidates, and then a token of the prompt
        cache = cache_of(model(**values, use_cache=True))
        positions = last + torch.arange(1, 4)
        expected = model(input_ids=more, attention_mask=mask, position_ids=positions, **{CACHE: cache}).logits
        cache.crop(-removed)
        rest, positions = torch.cat([values["input_ids"], more], 1)[:, -removed:], last + torch.arange(4 - removed, 4)
        actual = model(input_ids=rest, attention_mask=mask, position_ids=positions, **{CACHE: cache}).logits
        tail = min(removed, 3)
        torch.testing.assert_close(actual[:, -tail:], expected[:, -tail:], rtol=1e-4, atol=1e-4 * float(expected.std()))
    cache = cache_of(model(**values, use_cache=True))
    cache.crop(-8)  # into the image of a row
    with pytest.raises(ValueError, match=r"by at most the last 5 tokens .*, got one cropped by 8: start a new cache"):
        model(input_ids=values["input_ids"][:, -8:], attention_mask=torch.ones(2, length), **{CACHE: cache})


@torch.no_grad()
def test_rows_of_a_cache_are_selected_repeated_and_reordered() -> None:
    model, values, token = patched("Llava"), prompts("Llava", [1, 2], [12, 7]), torch.tensor([[7], [8]])

    def decoded(rows: list[int], change: str = "", *arguments: Any) -> Tensor:
        cache = cache_of(model(**values, use_cache=True))
        if change:
            getattr(cache, change)(*arguments)
        logits: Tensor = model(input_ids=token[rows], **{CACHE: cache}).logits
        return logits

    expected = decoded([0, 1])
    for change, argument, rows in (
        ("batch_select_indices", torch.tensor([1, 0]), [1, 0]),
        ("reorder_cache", torch.tensor([1, 1]), [1, 1]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1]),
    ):
        torch.testing.assert_close(decoded(rows, change, argument), expected[rows], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_among_new_tokens_is_hidden() -> None:
    model, values, tokens = patched("Llava"), prompts("Llava", [1, 2], [12, 7]), torch.tensor([[0, 7], [8, 9]])
    mask, first = values["attention_mask"], positions_of(model, values["attention_mask"])[:, -1:] + 1
    cache = cache_of(model(**values, use_cache=True))
    padded = torch.cat([mask, torch.tensor([[0, 1], [1, 1]])], 1)
    positions = torch.cat([first, first + torch.tensor([[0], [1]])], 1)
    actual = model(input_ids=tokens, attention_mask=padded, position_ids=positions, **{CACHE: cache}).logits[0, 1]
    cache = cache_of(model(**values, use_cache=True))
    whole = torch.cat([mask, mask.new_ones(2, 1)], 1)
    expected = model(input_ids=tokens[:, 1:], attention_mask=whole, position_ids=first, **{CACHE: cache}).logits[0, 0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
