"""Paired timing, on a fake clock so that every figure is known."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import clipkernels as ck
from clipkernels.measure import timing
from clipkernels.measure.timing import Band, Times, Variant, efficiency, measure, tabulate, vary

B16: Any = SimpleNamespace(num_tokens=197, blocks=range(12), prefix=1, width=768, patch=16, out=512, mlp_ratio=4.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that moves only when a test moves it."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


def runs_for(clock: SimpleNamespace, seconds: Callable[[], float]) -> Callable[[], None]:
    def run() -> None:
        clock.now += seconds()

    return run


def variant(method: ck.Method, exact: bool) -> Variant:
    return Variant(lambda images: images, method, exact)


def test_every_variant_runs_once_per_round_in_changing_order() -> None:
    ran: list[str] = []
    measure({name: lambda name=name: ran.append(name) for name in "abcd"}, rounds=9, warmup=1)
    rounds = [ran[start : start + 4] for start in range(0, 40, 4)]
    assert len(ran) == 40
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len({tuple(names) for names in rounds}) > 3


def test_the_same_seed_gives_the_same_order() -> None:
    ran: list[str] = []
    variants = {name: lambda name=name: ran.append(name) for name in "abcd"}
    measure(variants, rounds=5, seed=3)
    measure(variants, rounds=5, seed=3)
    assert ran[:24] == ran[24:]


def test_warmup_rounds_are_not_in_the_times(clock: SimpleNamespace) -> None:
    costs = iter([50.0, 2.0, 2.0, 2.0])
    times = measure({"a": runs_for(clock, lambda: next(costs))}, rounds=3, warmup=1)
    assert times.seconds["a"] == [2.0, 2.0, 2.0]


def test_progress_is_called_after_every_run() -> None:
    calls: list[int] = []
    measure({"a": int, "b": int}, rounds=3, warmup=2, progress=lambda: calls.append(1))
    assert len(calls) == 10


def test_a_slow_round_cancels_in_the_ratio() -> None:
    times = Times({"dense": [2.0, 20.0, 2.0], "reduced": [1.0, 10.0, 1.0]})
    assert times.ratio("reduced", "dense") == Band(2.0, 2.0, 2.0)


def test_medians_and_quantiles_are_interpolated() -> None:
    times = Times({"a": [5.0, 1.0, 4.0, 2.0, 3.0, 6.0]})
    assert times.of("a") == pytest.approx((3.5, 2.0, 5.0))
    assert times.ratio("a", "a") == Band(1.0, 1.0, 1.0)


def test_the_fastest_variant_has_the_smallest_median() -> None:
    times = Times({"a": [3.0, 3.0, 1.0], "b": [2.0, 2.0, 9.0]})
    assert times.fastest(["a", "b"]) == "b"


def test_efficiency_is_one_if_time_falls_with_the_operations() -> None:
    assert efficiency(2.0, gmacs_dense=17.58, gmacs_reduced=8.79) == pytest.approx(1.0)


def test_the_process_clock_requires_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match=r"needs torch.set_num_threads\(1\), got 2 threads"):
            measure({"a": int}, rounds=1, clock="process")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variants": {}, "rounds": 1}, "expected at least one variant and one round, got 0 and 1"),
        ({"variants": {"a": int}, "rounds": 0}, "got 1 and 0"),
        ({"variants": {"a": int}, "rounds": 1, "clock": "sun"}, "clock must be"),
    ],
)
def test_bad_arguments_of_measure_raise(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(**arguments)


@pytest.mark.parametrize(
    ("dense_exact", "reduced_exact", "ratio"), [(False, False, 1.51), (True, True, 1.46), (True, False, 1.41)]
)
def test_efficiency_uses_the_gmacs_that_each_variant_ran(dense_exact: bool, reduced_exact: bool, ratio: float) -> None:
    times = Times({"dense": [3.0], "evit": [2.0]})
    variants = {"dense": variant(ck.Dense(), dense_exact), "evit": variant(ck.EViT(0.7), reduced_exact)}
    dense, evit = tabulate(times, variants, B16, batch=8)
    assert evit.speedup.median == 1.5
    assert round(dense.gmacs_run / evit.gmacs_run, 2) == ratio
    assert evit.efficiency.median == pytest.approx(1.5 / (dense.gmacs_run / evit.gmacs_run))


def test_a_row_has_the_published_schedule_and_the_speed() -> None:
    times = Times({"dense": [4.0, 4.0], "evit": [2.0, 2.0]})
    variants = {"dense": variant(ck.Dense(), False), "evit": variant(ck.EViT(0.7), True)}
    _, row = tabulate(times, variants, B16, batch=8)
    assert (round(row.gmacs, 2), round(row.ideal, 2), row.images_per_second) == (11.62, 1.51, 4.0)
    assert (row.tokens[0], row.tokens[-1], row.baseline) == (197, 72, "dense")


def test_speedups_are_relative_to_the_fastest_dense_variant() -> None:
    times = Times({"host": [4.0], "ours": [3.0], "evit": [1.5]})
    variants = {
        "host": variant(ck.Dense(), False),
        "ours": variant(ck.Dense(), True),
        "evit": variant(ck.EViT(0.7), True),
    }
    rows = tabulate(times, variants, B16, batch=1)
    assert [row.speedup.median for row in rows] == [0.75, 1.0, 2.0]
    assert {row.baseline for row in rows} == {"ours"}


def test_a_table_without_a_dense_variant_raises() -> None:
    with pytest.raises(ValueError, match="expected a dense variant among evit, got none"):
        tabulate(Times({"evit": [1.0]}), {"evit": variant(ck.EViT(0.7), True)}, B16, batch=1)


def test_variants_share_weights_and_do_not_change_the_model(tiny: Any, images: torch.Tensor) -> None:
    before = tiny.encode_image(images)
    variants = vary(tiny, {"host": None, "evit": ck.EViT(0.5)})
    clone: Any = variants["evit"].encode.__self__.root  # type: ignore[attr-defined]
    assert clone is not tiny.visual
    assert ck.method_of(clone) == ck.EViT(0.5)
    assert ck.method_of(tiny) is None
    assert {parameter.data_ptr() for parameter in clone.parameters()} == {
        p.data_ptr() for p in tiny.visual.parameters()
    }
    assert torch.equal(tiny.encode_image(images), before)
    assert torch.equal(variants["host"].encode(images), before)  # type: ignore[arg-type]


def test_only_patched_towers_that_pool_cls_run_the_exact_last_block(tiny: Any) -> None:
    variants = vary(tiny, {"host": None, "dense": ck.Dense(), "tome": ck.ToMe(4)})
    assert [variant.exact for variant in variants.values()] == [False, True, True]
