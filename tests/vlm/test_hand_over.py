"""The patch with a hand-over: counts, refusals, copies, compilation, adapters, and what it leaves of a model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipkernels as ck
from clipkernels.testing import patch_ranking, randomized
from clipkernels.vlm.prompt import cache_of, stays_of
from tests.vlm.models import IMAGE, KINDS, SIDE, TEXT, VISION, _llama, _paligemma_config, build, prompts, transformers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_the_number_of_image_tokens_is_known_before_the_forward(name: str) -> None:
    model, kind = build(name), KINDS[name]
    tiled = name in ("LlavaNext", "LlavaOnevision")
    values = prompts(name, [1], [5])
    for method in (ck.Select(0.3), ck.Select(0.01), ck.Select(1.0), ck.Dense()):
        if not (tiled and isinstance(method, ck.Dense)):
            ck.patch(model, method, hand_over=True)
            count = ck.vlm.image_tokens(model, (96, 128) if tiled else None)
            (rows,) = ck.vlm.kept(model.model(**values))
            assert len(rows) == count + 6, method
    assert count == kind.slots
    ck.unpatch(model)
    with pytest.raises(ValueError, match="expected a model patched with hand_over=True, got one that is not"):
        ck.vlm.image_tokens(model)
    if tiled:
        ck.patch(model, ck.Select(0.3), hand_over=True)
        with pytest.raises(ValueError, match=r"expected image_size=\(height, width\), because LLaVA"):
            ck.vlm.image_tokens(model)


@pytest.mark.parametrize(("layer", "tokens"), [(-2, 32), (2, 48), ([1, 2], 48), (-1, 24)])
@torch.no_grad()
def test_the_feature_layer_decides_how_many_steps_count(layer: Any, tokens: int) -> None:
    vision = transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=_llama(), image_token_index=IMAGE, vision_feature_layer=layer
    )
    model: Any = randomized(transformers.LlavaForConditionalGeneration(config).eval())
    ck.patch(
        model, ck.Schedule([None, ck.Prune(48, False), ck.Prune(32, False), ck.Prune(24, False)], 65), hand_over=True
    )
    assert ck.vlm.image_tokens(model) == tokens
    (rows,) = ck.vlm.kept(model.model(**prompts("Llava", [1], [5])))
    assert len(rows) == tokens + 6


@torch.no_grad()
def test_a_tower_that_passes_cls_on_keeps_it() -> None:
    vision, options = transformers.CLIPVisionConfig(**VISION), {"vision_feature_select_strategy": "full"}
    config = transformers.LlavaConfig(vision_config=vision, text_config=_llama(), image_token_index=IMAGE, **options)
    model: Any = randomized(transformers.LlavaForConditionalGeneration(config).eval())
    ck.patch(model, ck.Select(0.25), hand_over=True)
    rows = model.model.get_image_features(torch.randn(1, 3, SIDE, SIDE)).pooler_output[0]
    assert ck.vlm.image_tokens(model) == 17 and rows.shape[0] == 65 and rows[0].isfinite().all()
    assert int((~rows[:, 0].isnan()).sum()) == 17


@pytest.mark.parametrize("name", KINDS)
def test_methods_whose_tokens_cannot_be_handed_over_are_refused(name: str) -> None:
    model = build(name)
    classes = [type(module) for module in model.modules()]
    if KINDS[name].steps:
        refusals = {
            r"a fused token has no position in a prompt: use fuse=False, got EViT": ck.EViT(0.5),
            "a fused token without patches has no position": ck.Schedule(
                [ck.Condense(60, 4), None, None, None], ck.tower_of(model).num_tokens, ck.tower_of(model).prefix
            ),
        }
    else:
        reason = "crops padding when it packs" if name.startswith("Llava") else "pools the grid of a whole tower"
        refusals = {rf"{reason}.*: use ck\.Select": ck.ToMe(4)}
        refusals[r"cannot shorten its prompt: .* got EViT"] = ck.EViT(0.5, fuse=False)
    for message, method in refusals.items():
        with pytest.raises(ValueError, match=message):
            ck.patch(model, method, hand_over=True)
    with pytest.raises(ValueError, match=r"ck.Select|layer must be one of 4 blocks"):
        ck.patch(model, ck.Select(layer=9), hand_over=True)
    with pytest.raises(ValueError, match="chooses tokens of a prompt"):
        ck.patch(model, ck.Select())
    assert [type(module) for module in model.modules()] == classes and ck.method_of(model) is None


def other_models() -> dict[str, Callable[[], nn.Module]]:
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}

    def pixtral() -> nn.Module:
        vision = transformers.PixtralVisionConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=2)
        return transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(vision_config=vision, text_config=_llama())
        )

    def internvl() -> nn.Module:
        vision = transformers.InternVLVisionConfig(**{**VISION, "image_size": [64, 64], "patch_size": [8, 8]})
        return transformers.InternVLForConditionalGeneration(
            transformers.InternVLConfig(
                vision_config=vision, text_config=transformers.Qwen2Config(**text), image_seq_length=16
            )
        )

    def qwen() -> nn.Module:
        config = transformers.Qwen2VLConfig(
            vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}, text_config=text
        )
        return transformers.Qwen2VLForConditionalGeneration(config)

    def clip() -> nn.Module:
        return transformers.CLIPModel(transformers.CLIPConfig(vision_config=VISION))

    return {"PixtralVisionModel": pixtral, "InternVLModel": internvl, "Qwen2VLModel": qwen, "CLIPModel": clip}


@pytest.mark.parametrize("name", other_models())
def test_other_models_are_refused_by_name(name: str) -> None:
    model = other_models()[name]()
    with pytest.raises(ck.UnsupportedTower, match=f"got .*{name}"):
        ck.patch(model, ck.Select(), hand_over=True)


def test_an_old_transformers_is_refused_by_version(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Llava")
    monkeypatch.setattr("transformers.__version__", "5.22.1")
    with pytest.raises(ck.UnsupportedTower, match=r"takes transformers 5\.23 or later, got 5\.22\.1: update it"):
        ck.patch(model, ck.Select(), hand_over=True)
    assert ck.method_of(model) is None


def test_a_tower_that_is_not_finite_is_an_error() -> None:
    for name in ("Llava", "LlavaNext"):
        model, values = build(name), prompts(name, [1], [5])
        ck.patch(model, ck.Select(0.25), hand_over=True)
        values["pixel_values"][0, ..., 3, 3] = float("nan")
        with torch.no_grad(), pytest.raises(ValueError, match=r"image 0: expected \d+ image tokens .* not finite"):
            model(**values)


@torch.no_grad()
def test_videos_are_refused() -> None:
    model, values = build("LlavaOnevision"), prompts("LlavaOnevision", [1], [5])
    ck.patch(model, ck.Select(0.25), hand_over=True)
    with pytest.raises(ValueError, match="takes images, got a video"):
        model(**values, pixel_values_videos=torch.zeros(1, 2, 3, SIDE, SIDE))


@torch.no_grad()
def test_copies_pickles_and_checkpoints_are_those_of_the_host(tmp_path: Path) -> None:
    model, values = build("PaliGemma"), prompts("PaliGemma", [1], [5])
    model.save_pretrained(tmp_path / "before")
    ck.patch(model, ck.Select(0.25), hand_over=True)
    model.save_pretrained(tmp_path / "after")
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "after").iterdir())
    assert all((tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes() for file in files)
    expected = model(**values).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**values).logits, expected)
        ck.unpatch(other)
        assert not torch.equal(other(**values).logits, expected)
    tower = copy.deepcopy(model.model.vision_tower)
    ck.unpatch(tower)  # the copy of a tower alone has no container
    assert torch.equal(model(**values).logits, expected)
    ck.unpatch(model.model.vision_tower)
    assert type(model.model).__name__ == "PaliGemmaModel" and not hasattr(type(model.model), "_layers")


@torch.no_grad()
def test_a_patch_inside_a_patch_is_undone() -> None:
    model, values = build("Llava"), prompts("Llava", [1], [5])
    dense = model(**values).logits
    ck.patch(model, ck.Select(0.25), hand_over=True)
    expected = model(**values).logits
    with ck.patched(model, ck.ToMe(4)):  # which leaves every slot
        assert cache_of(model(**values)).get_seq_length() == values["input_ids"].shape[1]
    assert torch.equal(model(**values).logits, expected)
    with pytest.raises(ValueError, match="fuse=False"):
        ck.patch(model, ck.EViT(0.5), hand_over=True)
    assert torch.equal(model(**values).logits, expected)
    ck.patch(model, ck.EViT(0.5, fuse=False), hand_over=True)
    ck.unpatch(model)
    assert torch.equal(model(**values).logits, dense)


@torch.no_grad()
def test_weights_of_a_method_are_handed_over() -> None:
    model = build("PaliGemma")
    ck.patch(model, patch_ranking(model, 0.5, learnt=2), hand_over=True)
    (rows,) = ck.vlm.kept(model.model(**prompts("PaliGemma", [1], [5])))
    assert ck.vlm.image_tokens(model) == 32 and len(rows) == 38


@pytest.mark.parametrize("method", [ck.Select(0.25), ck.Select(0.5, "received"), ck.ToMe(8), ck.TCA(0.1)], ids=str)
@torch.no_grad()
def test_kernels_hand_over_what_the_reference_does(
    method: Any, device: Any, triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ck.patch(build("Llava"), method, hand_over=True).to(device)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).to(device)
    rows = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("CLIPKERNELS_BACKEND", backend)
        rows[backend] = torch.stack(list(model.model.get_image_features(pixels).pooler_output))
    assert 0 < int(rows["triton"][..., 0].isnan().sum()) < 128
    torch.testing.assert_close(rows["triton"], rows["reference"], rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("method", [ck.Select(0.25), ck.ToMe(8), ck.TCA(0.1), ck.EViT(0.5, fuse=False)], ids=str)
@pytest.mark.parametrize("name", ["Llava", "PaliGemma", "Gemma3"])
@torch.no_grad()
def test_a_tower_compiles_to_one_graph(name: str, method: Any) -> None:
    if not (KINDS[name].steps or isinstance(method, ck.Select)):
        method = ck.Select(0.5, "received", merge_rest=False)
    model, values = build(name), prompts(name, [1], [5])
    ck.patch(model, method, hand_over=True)
    expected = model(**values).logits
    torch._dynamo.reset()
    model.model.vision_tower.forward = torch.compile(model.model.vision_tower.forward, fullgraph=True, backend="eager")
    actual = model(**values).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.std()))


def test_a_step_of_lora_is_that_of_the_cut_prompt() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    values = prompts("Llava", [1, 1], [9, 9])
    labels = values["input_ids"].masked_fill(values["input_ids"] == IMAGE, -100)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "linear_1"], lora_dropout=0.0)

    def adapted() -> Any:
        model = build("Llava")
        torch.manual_seed(3)
        return peft.get_peft_model(model, config, autocast_adapter_dtype=False)

    actual, by_hand = adapted(), adapted()
    host: Any = by_hand.base_model.model
    ck.patch(actual, ck.Select(0.25, merge_rest=False), hand_over=True)
    rows = torch.cat(host.model.get_image_features(values["pixel_values"]).pooler_output)
    with torch.no_grad():
        stays = stays_of(actual.base_model.model.model(**values))
    embeds = host.get_input_embeddings()(values["input_ids"])
    embeds = embeds.masked_scatter((values["input_ids"] == IMAGE)[..., None], rows)

    def cut(x: Tensor) -> Tensor:
        return x[stays].unflatten(0, (2, int(stays[0].sum())))

    positions = torch.arange(stays.shape[1]).expand_as(stays)
    cut_values = {"inputs_embeds": cut(embeds), "position_ids": cut(positions), "labels": cut(labels)}
    cut_values["attention_mask"] = torch.ones_like(cut_values["labels"])
    for model, arguments in ((actual, {**values, "labels": labels}), (by_hand, cut_values)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        model(**arguments).loss.backward()
        optimizer.step()
    pairs = dict(actual.named_parameters())
    moved = 0
    for name, parameter in by_hand.named_parameters():
        if "lora_B" in name and "vision" not in name:
            moved += bool(parameter.abs().max() > 1e-4)
        torch.testing.assert_close(pairs[name], parameter, rtol=1e-4, atol=1e-5, msg=name)
    assert moved >= 4


@torch.no_grad()
def test_vectors_of_colpali_are_distinct_and_maxsim_is_unchanged() -> None:
    torch.manual_seed(0)
    config = transformers.ColPaliConfig(vlm_config=_paligemma_config(), embedding_dim=16)
    model: Any = randomized(transformers.ColPaliForRetrieval(config).eval())
    values = prompts("PaliGemma", [1, 1], [9, 5])
    del values["token_type_ids"]
    ck.patch(model, ck.Select(0.25), hand_over=True)
    outputs = model(**values)
    vectors = ck.vlm.kept(outputs)
    assert outputs.embeddings.shape[1] == values["input_ids"].shape[1]
    assert [len(rows) for rows in vectors] == [16 + 10, 16 + 6]
    query = torch.nn.functional.normalize(torch.randn(7, 16), dim=-1)
    for image, rows in enumerate(vectors):
        assert len(rows.unique(dim=0)) == len(rows)
        visible = outputs.embeddings[image][values["attention_mask"][image].bool()]
        assert torch.equal((query @ visible.T).amax(1), (query @ rows.T).amax(1))
    with pytest.raises(ValueError, match=r"expected outputs with embeddings .* got ColPaliForRetrievalOutput"):
        ck.vlm.kept(model(input_ids=torch.tensor([[1, 5, 6]]), attention_mask=torch.ones(1, 3).long()))
