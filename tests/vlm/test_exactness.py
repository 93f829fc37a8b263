"""Logits, losses and gradients of a shortened prompt, against the host at full length and at the cut length."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import clipkernels as ck
from clipkernels.vlm.prompt import cache_of, stays_of
from tests.vlm.models import IMAGE, KINDS, build, prompts
from tests.vlm.test_generation import host_values

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = {
    "EViT": ck.EViT(0.5, blocks=(1,), fuse=False),
    "ToMe": ck.ToMe(8),
    "TCA": ck.TCA(0.1, blocks=(0, 1)),
    "TCA twice": ck.TCA(0.1, blocks=(0, 2)),
}


def methods() -> list[Any]:
    cases = [pytest.param(name, ck.Select(0.25), id=f"{name}-Select") for name in KINDS]
    cases += [pytest.param(name, ck.Select(0.5, "received", -3, False), id=f"{name}-received") for name in KINDS]
    cases += [
        pytest.param(name, method, id=f"{name}-{label}")
        for name in KINDS
        if KINDS[name].steps
        for label, method in STEPS.items()
    ]
    return cases


def text_of(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if name in ("input_ids", "attention_mask", "token_type_ids")}


@pytest.mark.parametrize("mask", ["mask", "no mask"])
@pytest.mark.parametrize(("name", "method"), methods())
@torch.no_grad()
def test_logits_are_those_of_the_host_without_the_slots(name: str, method: Any, mask: str) -> None:
    model = build(name)
    values = prompts(name, [1, 1], [9, 9]) if mask == "no mask" else prompts(name, [1, 2], [12, 7])
    host = copy.deepcopy(model)
    ck.patch(model, method, hand_over=True)
    expected, stays = host_values(host, model, values)
    if mask == "no mask":
        del values["attention_mask"]
        first = 1 if name == "PaliGemma" else 0
        expected["position_ids"] = torch.arange(stays.shape[1])[None] + first
    else:
        values["position_ids"] = expected["position_ids"]
    actual = model(**values, use_cache=False).logits
    wanted = host(**expected, use_cache=False).logits
    assert actual.shape == wanted.shape and actual.isfinite().all()
    torch.testing.assert_close(actual[stays], wanted[stays], rtol=1e-5, atol=1e-5 * float(wanted.std()))
    assert torch.equal(model(**values).logits, actual)


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradients_are_those_of_the_cut_prompt(name: str) -> None:
    model = build(name).train()
    values = prompts(name, [1, 1], [9, 9])
    labels = values["input_ids"].masked_fill(values["input_ids"] == IMAGE, -100)
    by_hand = copy.deepcopy(model)
    ck.patch(model, ck.Select(0.25, merge_rest=False), hand_over=True)
    outputs = model(**values, labels=labels, use_cache=False)
    outputs.loss.backward()
    # Without hand-over every row goes through the projector, and rows are cut by hand.
    with torch.no_grad():
        stays = stays_of(model.model(**values))
    text = text_of(values)
    images = {key: value for key, value in values.items() if key not in text}
    rows = torch.cat([part.flatten(0, -2) for part in by_hand.model.get_image_features(**images).pooler_output])
    embeds = by_hand.get_input_embeddings()(values["input_ids"])
    embeds = embeds.masked_scatter((values["input_ids"] == IMAGE)[..., None], rows)
    count = int(stays[0].sum())

    def cut(x: Tensor) -> Tensor:
        return x[stays].unflatten(0, (2, count))

    arguments = {"attention_mask": cut(text["attention_mask"]), "inputs_embeds": cut(embeds)}
    first = 1 if name == "PaliGemma" else 0
    arguments["position_ids"] = cut(torch.arange(stays.shape[1]).expand_as(stays) + first)
    if "token_type_ids" in text:
        arguments["token_type_ids"] = cut(text["token_type_ids"])
    expected = by_hand(**arguments, labels=cut(labels), use_cache=False)
    expected.loss.backward()
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-5, atol=1e-5)
    compared = 0
    for (parameter_name, parameter), other in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        if other.grad is None:
            assert parameter.grad is None or not parameter.grad.any(), parameter_name
            continue
        compared += 1
        scale = float(other.grad.abs().max()) + 1e-6
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-4 * scale, msg=parameter_name)
    assert compared > 40


@pytest.mark.parametrize("method", [ck.Select(1.0), ck.Dense()], ids=str)
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_keeping_everything_gives_the_logits_of_the_host(name: str, method: Any) -> None:
    model, values = build(name), prompts(name, [1, 2], [12, 7])
    expected = model(**values).logits
    ck.patch(model, method, hand_over=True)
    outputs = model(**values)
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    assert cache_of(outputs).get_seq_length() == values["input_ids"].shape[1]


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_undo_gives_the_host_back_bit_for_bit(name: str) -> None:
    model, values = build(name), prompts(name, [1, 2], [12, 7])
    expected, classes = model(**values).logits, [type(module) for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    ck.patch(model, ck.Select(0.5), hand_over=True)
    assert not torch.equal(model(**values).logits, expected)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    ck.unpatch(model)
    assert torch.equal(model(**values).logits, expected)
    assert [type(module) for module in model.modules()] == classes
    with ck.patched(model, ck.Dense()):  # without hand-over
        torch.testing.assert_close(model(**values).logits, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    assert [type(module) for module in model.modules()] == classes
