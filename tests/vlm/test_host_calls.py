"""Calls that the host takes: other image sizes, layers, strategies and arguments; those that it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import clipkernels as ck
from clipkernels.testing import randomized
from clipkernels.vlm.prompt import cache_of, make_prompt
from tests.vlm.models import IMAGE, KINDS, _clip, _llama, _siglip, build, prompts, transformers
from tests.vlm.test_generation import GREEDY, host_values

pytestmark = pytest.mark.usefixtures("one_thread")


def llava(vision: Any, **options: Any) -> Any:
    """A LLaVA with another tower or other options."""
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=_llama(), image_token_index=IMAGE, vision_feature_layer=-1, **options
    )
    torch.manual_seed(0)
    model = randomized(transformers.LlavaForConditionalGeneration(config).eval())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 128), (96, 96)])
@pytest.mark.parametrize("name", ["Llava", "Idefics3"])
@torch.no_grad()
def test_images_of_other_sizes_are_counted(name: str, height: int, width: int) -> None:
    model, slots = build(name), height * width // (64 if name == "Llava" else 256)
    ids = torch.tensor([[1, 5, *[IMAGE] * slots, 7, 8]])
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "Llava":
        values |= {"pixel_values": torch.randn(1, 3, height, width), "interpolate_pos_encoding": True}
    else:
        values["pixel_values"] = torch.randn(1, 1, 3, height, width)
    host = copy.deepcopy(model)
    ck.patch(model, ck.Select(0.25), hand_over=True)
    if name == "Idefics3" and height != width:
        with pytest.raises(ValueError, match="expected a square grid that squares of 2 × 2 patches fill, got 128"):
            model(**values)
        return
    outputs = model(**values)
    assert cache_of(outputs).get_seq_length() == 4 + -(-slots // 4)
    expected, stays = host_values(host, model, values)
    wanted = host(**expected).logits[stays]
    torch.testing.assert_close(outputs.logits[stays], wanted, rtol=1e-5, atol=1e-5 * float(wanted.std()))


def test_layers_with_different_numbers_of_tokens_have_finite_gradients() -> None:
    config = transformers.LlavaConfig(
        vision_config=_clip(), text_config=_llama(), image_token_index=IMAGE, vision_feature_layer=[1, 2]
    )
    model: Any = randomized(transformers.LlavaForConditionalGeneration(config).eval()).requires_grad_(True)
    ck.patch(model, ck.Schedule([None, ck.Prune(48, False), None, None], 65), hand_over=True)
    model(**prompts("Llava", [1], [9])).logits.square().mean().backward()
    gradient = model.model.multi_modal_projector.linear_1.weight.grad
    assert gradient.isfinite().all() and gradient.any()


def test_a_strategy_that_drops_a_patch_is_refused() -> None:
    message = r'expected vision_feature_select_strategy="full" for a tower without CLS, got "default"'
    model = llava(_siglip())
    with pytest.raises(ValueError, match=message):
        ck.patch(model, ck.Select(0.25), hand_over=True)
    assert ck.method_of(model) is None
    model = ck.patch(llava(_siglip(), vision_feature_select_strategy="full"), ck.Select(0.25), hand_over=True)
    values = prompts("Llava", [1], [9])
    assert ck.vlm.image_tokens(model) == 16 and cache_of(model(**values)).get_seq_length() == 26
    with pytest.raises(ValueError, match=message):
        model(**values, vision_feature_select_strategy="default")


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_the_embedding_of_a_placeholder_does_not_count(name: str) -> None:
    model, values = ck.patch(build(name), ck.Select(0.25), hand_over=True), prompts(name, [1, 2], [12, 7])
    expected = model(**values).logits[..., :IMAGE]  # Gemma's embeddings are its head too
    model.get_input_embeddings().weight[IMAGE] = float("nan")
    assert torch.equal(model(**values).logits[..., :IMAGE], expected)


@torch.no_grad()
def test_images_encoded_once_serve_several_prompts() -> None:
    model = ck.patch(build("Llava"), ck.Select(0.25), hand_over=True)
    values = prompts("Llava", [1], [9])
    images = {"image": model.model.get_image_features(values["pixel_values"])}
    first = model.model(input_ids=values["input_ids"], mm_encoder_outputs=images)
    longer = torch.cat([torch.tensor([[1, 7, 8]]), values["input_ids"]], 1)
    second = model.model(input_ids=longer, mm_encoder_outputs=images)
    assert [len(ck.vlm.kept(outputs)[0]) for outputs in (first, second)] == [26, 29]
    assert set(images) == {"image"}


@pytest.mark.parametrize("name", KINDS)
def test_calls_that_the_host_refuses_are_refused_with_its_words(name: str) -> None:
    host, values = build(name), prompts(name, [1], [9])
    model = ck.patch(copy.deepcopy(host), ck.Select(0.25), hand_over=True)
    text = {key: value for key, value in values.items() if key in ("attention_mask", "token_type_ids")}
    images = {key: value for key, value in values.items() if key not in (*text, "input_ids")}
    embeds = host.get_input_embeddings()(values["input_ids"])
    encoded = {"image": host.model.get_image_features(**images, return_dict=True)}
    fewer = values["input_ids"].clone()
    fewer[0, 9] = 7
    for arguments in (
        images,
        {**values, "inputs_embeds": embeds},
        {**values, "mm_encoder_outputs": encoded},
        {**values, "input_ids": fewer},
    ):
        with pytest.raises(ValueError, match=r".+") as expected:
            host(**arguments)
        with pytest.raises(ValueError, match=r".+") as actual:
            model(**arguments)
        assert str(actual.value) == str(expected.value)


def test_image_sizes_and_models_are_checked() -> None:
    model = ck.patch(build("LlavaNext"), ck.Select(0.25), hand_over=True)
    for size in (5, (0, 5), (5, -1), (1, 2, 3), ("a", 2), (64.5, 64), torch.tensor([64, 128])):
        with pytest.raises(ValueError, match=r"(height|width) in image_size=\(height, width\) must be an int"):
            ck.vlm.image_tokens(model, size)
    assert ck.vlm.image_tokens(ck.patch(model, ck.Dense(), hand_over=True), (96, 128)) == 64 + 12 * 17
    for call in (lambda: ck.vlm.image_tokens(None), lambda: ck.patch(None, ck.Select(), hand_over=True)):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got None"):
            call()


@torch.no_grad()
def test_options_reach_the_tower_but_for_attentions() -> None:
    model = build("Llava")
    model.set_attn_implementation("eager")
    ck.patch(model, ck.Select(0.25), hand_over=True)
    outputs = model(**prompts("Llava", [1], [9]), output_attentions=True, output_hidden_states=True)
    assert outputs.attentions[0].shape[-2:] == (26, 26) and outputs.hidden_states[0].shape[1] == 26


def test_slots_that_are_cut_repeat_the_row_before_them_or_the_first() -> None:
    #  padding, a cut slot, a token, a cut slot, a token; and a row without padding
    dropped = torch.tensor([[0, 0, 1, 0, 1, 0], [0, 0, 1, 1, 0, 0]]).bool()
    visible = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    prompt = make_prompt(dropped, visible)
    assert prompt.mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]] and prompt.order[1].tolist() == [0, 1, 4, 5]
    assert prompt.slots.tolist() == [[2, 2, 2, 2, 2, 3], [0, 1, 1, 1, 2, 3]] and prompt.tail == 1
    mirrored = make_prompt(dropped.flip(1), visible.flip(1))  # padding on the right
    assert mirrored.mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]] and mirrored.tail == 0
    assert mirrored.slots.tolist() == [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 3]]


@pytest.mark.parametrize("name", ["LlavaNext", "LlavaOnevision"])
@torch.no_grad()
def test_images_of_different_sizes_share_a_text(name: str) -> None:
    model, sizes = build(name), torch.tensor([[96, 128], [64, 128]])
    host = copy.deepcopy(model)
    images = {"pixel_values": torch.randn(2, 5, 3, 64, 64), "image_sizes": sizes}
    if name == "LlavaOnevision":  # which divides only images that are alone
        images["batch_num_images"] = torch.tensor([2])
    lengths = [len(rows) for rows in host.model.get_image_features(**images).pooler_output]
    ids = torch.tensor([[1, *[IMAGE] * lengths[0], 9, *[IMAGE] * lengths[1], 8]])
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}
    ck.patch(model, ck.Select(0.25), hand_over=True)
    expected, stays = host_values(host, model, values)
    if name == "LlavaNext":
        alone = [ck.vlm.image_tokens(model, (height, width)) for height, width in sizes.tolist()]
        assert alone == [64 // 4 + 12 * 17 - 12 * 12, 64 // 4 + 8 * 17 - 8 * 12] and int(stays.sum()) == 3 + sum(alone)
    else:
        newlines = sum(lengths) - 2 * 64
        assert int(stays.sum()) == 3 + 2 * 16 + newlines
    assert torch.equal(model.generate(**values, **GREEDY), host.generate(**expected, **GREEDY))
