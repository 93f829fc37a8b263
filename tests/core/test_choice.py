"""The row that `clipkernels bench` takes, and the figures that decide."""

from __future__ import annotations

import pytest

from clipkernels.comparison.choice import choose, interval
from clipkernels.comparison.towers import EAGER, Row
from clipkernels.measure.fidelity import Fidelity
from clipkernels.measure.timing import HOST, Band, Speed


def row(
    name: str, speedup: float, agreement: float | None, low: float | None = None, mode: str = EAGER, finite: bool = True
) -> Row:
    """A measured row; dense ones have the names of dense ones."""
    dense = name in (HOST, "Dense()")
    tokens = (65, 65, 65) if dense else (65, 50, 30)
    band = Band(speedup, speedup - 0.05 if low is None else low, speedup + 0.05)
    label = name if mode == EAGER else f"{name}, {mode}"
    speed = Speed(label, tokens, 1.0, 1.0, 1.0, Band(1, 1, 1), 8.0, band, band, "Dense()")
    return Row("fp32", name, mode, speed, Fidelity((0.9, 0.98765), None, agreement, finite), None)


DENSE = [row(HOST, 0.9, 1.0), row("Dense()", 1.0, 1.0, low=1.0)]


def test_the_fastest_of_those_that_keep_enough_is_taken() -> None:
    rows = [*DENSE, row("A", 1.1, 0.99), row("B", 1.4, 240 / 256), row("C", 1.3, 250 / 256), row("D", 2.0, 0.5)]
    choice = choose(rows, 256, 0.9)
    # 240 of 256 are 93.8 %, whose interval ends at 90.1 %.
    assert (choice.precision, choice.method, choice.mode, choice.min_agreement) == ("fp32", "B", "eager", 0.9)
    assert choice.reason == (
        "fp32: take B, the fastest that is sure to keep the nearest other image of 90 % of images: 240 of 256 (95 % "
        "interval 90.1 to 96.1 %), mean cosine 0.9877, speed-up ×1.40 (1.35 to 1.45). In a larger collection it keeps "
        "fewer."
    )
    assert choose(rows, 256, 0.945).method == "C" and choose(rows, 256, 0.4).method == "D"
    assert choice.record() == {**choice._asdict()} and set(choice.record()) >= {"precision", "method", "mode", "reason"}


def test_without_one_that_keeps_enough_dense_is_taken() -> None:
    choice = choose([*DENSE, row("A", 1.2, 0.8), row("B", 1.6, 0.25)], 200, 0.9)
    assert (choice.method, choice.mode) == ("Dense()", "eager")
    assert choice.reason == (
        "fp32: take Dense(): no faster method is sure to keep the nearest other image of 90 % of images. A comes "
        "closest: 160 of 200 (95 % interval 73.9 to 85.0 %), mean cosine 0.9877."
    )


def test_a_method_that_is_not_faster_is_never_taken() -> None:
    rows = [*DENSE, row("A", 0.7, 1.0), row("B", 1.02, 1.0, low=0.98)]
    choice = choose(rows, 1000, 0.9)
    assert choice.method == "Dense()" and choice.reason == (
        "fp32: take Dense(): no method is faster in nine rounds of ten. B comes closest: ×1.02 (0.98 to 1.07)."
    )
    assert choose([*rows, row("C", 1.2, 0.99)], 1000, 0.9).method == "C"


@pytest.mark.parametrize(
    ("images", "agreement", "reason"),
    [
        (1, None, "a single image has no neighbours, which would show the cost of a faster method."),
        (2, 1.0, "2 images cannot show that a faster method would keep the nearest other image of 90 % of images; "),
        (34, 1.0, "34 images cannot show that a faster method would keep the nearest other image of 90 % of images; "),
    ],
)
def test_few_images_decide_for_dense(images: int, agreement: float | None, reason: str) -> None:
    rows = [*DENSE, row("A", 1.5, agreement)]
    choice = choose(rows, images, 0.9)
    assert choice.method == "Dense()" and choice.reason.startswith(f"fp32: take Dense(): {reason}")
    assert images == 1 or choice.reason.endswith("it takes at least 35.")
    assert choose([*DENSE, row("A", 1.5, 1.0)], 35, 0.9).method == "A"


def test_random_weights_and_infinite_embeddings_decide_for_dense() -> None:
    rows = [*DENSE, row("A", 1.5, 1.0)]
    choice = choose(rows, 500, 0.9, "the weights are random")
    assert choice.method == "Dense()" and "the weights are random, so neighbours say nothing" in choice.reason
    infinite = choose([*DENSE, row("A", 1.5, 1.0, finite=False)], 500, 0.9)
    assert infinite.method == "Dense()" and "with embeddings that are not finite" in infinite.reason
    alone = choose(DENSE, 500, 0.9)
    assert alone.reason == "fp32: take Dense(), the fastest row: no method that reduces tokens was measured."


def test_compiled_rows_have_their_mode_in_the_sentence() -> None:
    rows = [*DENSE, row("A", 1.3, 1.0), row("A", 1.5, 1.0, mode="compiled default")]
    choice = choose(rows, 500, 0.9)
    assert (choice.method, choice.mode) == ("A", "compiled default")
    assert choice.reason.startswith("fp32: take A, compiled default, the fastest")


@pytest.mark.parametrize(("same", "images"), [(240, 256), (160, 200), (10, 10), (0, 5), (1, 2)])
def test_the_ends_of_the_interval_solve_its_equation(same: int, images: int) -> None:
    share, ends = same / images, interval(same, images)
    assert 0 <= ends[0] <= share <= ends[1] + 1e-12 and ends[1] <= 1
    for end in ends:  # the shares whose own normal interval just reaches the observed one
        assert (end - share) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / images, abs=1e-12)
