"""Cost: plans in milliseconds from a table, the table against forwards, its file, and the tables that are refused."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import clipkernels as ck
from clipkernels.measure.timing import Times, gmacs_for, plan_for, time_variants, vary
from clipkernels.methods import Method
from clipkernels.patching import method_of, patched, tower_of
from clipkernels.plan import Condense, Merge, Plan, Predict, Prune, Step
from clipkernels.testing import openai_tower, patch_ranking, timm_tower, transformers_tower
from clipkernels.tuning import cost
from clipkernels.tuning.cost import CostTable, gmacs_as_executed, isotonic, measure_cost
from clipkernels.tuning.cost_table import Conditions, TowerRecord

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
NARROW = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 2}
TOWERS: dict[str, Callable[[], nn.Module]] = {
    "bundled": lambda: ck.bundled()[0],
    "OpenAI": lambda: openai_tower(3, 32, 8, 64, 32),
    "transformers CLS": lambda: transformers_tower("CLIPModel", 3, **SIZES),
    "transformers query": lambda: transformers_tower("SiglipVisionModel", 3, **SIZES),
    "timm average": lambda: timm_tower("vit_base_patch16_reg4_gap_256", 3, **NARROW),
    "timm CLS, registers": lambda: timm_tower("vit_base_patch14_reg4_dinov2", 3, **NARROW),
    "timm query": lambda: timm_tower("vit_base_patch16_siglip_224", 3, **NARROW),
    "timm rotary": lambda: timm_tower("eva02_base_patch16_clip_224", 3, **NARROW),
}
RECORD = TowerRecord(
    library="Tower", block="0" * 8, tokens=9, blocks=3, prefix=1, width=4, mlp_ratio=4.0, patch=8, out=2,
    outputs_only_cls=True,
)  # fmt: skip
CONDITIONS = Conditions(
    tower=RECORD, device="a CPU", dtype="float32", batch=2, threads=1, kernels=False, versions={"torch": "2"}
)


def table_of(**changes: Any) -> CostTable:
    """A table of three counts, whose parts have different digits."""
    fields: dict[str, Any] = {
        **{"conditions": CONDITIONS, "clock": "wall", "rounds": 3, "counts": (2, 5, 9), "dense": 9.0},
        **{"scale": 1.0, "embed": 0.5},
        **{"attention": (1.0, 2.0, 4.0), "attention_sized": (1.5, 2.5, 5.0), "mlp": (10.0, 20.0, 40.0)},
        **{"last": (100.0, 200.0, 400.0), "last_sized": (150.0, 250.0, 500.0), "pool": (0.75,) * 3},
        **{"merge": (1e3, 2e3, 4e3), "prune": (1e4, 2e4, 4e4), "condense": (1e5, 2e5, 4e5)},
    }
    return CostTable(**(fields | changes))


def everywhere(**changes: Any) -> CostTable:
    """The same table of a tower that outputs more than CLS."""
    tower = msgspec.structs.replace(RECORD, outputs_only_cls=False)
    return table_of(conditions=msgspec.structs.replace(CONDITIONS, tower=tower), pool=(0.0, 0.25, 0.75), **changes)


def plan_of(*steps: Step | None) -> Plan:
    return Plan(steps, 9)


def test_a_plan_costs_the_sum_of_its_parts() -> None:
    table = table_of()
    assert table.milliseconds(plan_of(None, None, None)) == 9  # measured as a whole
    # The last block reads only CLS, and ignores its step; 7 tokens are halfway between 5 and 9.
    assert table.milliseconds(plan_of(None, Prune(5), Prune(2))) == 0.5 + 44 + (4 + 4e4 + 30) + 300 + 0.75
    assert table.milliseconds(plan_of(Condense(1, 3, 2), None, None)) == 0.5 + (4 + 4e5 + 20) + 22 + 200 + 0.75
    # Sizes weigh keys after the first merge, unless no merge is proportional.
    assert table.milliseconds(plan_of(Merge(2), None, None)) == 0.5 + (4 + 4e3 + 30) + (3.75 + 30) + 375 + 0.75
    assert table.milliseconds(plan_of(Merge(2, False), None, None)) == 0.5 + (4 + 4e3 + 30) + (3 + 30) + 300 + 0.75
    later = (4 + 4e4 + 35) + (3.5 + 3.5e3 + 25) + 312.5
    assert table.milliseconds(plan_of(Prune(6), Merge(2), None)) == 0.5 + later + 0.75


def test_every_block_of_a_tower_that_outputs_more_than_cls_counts() -> None:
    table = everywhere()
    assert table.milliseconds(plan_of(None, None, Prune(3))) == 0.5 + 2 * 44 + (4 + 4e4 + 20) + 0.25
    # Merged tokens are copied back to their patches before the pool.
    assert table.milliseconds(plan_of(None, None, Merge(4))) == 0.5 + 2 * 44 + (4 + 4e3 + 20) + 0.75


def test_parts_are_scaled_to_forwards() -> None:
    plan, table = plan_of(Prune(3), None, None), table_of(scale=2.0)
    assert table.milliseconds(plan) == 2 * table_of().milliseconds(plan)
    assert table.block_milliseconds(9, 5, Merge(4)) == 2 * (4 + 4e3 + 20)
    assert table.milliseconds(plan_of(None, None, None)) == 9


def test_counts_below_the_least_cost_as_much_and_above_are_refused() -> None:
    table = table_of()
    assert table.block_milliseconds(1, 1) == table.block_milliseconds(2, 2) == 11
    assert table.block_milliseconds(9, 2, Merge(7)) == 4 + 4e3 + 10
    with pytest.raises(ValueError, match="expected at most 9 tokens, which enter the tower, got 10"):
        table.block_milliseconds(10, 9)


@pytest.mark.parametrize("make", [table_of, everywhere])
def test_fewer_tokens_never_cost_more(make: Callable[[], CostTable]) -> None:
    table, draw = make(), random.Random(0)
    kinds: tuple[Callable[[int], Step], ...] = (lambda k: Prune(k, False), lambda k: Merge(8 - k, False))
    for _ in range(200):
        kind = draw.choice(kinds)
        few, many = sorted(draw.sample(range(4, 9), 2))
        later = draw.choice([None, Merge(1, False)])
        assert table.milliseconds(plan_of(kind(few), later, None)) <= table.milliseconds(
            plan_of(kind(many), later, None)
        )


def test_plans_that_the_table_does_not_cover_are_refused() -> None:
    table, tiny = table_of(), ck.bundled()[0]
    for plan, message in (
        (
            Plan((None,) * 3, 10),
            "expected a plan for 9 tokens, 3 blocks and a prefix of 1 as in the cost table, got 10, 3",
        ),
        (Plan((None,) * 2, 9), "got 9, 2 and 1"),
        (Plan((None,) * 3, 9, 2), "got 9, 3 and 2"),
        (Plan((None,) * 3, 9, learnt=2), "expected a plan without learnt tokens"),
        (plan_of(None, Predict(3), None), "expected steps without a predictor"),
        (plan_for(tower_of(tiny), patch_ranking(tiny)), "expected a plan for 9 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            table.milliseconds(plan)


def test_a_table_that_contradicts_itself_is_refused() -> None:
    for changes, message in (
        ({"counts": (2, 5, 8)}, "counts that do not rise to the tower's number of tokens"),
        ({"counts": (5, 2, 9)}, "counts that do not rise"),
        ({"mlp": (10.0, 20.0)}, "milliseconds of mlp that are not one per count, or fall"),
        ({"prune": (1.0, 3.0, 2.0)}, "milliseconds of prune that are not one per count, or fall"),
    ):
        with pytest.raises(ValueError, match=message):
            table_of(**changes)


def test_gmacs_are_those_that_run(tiny: nn.Module) -> None:
    for model, exact in ((tiny, True), (TOWERS["transformers query"](), False)):
        tower = tower_of(model)
        plan = plan_for(tower, ck.EViT(0.5))
        assert gmacs_as_executed(tower, plan) == gmacs_for(tower, plan, exact=exact)


def test_isotonic_values_are_the_nearest_that_do_not_fall() -> None:
    assert isotonic([]) == [] and isotonic([3.0]) == [3.0]
    assert isotonic([1, 2, 2, 5]) == [1, 2, 2, 5]
    assert isotonic([3, 2, 1]) == [2, 2, 2] and isotonic([1, 4, 2, 3, 9]) == [1, 3, 3, 3, 9]
    for seed in range(50):
        values = np.random.default_rng(seed).normal(size=12)
        # The largest of the least means of ranges that end here or later.
        minmax = [
            max(min(values[low : high + 1].mean() for high in range(at, 12)) for low in range(at + 1))
            for at in range(12)
        ]
        np.testing.assert_allclose(isotonic(values), minmax, atol=1e-12)


def count_flops(calls: Mapping[str, Callable[[], object]], rounds: int, **_: Any) -> Times:
    """Floating-point operations of every call in place of seconds, in units of 1e-3."""
    flops = {}
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        flops[name] = [1e-3 * counter.get_total_flops()] * rounds
    return Times(flops)


def forward_flops(model: nn.Module, method: Method, batch: int) -> float:
    tower = tower_of(model)
    with patched(model, method), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        tower_of(model).encode(torch.randn(batch, 3, *tower.image_size))
    return counter.get_total_flops()


@pytest.mark.parametrize("name", TOWERS)
def test_parts_have_the_operations_of_forwards(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TOWERS[name]().requires_grad_(False)
    tower = tower_of(model)
    monkeypatch.setattr(cost, "measure", count_flops)
    counts = range(tower.prefix + 1, tower.num_tokens + 1)
    table = measure_cost(model, 2, counts=list(counts), rounds=1)
    assert abs(table.scale - 1) < 0.01
    patches = tower.num_tokens - tower.prefix
    methods: list[Method] = [
        ck.Dense(),
        ck.EViT(0.7),
        ck.EViT(0.5, blocks=(0, 1)),
        ck.ToMe(2),
        ck.ToMe(2, proportional=False),
        ck.ToMe([patches // 2]),
        ck.ToMe([patches // 4, patches // 4]),
        ck.TCA(0.1, blocks=(1,)),
    ]
    for method in methods:
        expected = forward_flops(model, method, 2)
        actual = table.milliseconds(plan_for(tower, method))
        assert abs(actual / expected - 1) < (1e-9 if method == ck.Dense() else 0.01), method


SLOPES: dict[str, tuple[float, float]] = {
    **{"block": (3, 1), "block sized": (4, 1), "mlp": (2, 0), "core": (0.5, 1), "core with sizes": (0.5, 2)},
    **{"merge": (0.6, 3), "prune": (0.75, 3), "condense": (1, 4), "last": (1, 5), "last sized": (2, 5)},
    "pool": (0, 1),
}


def slow_cost(plan: Plan) -> float:
    """Milliseconds of a plan on a machine whose calls have these slopes, and which embeds in 7."""
    total, tokens, sized = 7.0 + 1, plan.entry, False
    for step in plan.steps[:-1]:
        left = tokens if step is None else step.leaves(tokens, plan.prefix)
        total += (2 if sized else 1) * tokens + 1 + 2 * left
        total += 0.1 * tokens + 1 if isinstance(step, Merge) else 0.25 * tokens + 2 if step else 0
        tokens, sized = left, sized or (plan.proportional and isinstance(step, Merge))
    return total + (2 if sized else 1) * tokens + 5


def test_a_table_is_exact_where_its_assumptions_hold(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = tower_of(tiny)
    forwards = {name: 0.7 * slow_cost(plan_for(tower, method)) for name, method in cost._reduced(tower).items()}

    def fake(calls: Mapping[str, Callable[[], object]], rounds: int, **_: Any) -> Times:
        def milliseconds(name: str) -> float:
            part, _, count = name.rpartition(" ")
            if count.isdecimal():
                return SLOPES[part][0] * int(count) + SLOPES[part][1]
            return {**forwards, "dense": 900.0, "embed": 7.0}[name]

        return Times({name: [1e-3 * milliseconds(name)] * rounds for name in calls})

    monkeypatch.setattr(cost, "measure", fake)
    table = measure_cost(tiny, 4, rounds=3)
    assert table.counts == (7, 13, 20, 26, 33, 39, 45, 52, 58, 65) and table.rounds == 3
    counts = np.array(table.counts)
    for name, slope, constant in (
        ("attention", 1, 1),
        ("attention_sized", 2, 1),
        ("mlp", 2, 0),
        ("merge", 0.1, 1),
        ("prune", 0.25, 2),
        ("condense", 0.5, 3),
        ("last", 1, 5),
        ("last_sized", 2, 5),
    ):
        np.testing.assert_allclose(getattr(table, name), slope * counts + constant, err_msg=name)
    assert abs(table.scale - 0.7) < 1e-9 and table.milliseconds(plan_for(tower, ck.Dense())) == 900
    methods: list[Method] = [ck.EViT(0.7), ck.ToMe(4), ck.ToMe(4, proportional=False), ck.ToMe([9, 0, 20, 3])]
    for method in methods:
        plan = plan_for(tower, method)
        assert abs(table.milliseconds(plan) - 0.7 * slow_cost(plan)) < 1e-9


def test_a_tower_keeps_its_patch_mode_and_weights(tiny: nn.Module, images: torch.Tensor) -> None:
    before = ck.encode_image(tiny, images).embedding
    state = {name: value.clone() for name, value in tiny.state_dict().items()}
    tiny.train()
    measure_cost(tiny, 1, counts=[9], rounds=1)
    assert method_of(tiny) is None and tiny.training and all(module.training for module in tiny.modules())
    assert all(torch.equal(value, state[name]) for name, value in tiny.state_dict().items())
    assert torch.equal(ck.encode_image(tiny.eval(), images).embedding, before)
    ck.patch(tiny, ck.EViT(0.5))
    reduced = ck.encode_image(tiny, images).embedding
    measure_cost(tiny, 1, counts=[9], rounds=1)
    assert method_of(tiny) == ck.EViT(0.5) and torch.equal(ck.encode_image(tiny, images).embedding, reduced)


def test_progress_counts_every_run(tiny: nn.Module) -> None:
    calls: list[tuple[int, int]] = []
    measure_cost(tiny, 1, counts=[9], rounds=2, progress=lambda *numbers: calls.append(numbers))
    total = calls[0][1]
    assert calls == [(number, total) for number in range(1, total + 1)] and total % 3 == 0 and total > 60


@pytest.mark.usefixtures("triton")
def test_kernels_are_timed_as_a_tower_launches_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = openai_tower(2, 16, 8, 64, 32)
    monkeypatch.setenv("CLIPKERNELS_BACKEND", "triton")
    table = measure_cost(model, 1, counts=[5], rounds=1)
    assert table.conditions.kernels and table.counts == (5,) and table.scale > 0
    monkeypatch.delenv("CLIPKERNELS_BACKEND")
    with pytest.raises(ValueError, match=r"expected a cost table of kernels False \(it has True\)"):
        table.check(model, 1)


def test_a_table_is_read_as_it_was_written(tiny: nn.Module, tmp_path: Path) -> None:
    table = measure_cost(tiny, 2, counts=[9, 33], rounds=1)
    table.save(tmp_path / "cost.json")
    again = CostTable.load(tmp_path / "cost.json")
    assert again == table
    tower = tower_of(tiny)
    for method in (ck.Dense(), ck.ToMe(8), ck.EViT(0.7), ck.TCA(0.05)):
        plan = plan_for(tower, method)
        assert again.milliseconds(plan) == table.milliseconds(plan)
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "cost.json").read_bytes()
    again.check(ck.patch(ck.bundled()[0], ck.ToMe(2)), 2)


def test_a_table_of_other_conditions_is_refused_by_what_differs(tiny: nn.Module) -> None:
    table = measure_cost(tiny, 2, counts=[9], rounds=1)
    conditions = table.conditions

    def refusal(model: nn.Module = tiny, batch: int = 2, **changes: Any) -> str:
        other = msgspec.structs.replace(table, conditions=msgspec.structs.replace(conditions, **changes))
        with pytest.raises(ValueError, match=r"^expected a cost table of ") as caught:
            other.check(model, batch, "cost.json")
        assert str(caught.value).endswith("got cost.json: measure a new one") and "\n" not in str(caught.value)
        return str(caught.value)

    assert "cost table of batch 8 (it has 2), got cost.json" in refusal(batch=8)
    assert "dtype 'bfloat16' (it has 'float32')" in refusal(ck.bundled()[0].bfloat16())
    assert "(it has 'another GPU')" in refusal(device="another GPU")
    assert "threads 1 (it has 16)" in refusal(threads=16)
    assert "versions torch" in refusal(versions={**conditions.versions, "torch": "1.0"})
    different: Any = ck.bundled()[0]
    different.visual.transformer.resblocks[0].mlp.gelu = nn.ReLU()
    assert "tower block" in refusal(different)
    message = refusal(TOWERS["timm average"](), batch=4)
    assert "batch 4" in message and "tower library 'TimmTower'" in message and "tower prefix 4" in message


def test_wrong_arguments_are_refused_before_anything_runs(tiny: nn.Module) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"batch": 0}, "batch must be an int of at least 1"),
        ({"rounds": 0}, "rounds must be an int of at least 1"),
        ({"counts": [1]}, r"counts\[0\] must be an int from 2 to the tower's tokens = 65, got 1"),
        ({"counts": [9, 66]}, r"counts\[1\] must be an int from 2"),
        ({"counts": 9}, "counts must be a list of numbers of tokens, got 9"),
        ({"clock": "sun"}, 'clock must be "wall" or "process"'),
    )
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            measure_cost(tiny, **{"batch": 1, **arguments})
        assert method_of(tiny) is None
    with pytest.raises(ValueError, match="expected a tower in float32, float16 or bfloat16, got float64"):
        measure_cost(ck.bundled()[0].double(), 1)
    with pytest.raises(TypeError, match="progress must be callable"):
        measure_cost(tiny, 1, progress=1)  # type: ignore[arg-type]


@pytest.mark.slow  # a minute of timing on a shared machine
def test_predictions_are_near_measured_forwards(tiny: nn.Module) -> None:
    tower = tower_of(tiny)
    methods: dict[str, Method] = {
        "dense": ck.Dense(),
        **{"EViT": ck.EViT(0.7), "ToMe": ck.ToMe(8), "bulk": ck.ToMe([32]), "TCA": ck.TCA(0.05)},
    }
    table = measure_cost(tiny, 32, clock="process")
    batches = [torch.randn(32, 3, 32, 32) for _ in range(4)]
    times = time_variants(vary(tiny, methods), batches, 21, clock="process")
    for name, method in methods.items():
        predicted = table.dense / table.milliseconds(plan_for(tower, method))
        assert abs(predicted / times.ratio(name, "dense").median - 1) < 0.15, name


def test_measuring_is_quick(tiny: nn.Module) -> None:
    start = time.process_time()
    measure_cost(tiny, 8, rounds=3, clock="process")
    assert time.process_time() - start < 60
