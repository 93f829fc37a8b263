"""Recovery of towers: the steps, what is trained and what is left alone, what is kept, errors."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import clipkernels as ck
from clipkernels.learn.adamw import generator_of, rate_at
from clipkernels.learn.patch_ranking import RankPredictor
from clipkernels.learn.recovery import Progress, recover
from clipkernels.learn.recovery.results import closeness_of
from clipkernels.testing import openai_tower, randomized, timm_tower
from tests.learn.recovering import OPTIONS, noise, run, small_tower, state_of
from tests.local_transformers import clip_model, siglip_model

pytestmark = pytest.mark.usefixtures("one_thread")
EVIT = ck.EViT(0.5)


@torch.no_grad()
def embed(model: Any, images: Tensor) -> Tensor:
    """L2-normalised embeddings by the host's own forward."""
    return normalize(ck.tower_of(model).encode(images), dim=1)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """True if two states are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_steps_are_those_of_a_literal_loop() -> None:
    images, model, other = noise(22), small_tower(), small_tower()
    result = recover(model, images, method=EVIT, epochs=2, batch_size=8, held_out=4, lr=1e-3, warmup=0.4, seed=5,
                     contrast=0.5)  # fmt: skip
    with ck.patched(other, ck.Dense()):
        dense = embed(other, images)
    order = torch.randperm(22, generator=generator_of(5, "held out"))
    held_out, train = order[:4].sort().values, order[4:].sort().values
    ck.patch(other, EVIT)
    weights = list(other.visual.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0)
    rates = iter([0.5, 1.0, 1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.5 * (1 + math.cos(0.75 * math.pi))])
    losses: list[list[float]] = []
    expected = [closeness_of(embed(other, images[held_out]), dense[held_out])]
    for epoch in range(2):
        losses.append([])
        for batch in train[torch.randperm(18, generator=generator_of(5, f"epoch {epoch}"))].split(8):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * next(rates)
            reduced = normalize(other.encode_image(images[batch]), dim=1)
            loss = (1 - (reduced * dense[batch]).sum(1)).mean()
            own = (reduced @ dense[batch].T / 0.01).log_softmax(1).diagonal()
            loss = loss + 0.5 * -own.mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            losses[-1] += [float(loss.detach())] * len(batch)
        expected.append(closeness_of(embed(other, images[held_out]), dense[held_out]))
    for actual, wanted in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-6, rtol=1e-4)
    for evaluation, closeness in zip(result.history, expected, strict=True):
        assert evaluation.closeness == pytest.approx(closeness, abs=1e-6)
    assert [each.step for each in result.history] == [0, 3, 6]
    assert [each.loss for each in result.history] == pytest.approx([0, *map(np.mean, losses)], rel=1e-4)
    assert (result.images, result.held_out, result.steps, result.stopped) == (18, 4, 6, False)


def test_the_figures_are_those_of_the_model_that_comes_out() -> None:
    images, model = noise(), small_tower()
    dense = embed(model, images)
    result = run(model)
    held_out = torch.randperm(40, generator=generator_of(OPTIONS["seed"], "held out"))[:6].sort().values
    assert ck.method_of(model) == EVIT
    assert result.after == pytest.approx(closeness_of(embed(model, images[held_out]), dense[held_out]), abs=1e-6)
    assert result.before is not None and result.after is not None
    assert result.before == result.history[0].closeness and result.after.cosine > result.before.cosine + 0.005
    best = max(result.history, key=lambda evaluation: evaluation.closeness.cosine)
    assert (result.best_step, result.after) == (best.step, best.closeness)


def test_only_the_image_tower_changes_and_modes_and_flags_stay() -> None:
    model = small_tower().train()
    model.visual.ln_pre.eval()
    model.visual.proj.requires_grad_(False)
    model.visual.conv1.weight.grad = torch.ones_like(model.visual.conv1.weight)
    model.text_projection.requires_grad_(False)
    before, generator = state_of(model), torch.get_rng_state()
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    run(model, epochs=1)
    assert torch.equal(torch.get_rng_state(), generator)
    assert flags == {name: weight.requires_grad for name, weight in model.named_parameters()}
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert (model.visual.conv1.weight.grad == 1).all() and model.visual.class_embedding.grad is None
    changed = {name for name, tensor in state_of(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, _ in model.named_parameters() if name.startswith("visual.")}


def test_the_same_seed_gives_the_same_bits() -> None:
    states = []
    for seed in (1, 1, 2):
        model = small_tower()
        torch.manual_seed(len(states))
        result = run(model, seed=seed, epochs=1)
        states.append((state_of(model), result))
    assert same(states[0][0], states[1][0]) and states[0][1] == states[1][1]
    assert not same(states[0][0], states[2][0])


class Lazy(Sequence[Any]):
    """Images that are read one by one; those of `absent` are None, and reading that of `broken` is an error."""

    def __init__(self, images: Tensor, absent: tuple[int, ...] = (), broken: int | None = None) -> None:
        self.images, self.absent, self.broken, self.reads = images, absent, broken, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        if index == self.broken and self.reads > len(self):
            raise OSError("no such image")
        return None if index in self.absent else self.images[index]


def test_images_are_read_when_they_are_needed_and_none_is_skipped() -> None:
    images, models = noise(), [small_tower() for _ in range(3)]
    keep = [index for index in range(40) if index not in (0, 1, 2, 3, 17)]
    lazy = Lazy(images, absent=(0, 1, 2, 3, 17))
    options = {"method": EVIT, **OPTIONS, "epochs": 2, "batch_size": 4}
    result = recover(models[0], lazy, **options)
    assert result.skipped == (0, 1, 2, 3, 17) and (result.images, result.held_out) == (29, 6)
    assert lazy.reads == 40 + 2 * 29 + 3 * 6
    again = recover(models[1], images[keep], **options)
    assert again.after == pytest.approx(result.after, abs=1e-4)  # batches of other sizes round differently
    assert again.history[2].loss == pytest.approx(result.history[2].loss, rel=1e-2)
    recover(models[2], lazy, workers=2, **options)
    assert same(state_of(models[0]), state_of(models[2]))


def test_a_training_that_comes_no_closer_changes_nothing() -> None:
    model = small_tower()
    before = state_of(model)
    result = run(model, lr=0.3, epochs=9, patience=2, warmup=0.0)
    assert len(result.history) == 3 and result.steps == 10 and result.best_step == 0
    assert result.after == result.before and same(state_of(model), before) and ck.method_of(model) == EVIT


def test_errors_leave_the_model_as_it_was() -> None:
    cases: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
        (lambda model: run(model, lr=1e30), ValueError, r"lr must keep all numbers finite, got 1e\+30, which makes"),
        (lambda model: recover(model, Lazy(noise(), broken=20), method=EVIT, **OPTIONS), OSError, "no such image"),
        (lambda model: run(model, held_out=40), ValueError, "held_out must leave an image to train on, got 40 of 40 "),
        (lambda model: recover(model, noise(1), method=EVIT), ValueError, "images must hold at least two images"),
        (lambda model: recover(model, noise()[..., :16], method=EVIT), ValueError, r"images\[0\]: images must be "),
        (lambda model: recover(model, [None] * 3, method=EVIT), ValueError, "got 0$"),
        (lambda model: recover(model, [7, 7], method=EVIT), TypeError, r"images\[0\]: images must be a tensor"),
        (lambda model: recover(model, noise() * math.inf, method=EVIT), ValueError, r"finite .* images\[0\]"),
    ]
    model = small_tower()
    model.visual.proj.requires_grad_(False)
    before = state_of(model)
    for patched in (False, True):
        for call, kind, message in cases:
            with pytest.raises(kind, match=message):
                call(model)
            assert same(state_of(model), before) and not model.visual.proj.requires_grad
            assert model.visual.conv1.weight.grad is None
            assert ck.method_of(model) == (ck.ToMe(2) if patched else None)
        ck.patch(model, ck.ToMe(2))


def test_a_method_that_reduces_nothing_is_refused() -> None:
    model = small_tower()
    for method, message in (
        (None, "expected a method to recover, got None and a model that is not patched"),
        (ck.Dense(), r"expected a method that reduces tokens, got Dense\(\)"),
        (ck.EViT(1.0), "which leaves nothing to recover"),
    ):
        with pytest.raises(ValueError, match=message):
            recover(model, noise(), method=method)
    with pytest.raises(ValueError, match=r"reduces tokens, got Dense\(\)"):
        recover(ck.patch(model, ck.Dense()), noise())
    with pytest.raises(ValueError, match=r"in float32, got torch\.bfloat16: call model\.float"):
        recover(small_tower().bfloat16(), noise(), method=EVIT)


def test_the_method_of_the_model_is_the_default() -> None:
    first, second = small_tower(), ck.patch(small_tower(), EVIT)
    run(first, epochs=1)
    recover(second, noise(), **{**OPTIONS, "epochs": 1})
    assert same(state_of(first), state_of(second)) and ck.method_of(second) == EVIT


def test_progress_counts_images_and_stops_without_a_state() -> None:
    seen: list[Progress] = []
    run(small_tower(), epochs=1, batch_size=10, progress=seen.append)
    counts = [(each.phase, each.done, each.total) for each in seen]
    embedding = [("embedding", done, 40) for done in (10, 20, 30, 40)]
    assert counts == [*embedding, ("measuring", 6, 6), *[("training", done, 34) for done in (10, 20, 30, 34)],
                      ("measuring", 6, 6)]  # fmt: skip
    assert seen[5].loss > 0 and seen[5].cosine > 0

    def stops(phase: str, count: int) -> Callable[[Progress], bool]:
        return lambda progress: progress.phase == phase and progress.done >= count

    for phase, count in (("embedding", 20), ("measuring", 1), ("training", 20)):
        model = small_tower()
        result = run(model, progress=stops(phase, count))
        assert result.stopped and result.after is None and same(state_of(model), state_of(small_tower()))
        assert ck.method_of(model) is None
    model, other = small_tower(), small_tower()
    result = run(model, progress=stops("training", 40))  # within the second epoch of 34 images
    assert result.stopped and result.best_step == 5 and result.steps == 5 + 1 and ck.method_of(model) == EVIT
    seen.clear()
    run(other, progress=lambda progress: bool(seen.append(progress)) or (progress.phase, progress.done) == (
        "training", 34))  # fmt: skip
    assert not same(state_of(model), state_of(small_tower()))


def test_closeness_is_that_of_a_literal_comparison() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = normalize(torch.randn(2100, 8, generator=generator), dim=1)
    reduced = normalize(dense + 0.2 * torch.randn(2100, 8, generator=generator), dim=1)
    cosines = (reduced * dense).sum(1).double().numpy()
    nearest = (reduced.double() @ dense.double().T).argmax(1) == torch.arange(2100)
    wanted = (cosines.mean(), np.percentile(cosines, 1), cosines.min(), float(nearest.double().mean()))
    assert closeness_of(reduced, dense) == pytest.approx(wanted, abs=1e-6)
    assert 0.05 < wanted[3] < 0.95
    twice = torch.cat([dense[:3], dense[:3]])
    assert closeness_of(twice, twice).recall_at_1 == 1  # equal images are right answers
    assert closeness_of(dense[:2].flip(0), dense[:2]).recall_at_1 == 0


def test_the_rate_rises_and_falls() -> None:
    rates = [rate_at(step, 10, 0.2) for step in range(10)]
    assert (
        rates[:3] == [0.5, 1.0, 1.0]
        and rates[6] == pytest.approx(0.5)
        and rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    )
    assert rate_at(0, 10, 0.0) == 1 and rate_at(9, 10, 1.0) == 1 and rate_at(0, 1, 0.05) == 1


def timm_model() -> Any:
    return randomized(timm_tower("test_vit", 3, img_size=96, num_classes=0))


LIBRARIES: dict[str, Callable[[], Any]] = {
    "open_clip": small_tower,
    "OpenAI": lambda: randomized(openai_tower(layers=3, size=32, patch=8, width=64, out=32)).float(),
    "timm": timm_model,
    "transformers": clip_model,
    "SigLIP": siglip_model,
}


def made(name: str) -> Any:
    """A model of a library, with random weights."""
    package = {"OpenAI": "clip", "SigLIP": "transformers"}.get(name, name)
    pytest.importorskip(package, reason=f"{package} is not installed")
    torch.manual_seed(0)
    return LIBRARIES[name]()


@pytest.mark.parametrize("lora", [None, 2])
@pytest.mark.parametrize("name", LIBRARIES)
def test_every_library_is_recovered(name: str, lora: int | None) -> None:
    if lora:
        pytest.importorskip("peft", reason="peft is not installed")
    model, method = made(name), ck.EViT(0.3)
    size = ck.tower_of(model).image_size
    images = torch.randn(24, 3, *size, generator=torch.Generator().manual_seed(0))
    before, dense, types = state_of(model), embed(model, images), list(map(type, model.modules()))
    parameters = dict(model.named_parameters())
    result = recover(model, images, method=method, epochs=2, batch_size=8, held_out=4, lora=lora,
                     lr=3e-3 if lora else 3e-4, contrast=0.0)  # fmt: skip
    assert result.before is not None and result.after is not None and result.best_step
    assert result.after.cosine > result.before.cosine and ck.method_of(model) == method
    held_out = torch.randperm(24, generator=generator_of(0, "held out"))[:4].sort().values
    assert result.after == pytest.approx(closeness_of(embed(model, images[held_out]), dense[held_out]), abs=1e-5)
    assert all(weight is parameters[path] and weight.requires_grad for path, weight in model.named_parameters())
    changed = {name for name, tensor in state_of(model).items() if not torch.equal(tensor, before[name])}
    assert changed and not any("text" in name or name.startswith(("logit", "transformer.")) for name in changed)
    if lora is None:
        tower = {path for path, weight in model.named_parameters() if path.startswith(("visual", "vision", "blocks"))}
        assert changed <= tower | {path for path in before if name == "timm"} and len(changed) > 0.8 * len(tower)
        assert name != "transformers" or "visual_projection.weight" in changed
    else:
        assert changed <= {f"{path}.weight" for path, module in model.named_modules() if type(module) is nn.Linear}
        per_block = {"open_clip": 2, "OpenAI": 2, "timm": 4}.get(name, 6)
        assert len(changed) == per_block * len(ck.tower_of(model).blocks)
        ck.unpatch(model)
        assert len(types) == len(list(model.modules())) and not hasattr(ck.tower_of(model).root, "peft_config")


def test_adapters_leave_no_trace_after_an_error_and_need_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    model = small_tower()
    before, modules = state_of(model), list(model.modules())
    with pytest.raises(ValueError, match="lr must keep all numbers finite"):
        run(model, lr=1e30, lora=2)
    assert same(state_of(model), before) and all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert run(model, lora=2, progress=lambda progress: progress.phase == "training").stopped
    assert same(state_of(model), before) and all(a is b for a, b in zip(model.modules(), modules, strict=True))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"lora needs peft: pip install 'clipkernels\[recover\]', or pass lora=None"):
        run(model, lora=2)
    assert same(state_of(model), before) and ck.method_of(model) is None


def test_a_predictor_belongs_to_the_recovered_tower_then(tmp_path: Path) -> None:
    from clipkernels.fingerprint import fingerprint, fingerprinted_module

    model = ck.bundled()[0]
    tower, images = ck.tower_of(model), noise(12)
    original = fingerprint(fingerprinted_module(tower))
    predictor = RankPredictor(tower.num_tokens, tower.prefix, 2, about={"tower": original}).eval()
    method = ck.PatchRanking(predictor, 0.5)
    assert recover(model, images, method=method, epochs=1, batch_size=4, lr=2e-5, held_out=2, contrast=0.0).best_step
    named: Any = ck.method_of(model)
    assert named.predictor.about["tower"] == fingerprint(fingerprinted_module(ck.tower_of(model))) != original
    assert predictor.about["tower"] == original
    assert all(torch.equal(a, b) for a, b in zip(named.predictor.parameters(), predictor.parameters(), strict=True))
    ck.save(model, tmp_path / "tower")
    assert torch.equal(embed(ck.load(tmp_path / "tower").model, images), embed(model, images))


def test_recover_is_found_as_an_attribute_of_learn() -> None:
    assert ck.learn.recover is recover and partial(ck.learn.recover)
    with pytest.raises(AttributeError, match=r"module 'clipkernels.learn' has no attribute 'nothing'"):
        ck.learn.nothing  # noqa: B018
