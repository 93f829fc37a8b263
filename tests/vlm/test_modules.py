"""Modules with a hand-over beside others: replaced forwards, wrappers, and parts that are copied or pickled alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import clipkernels as ck
from clipkernels.vlm.prompt import cache_of
from tests.vlm.models import build, prompts

pytestmark = pytest.mark.usefixtures("one_thread")
HOOKED = ["model", "model.multi_modal_projector", "model.vision_tower.post_layernorm"]


def layered(model: nn.Module) -> list[str]:
    """Names of the modules whose class has layers."""
    return [name for name, module in model.named_modules() if hasattr(type(module), "_layers")]


@pytest.mark.parametrize("name", HOOKED)
@torch.no_grad()
def test_a_replaced_forward_is_refused(name: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model, values = build("Llava"), prompts("Llava", [1], [5])
    module, hook = model.get_submodule(name), hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
    hooks.add_hook_to_module(module, hook)
    message = f"the forward of {type(module).__name__} was replaced: patch the model first"
    with pytest.raises(ck.UnsupportedTower, match=message):
        ck.patch(model, ck.Select(0.25), hand_over=True)
    assert ck.method_of(model) is None and not layered(model)
    hooks.remove_hook_from_module(module)
    vars(module).pop("forward")
    dense = model(**values).logits
    ck.patch(model, ck.Select(0.25), hand_over=True)
    expected = model(**values).logits
    hooks.add_hook_to_module(module, hook)  # after the patch it calls the layer
    assert torch.equal(model(**values).logits, expected)
    for call in (lambda: ck.unpatch(model), lambda: ck.patch(model, ck.ToMe(4))):
        with pytest.raises(ck.UnsupportedTower, match=message):
            call()
    assert torch.equal(model(**values).logits, expected)
    hooks.remove_hook_from_module(module)
    ck.unpatch(model)
    assert torch.equal(model(**values).logits, dense) and not layered(model)


@pytest.mark.parametrize("order", ["wrapped before", "wrapped after"])
@torch.no_grad()
def test_a_projector_that_is_wrapped_is_handed_over(order: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    values, dense = prompts("Llava", [1], [5]), build("Llava")
    expected = ck.patch(copy.deepcopy(dense), ck.Select(0.25), hand_over=True)(**values).logits
    model: Any = build("Llava")
    if order == "wrapped before":
        model = ck.patch(peft.get_peft_model(model, config), ck.Select(0.25), hand_over=True)
    else:
        model = peft.get_peft_model(ck.patch(model, ck.Select(0.25), hand_over=True), config)
    assert torch.equal(model(**values).logits, expected)
    ck.unpatch(model)
    assert torch.equal(model(**values).logits, dense(**values).logits) and not layered(model)


def test_a_tower_alone_is_copied_and_pickled_without_its_model() -> None:
    host = build("Llava")
    model = ck.patch(copy.deepcopy(host), ck.Select(0.25), hand_over=True)
    alone = len(pickle.dumps(model.model.vision_tower)) - len(pickle.dumps(host.model.vision_tower))
    assert alone < sum(parameter.numel() for parameter in model.model.language_model.parameters())
    for tower in (copy.deepcopy(model.model.vision_tower), pickle.loads(pickle.dumps(model.model.vision_tower))):
        ck.unpatch(tower)
        assert not layered(tower)
    assert len(layered(model)) == 4


@torch.no_grad()
def test_a_block_of_code_may_hand_over() -> None:
    model, values = build("Llava"), prompts("Llava", [1], [5])
    dense = model(**values).logits
    with ck.patched(model, ck.Select(0.25), hand_over=True):
        assert cache_of(model(**values)).get_seq_length() == 22
    assert torch.equal(model(**values).logits, dense) and not layered(model)


@pytest.mark.parametrize("name", ["Llava", "Gemma3", "Idefics3", "LlavaNext"])
def test_recomputed_activations_give_the_same_gradients(name: str) -> None:
    model, values = build(name).train(), prompts(name, [1, 1], [9, 9])
    ck.patch(model, ck.Select(0.25), hand_over=True)
    labels = values["input_ids"].clone()
    model(**values, labels=labels, use_cache=False).loss.backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**values, labels=labels, use_cache=False).loss.backward()
    actual = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert actual.keys() == expected.keys()
    for key, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-5, msg=key)
