"""Schedules: explicit steps for one tower, as a method, as text and as a file."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import clipkernels as ck
from clipkernels.method_names import short_name
from clipkernels.testing import randomized, timm_tower
from tests.mutants import read, write

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = (ck.Merge(4), None, ck.Condense(30, 10), ck.Prune(20, fuse=False))


def test_a_schedule_gives_its_steps_to_its_tower() -> None:
    schedule = ck.Schedule(list(STEPS), 65)
    assert schedule.plan(65, 4) == ck.Plan(STEPS, 65, 1)
    assert schedule.plan(tokens=65, blocks=4, prefix=1).tokens == (65, 61, 61, 34, 21)
    assert schedule.steps == STEPS and schedule == ck.Schedule(STEPS, 65, 1)
    assert hash(schedule) == hash(ck.Schedule(STEPS, 65)) and schedule != ck.Schedule(STEPS, 66)


@pytest.mark.parametrize("other", [(66, 4, 1), (65, 5, 1), (65, 4, 0)])
def test_another_tower_is_refused_by_its_numbers(other: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError) as caught:
        ck.Schedule(STEPS, 65).plan(*other)
    tokens, blocks, prefix = other
    expected = "the schedule is for 65 tokens, 1 of them prefix, and 4 blocks"
    assert str(caught.value) == f"{expected}, got {tokens}, {prefix} and {blocks}"


@pytest.mark.parametrize(
    ("steps", "kind", "message"),
    [
        ((None, ck.Predict(3)), ValueError, r"steps\[1\] must need no predictor, got a Predict step"),
        ((None, ck.Prune(65)), ValueError, "block 1 must keep 0 to 64 patches, got 65"),
        ((ck.Merge(20), ck.Merge(23)), ValueError, "block 1 must merge 0 to 22 tokens, got 23"),
        ((ck.Condense(60, 5),), ValueError, "block 0 must keep and merge 64 patches at most"),
        ((3,), TypeError, r"steps\[0\] must be a step such as ck.Prune\(9\) or None, got 3"),
        (ck.Merge(3), TypeError, "steps must be a tuple of one step or None per block, got Merge"),
        (iter(()), TypeError, "steps must be a tuple of one step or None per block"),
    ],
)
def test_steps_that_no_tower_can_run_are_refused(steps: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ck.Schedule(steps, 65)


def test_a_plan_with_weights_has_no_schedule() -> None:
    with pytest.raises(ValueError, match=r"plan must have no learnt tokens, got 2: use ck\.PatchRanking"):
        ck.Schedule.from_plan(ck.Plan((None,), 65, 1, learnt=2))
    with pytest.raises(ValueError, match="must need no predictor"):
        ck.Schedule.from_plan(ck.Plan((ck.Predict(9),), 65))
    with pytest.raises(TypeError, match=r"plan must be a ck\.Plan, got EViT"):
        ck.Schedule.from_plan(ck.EViT(0.5))  # type: ignore[arg-type]


def test_the_repr_rebuilds_it_and_the_name_is_short() -> None:
    schedule = ck.Schedule(STEPS, 65)
    assert eval(repr(schedule), vars(ck)) == schedule and "\n" not in repr(schedule)
    assert str(schedule) == short_name(schedule) and str(schedule).startswith("Schedule(65→21, ")
    other = ck.Schedule((*STEPS[:3], ck.Prune(20, fuse=False, seed=1)), 65)
    assert str(other) != str(schedule) and len(str(ck.Schedule([None] * 48, 2**20))) < 36


TOWERS: dict[str, Callable[[], torch.nn.Module]] = {
    "cls": lambda: ck.bundled()[0],
    "no prefix": lambda: timm_tower("vit_base_patch16_siglip_224", 4, img_size=64),
    "registers": lambda: timm_tower("vit_small_patch14_reg4_dinov2", 4, img_size=56),
}


@pytest.mark.parametrize("name", TOWERS)
def test_a_frozen_method_gives_the_bits_of_the_method(name: str) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    model = randomized(TOWERS[name]())
    tower = ck.tower_of(model)
    images = torch.randn(2, 3, *tower.image_size, generator=torch.Generator().manual_seed(0))
    prefix = {"cls": 1, "no prefix": 0, "registers": 5}[name]
    methods = (ck.EViT(0.5, blocks=(1,)), ck.EViT(0.5, (1,), score="random", seed=3), ck.ToMe(2), ck.Dense())
    for method in (*methods, ck.TCA(0.2, blocks=(1,))) if name != "registers" else methods:
        frozen = ck.Schedule.from_plan(method.plan(tower.num_tokens, len(tower.blocks), prefix))
        expected = ck.encode_image(ck.patch(model, method), images, source=True)
        assert ck.method_of(ck.patch(model, frozen)) is frozen
        actual = ck.encode_image(model, images, source=True)
        assert torch.equal(actual.embedding, expected.embedding)
        assert actual.source is not None and torch.equal(actual.source, expected.source)
        assert f"clipkernels: {frozen}" in repr(model)
        ck.unpatch(model)
    with pytest.raises(ValueError, match=f"the schedule is for 99 tokens, 1 of them prefix, .* got {tower.num_tokens}"):
        ck.patch(model, ck.Schedule([None] * len(tower.blocks), 99))
    assert ck.method_of(model) is None


def test_images_of_another_size_are_refused_and_the_model_is_kept() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    model = timm_tower("vit_small_patch16_224", 2, img_size=64, dynamic_img_size=True)
    schedule = ck.Schedule([ck.Merge(3), None], 17)
    ck.patch(model, schedule)
    with pytest.raises(ValueError, match="is for 17 tokens, 1 of them prefix, and 2 blocks, got 26, 1 and 2"):
        model(torch.zeros(1, 3, 80, 80))
    assert ck.method_of(model) is schedule and model(torch.zeros(1, 3, 64, 64)).isfinite().all()


def test_a_tower_without_cls_ranks_by_the_attention_received() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    model = randomized(timm_tower("vit_base_patch16_siglip_224", 2, img_size=64))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    by_cls, received = (
        ck.encode_image(ck.patch(model, ck.Schedule((ck.Prune(9, signal=signal), None), 16, 0)), images).embedding
        for signal in ("cls", "received")
    )
    assert torch.equal(by_cls, received)


def test_a_file_holds_counts_and_steps(tmp_path: Path) -> None:
    file, again, schedule = tmp_path / "a.json", tmp_path / "b.json", ck.Schedule(STEPS, 65)
    schedule.save(file)
    ck.Schedule.load(file).save(again)
    assert ck.Schedule.load(str(file)) == schedule and file.read_bytes() == again.read_bytes()
    content = json.loads(file.read_text())
    assert content["format"] == "clipkernels.schedule.1" and content["tokens"] == [65, 61, 61, 34, 21]
    assert content["prefix"] == 1 and content["steps"][1] is None
    assert content["steps"][3] == {
        "name": "Prune", "arguments": {"keep": 20, "fuse": False, "signal": "cls", "seed": 0}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens": [65, 61, 61, 34, 20]}, "other token counts than its steps give"),
        ({"tokens": []}, "entry must be an int of at least 1, got 0"),
        ({"learnt": 2}, "other token counts than its steps give"),
        ({"learnt": 99}, "entry must be an int of at least 1, got -34"),
        ({"learnt": 2, "tokens": [67, 63, 63, 36, 21]}, "plan must have no learnt tokens, got 2"),
        ({"steps": [{"name": "Predict", "arguments": {"keep": 9, "macs": 0}}], "tokens": [10, 10]}, "no predictor"),
        ({"steps": [{"name": "eval", "arguments": {}}], "tokens": [10, 10]}, "a step that is none of Condense, Merge"),
        ({"steps": [{"name": "Merge", "arguments": {}}], "tokens": [9, 9]}, "a Merge with other arguments: 'propor"),
        ({"steps": [{"name": "Plan", "arguments": {"steps": 1}}], "tokens": [10, 10]}, "a step that is none of"),
        ({"steps": {}}, "a wrong header: Expected `array`, got `object` - at `$.steps`"),
    ],
)
def test_a_signed_file_with_a_wrong_plan_is_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    file = tmp_path / "schedule.json"
    ck.Schedule(STEPS, 65).save(file)
    header, tensors = read(file)
    write(file, {**header, **change}, tensors)
    with pytest.raises(ValueError) as caught:
        ck.Schedule.load(file)
    message = str(caught.value)
    assert message.startswith(f"expected a schedule of ck.Schedule.save (clipkernels.schedule.1), got {file} with ")
    assert reason in message and "\n" not in message


def test_a_schedule_that_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "schedule.json"
    with pytest.raises(ValueError, match=r"to write to .* got one with a wrong header"):
        ck.Schedule([None], 2**21).save(file)
    with pytest.raises(OSError, match="nowhere"):
        ck.Schedule([None], 9).save(tmp_path / "nowhere" / "a.json")
    for call in (ck.Schedule([None], 9).save, ck.Schedule.load):
        with pytest.raises(TypeError, match="path must be a path, got 3"):
            call(3)
    assert not list(tmp_path.iterdir())


def test_an_artefact_keeps_it_in_its_record(tmp_path: Path) -> None:
    model, preprocess, tokenizer = ck.bundled()
    schedule = ck.Schedule((ck.Merge(9), None, ck.Prune(20), None, None, None), 65)
    ck.save(ck.patch(model, schedule), tmp_path / "tower", tokenizer=tokenizer, preprocess=preprocess)
    loaded = ck.load(tmp_path / "tower").model
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert ck.method_of(loaded) == schedule
    assert torch.equal(ck.encode_image(loaded, images).embedding, ck.encode_image(model, images).embedding)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ("steps", [3] * 6, "steps[0] must be a step"),
        ("steps", "text", "steps must be a tuple"),
        ("steps", [{"name": "Gather", "arguments": {}}] * 6, "a step that is none of"),
        ("steps", [None] * 5, "the schedule is for 65 tokens, 1 of them prefix, and 5 blocks, got 65, 1 and 6"),
        ("steps", [None] * 6, "expected the plan of Schedule(65→65"),
        ("tokens", 64, "the schedule is for 64 tokens"),
        ("module", 1, "expected arguments of Schedule, got 'module'"),
    ],
)
def test_an_artefact_with_another_schedule_is_refused(place: str, value: Any, reason: str, tmp_path: Path) -> None:
    model, folder = ck.bundled()[0], tmp_path / "tower"
    ck.save(ck.patch(model, ck.Schedule((ck.Merge(9), *[None] * 5), 65)), folder)
    header, tensors = read(folder / "clipkernels.json")
    header["method"]["arguments"][place] = value
    write(folder / "clipkernels.json", header, tensors)
    with pytest.raises(ValueError) as caught:
        ck.load_method(ck.bundled()[0], folder)
    assert reason in str(caught.value) and str(folder) in str(caught.value)


def test_copies_and_pickles_keep_it() -> None:
    schedule = ck.Schedule(STEPS, 65)
    assert copy.deepcopy(schedule) == schedule == pickle.loads(pickle.dumps(schedule))
